"""Print the measured rows that fall short of their targets, and write the card into the README
between its two marks."""
import json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def falls_short(row: dict) -> bool:
    """A row with a target and a value on the wrong side of it; a value that could not be measured
    counts as short"""
    if row.get("target") is None: return False
    if row.get("value") is None or row["value"] != row["value"]: return True
    return row["value"] > row["target"] if row.get("better") == "lower" else row["value"] < row[
        "target"
    ]


def show(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def table(rows: list[dict]) -> str:
    """Markdown: what was measured, its interval and n, the target, and whether it is met"""
    lines = [
        "| measured | VLM | value | 95 % interval | n | target | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        interval, target = "", ""
        if row.get("low") is not None and row.get("high") is not None:
            interval = f"{show(row['low'])} to {show(row['high'])}"
        if row.get("target") is not None:
            bound = "at most" if row.get("better") == "lower" else "at least"
            target = f"{bound} {show(row['target'])}"
        verdict = "" if not target else "short" if falls_short(row) else "met"
        lines.append(
            f"| {row['what']} | {row.get('vlm') or ''} | {show(row['value'])} | {interval} | "
            f"{row.get('n') or ''} | {target} | {verdict} |"
        )
    return "\n".join(lines)


def group(row: dict) -> str:
    """What a row is one of: the same measurement in other slots, or for other contrasts"""
    what = re.sub(r" \([^)]*\)$", "", row["what"])
    contrast = re.fullmatch(r".+ -> .+?, (.*)", what)
    return contrast.group(1) if contrast else what.split(": ")[0]


def worst_of(rows: list[dict]) -> list[dict]:
    """One row a group: the one nearest to its target, or farthest on the wrong side"""
    groups = {}
    for row in rows: groups.setdefault((group(row), row.get("vlm")), []).append(row)
    def margin(row):
        return (row["value"] - row["target"]) * (
            -1 if row.get("better") == "lower" else 1
        ) if row.get("value") is not None else float("-inf")
    return [
        min(members, key=margin)
        | {
            "what": members[0]["what"] if len(members) == 1
            else f"{name}, worst of {len(members)} ({sum(map(falls_short, members))} short)"
        }
        for (name, _), members in groups.items()
    ]


reports = {
    path: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((root / "figures").glob("*.json"))
}
reports = {
    path: report
    for path, report in reports.items()
    if isinstance(report, dict) and report.get("rows")
}
if not reports:
    sys.exit("There is no report in figures/ yet. Run `make measure` first.")

card = []
for path, report in reports.items():
    rows = [row for row in report["rows"] if row.get("target") is not None]
    if not rows:
        print(f"{path.stem}: {len(report['rows'])} facts, no target")
        continue
    short = [row for row in rows if falls_short(row)]
    print(f"{path.stem}: {len(rows) - len(short)} of {len(rows)} targets met")
    for row in short:
        sign = ">" if row.get("better") == "lower" else "<"
        print(
            f"  short  {row['what']}{' (' + row['vlm'] + ')' if row.get('vlm') else ''}: "
            f"{show(row['value']) or 'not measured'} {sign} {show(row['target'])}, n = "
            f"{row.get('n')}"
        )
    met = (
        f"**{path.stem}**: {len(rows) - len(short)} of {len(rows)} targets met. "
        f"Facts, controls and rivals without a target are in `figures/{path.name}`."
    )
    card.append(f"{met}\n\n{table(worst_of(rows))}")

readme = root / "README.md"
text = readme.read_text(encoding="utf-8")
marked = re.compile(r"(<!-- scorecard -->\n).*?(<!-- /scorecard -->)", re.DOTALL)
if not marked.search(text):
    sys.exit("README.md has lost its marks <!-- scorecard --> and <!-- /scorecard -->.")
readme.write_text(
    marked.sub(lambda match: match.group(1) + "\n\n".join(card) + "\n" + match.group(2), text),
    encoding="utf-8",
)
