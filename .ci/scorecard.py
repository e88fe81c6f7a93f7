"""Print the measured rows that fall short of their targets, and write the card into docs/scorecard.md between its two marks."""
import json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
page = root / "docs" / "scorecard.md"


def falls_short(row: dict) -> bool:
    """A row with a target and a value on the wrong side of it; a value that could not be measured counts as short"""
    if row.get("target") is None: return False
    if row.get("value") is None or row["value"] != row["value"]: return True
    return row["value"] > row["target"] if row.get("better") == "lower" else row["value"] < row["target"]


def show(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def table(rows: list[dict]) -> str:
    """Markdown: what was measured, its interval and n, the target, and whether it is met"""
    lines = ["| measured | VLM | value | 95 % interval | n | target | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        interval = f"{show(row['low'])} to {show(row['high'])}" if row.get("low") is not None and row.get("high") is not None else ""
        target = "" if row.get("target") is None else f"{'at most' if row.get('better') == 'lower' else 'at least'} {show(row['target'])}"
        verdict = "" if not target else "short" if falls_short(row) else "met"
        lines.append(f"| {row['what']} | {row.get('vlm') or ''} | {show(row['value'])} | {interval} | {row.get('n') or ''} | {target} | {verdict} |")
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
    def margin(row): return (row["value"] - row["target"]) * (-1 if row.get("better") == "lower" else 1) if row.get("value") is not None else float("-inf")
    return [min(members, key=margin) | {"what": members[0]["what"] if len(members) == 1 else f"{name}, worst of {len(members)} ({sum(map(falls_short, members))} short)"}
            for (name, _), members in groups.items()]


def read_reports() -> dict[Path, dict]:
    """Every record of `figures/` that holds measured rows"""
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted((root / "figures").glob("*.json"))}
    return {path: report for path, report in found.items() if isinstance(report, dict) and report.get("rows")}


def card(reports: dict[Path, dict]) -> str:
    """All reports as tables, one row a group"""
    parts = []
    for path, report in reports.items():
        rows = [row for row in report["rows"] if row.get("target") is not None]
        if not rows: continue
        met = len(rows) - sum(map(falls_short, rows))
        parts.append(f"## {path.stem}\n\n{met} of {len(rows)} targets met. Facts, controls and rivals without a target are in `figures/{path.name}`.\n\n{table(worst_of(rows))}")
    return "\n\n".join(parts)


def print_short(reports: dict[Path, dict]):
    """What falls short, report by report"""
    for path, report in reports.items():
        rows = [row for row in report["rows"] if row.get("target") is not None]
        short = [row for row in rows if falls_short(row)]
        print(f"{path.stem}: {len(rows) - len(short)} of {len(rows)} targets met" if rows else f"{path.stem}: {len(report['rows'])} facts, no target")
        for row in short:
            sign = ">" if row.get("better") == "lower" else "<"
            print(f"  short  {row['what']}{' (' + row['vlm'] + ')' if row.get('vlm') else ''}: {show(row['value']) or 'not measured'} {sign} {show(row['target'])}, n = {row.get('n')}")


def with_card(text: str, reports: dict[Path, dict]) -> str:
    """The page with the card of today between its marks"""
    marked = re.compile(r"(<!-- scorecard -->\n).*?(<!-- /scorecard -->)", re.DOTALL)
    if not marked.search(text): raise ValueError(f"{page} has lost its marks <!-- scorecard --> and <!-- /scorecard -->.")
    return marked.sub(lambda match: f"{match[1]}\n{card(reports)}\n\n{match[2]}", text)


if __name__ == "__main__":
    reports = read_reports()
    if not reports: sys.exit("There is no report in figures/ yet. Run `make measure` first.")
    print_short(reports)
    page.write_text(with_card(page.read_text(encoding="utf-8"), reports), encoding="utf-8")
