"""Print the measured rows that fall short of their targets, and write the card into the docs.

The card stands between the two marks of docs/scorecard.md.
"""
import json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
page = root / "docs" / "scorecard.md"


def falls_short(row: dict) -> bool:
    """A target and a value on the wrong side of it; what could not be measured counts as short"""
    if row.get("target") is None: return False
    if row.get("value") is None or row["value"] != row["value"]: return True
    return margin(row) < 0


def margin(row: dict) -> float:
    """How far a value lies on the right side of its target"""
    if row.get("value") is None: return float("-inf")
    return (row["value"] - row["target"]) * (-1 if row.get("better") == "lower" else 1)


def show(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def line(row: dict) -> str:
    """A row with a target as Markdown: value, interval, n, and whether it is met"""
    known = row.get("low") is not None and row.get("high") is not None
    interval = f"{show(row['low'])} to {show(row['high'])}" if known else ""
    target = f"{'at most' if row.get('better') == 'lower' else 'at least'} {show(row['target'])}"
    cells = (row["what"], row.get("vlm") or "", show(row["value"]), interval, row.get("n") or "",
             target, "short" if falls_short(row) else "met")
    return f"| {' | '.join(map(str, cells))} |"


def table(rows: list[dict]) -> str:
    head = "| measured | VLM | value | 95 % interval | n | target | |"
    head += "\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *map(line, rows)])


def group(row: dict) -> str:
    """What a row is one of: the same measurement in other slots, or for other contrasts"""
    what = re.sub(r" \([^)]*\)$", "", row["what"])
    contrast = re.fullmatch(r".+ -> .+?, (.*)", what)
    return contrast.group(1) if contrast else what.split(": ")[0]


def worst_of(rows: list[dict]) -> list[dict]:
    """One row a group: the one nearest to its target, or farthest on the wrong side"""
    groups = {}
    for row in rows: groups.setdefault((group(row), row.get("vlm")), []).append(row)
    worst = []
    for (name, _), members in groups.items():
        short = sum(map(falls_short, members))
        one = f"{name}, worst of {len(members)} ({short} short)"
        name = one if members[1:] else members[0]["what"]
        worst.append(min(members, key=margin) | {"what": name})
    return worst


def read_reports() -> dict[Path, dict]:
    """Every record of `figures/` that holds measured rows"""
    paths = sorted((root / "figures").glob("*.json"))
    found = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return {path: report for path, report in found.items()
            if isinstance(report, dict) and report.get("rows")}


def with_target(report: dict) -> list[dict]:
    return [row for row in report["rows"] if row.get("target") is not None]


def card(reports: dict[Path, dict]) -> str:
    """All reports as tables, one row a group"""
    parts = []
    for path, report in reports.items():
        rows = with_target(report)
        if not rows: continue
        met = f"{len(rows) - sum(map(falls_short, rows))} of {len(rows)} targets met."
        rest = f"Facts, controls and rivals without a target are in `figures/{path.name}`."
        parts.append(f"## {path.stem}\n\n{met} {rest}\n\n{table(worst_of(rows))}")
    return "\n\n".join(parts)


def print_short(reports: dict[Path, dict]):
    """What falls short, report by report"""
    for path, report in reports.items():
        rows = with_target(report)
        short = [row for row in rows if falls_short(row)]
        facts = f"{len(report['rows'])} facts, no target"
        met = f"{len(rows) - len(short)} of {len(rows)} targets met"
        print(f"{path.stem}: {met if rows else facts}")
        for row in short:
            vlm = f" ({row['vlm']})" if row.get("vlm") else ""
            sign = ">" if row.get("better") == "lower" else "<"
            value = f"{show(row['value']) or 'not measured'} {sign} {show(row['target'])}"
            print(f"  short  {row['what']}{vlm}: {value}, n = {row.get('n')}")


def with_card(text: str, reports: dict[Path, dict]) -> str:
    """The page with the card of today between its marks"""
    marked = re.compile(r"(<!-- scorecard -->\n).*?(<!-- /scorecard -->)", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"{page} has lost its marks <!-- scorecard --> and <!-- /scorecard -->.")
    return marked.sub(lambda match: f"{match[1]}\n{card(reports)}\n\n{match[2]}", text)


if __name__ == "__main__":
    reports = read_reports()
    if not reports: sys.exit("There is no report in figures/ yet. Run `make measure` first.")
    print_short(reports)
    page.write_text(with_card(page.read_text(encoding="utf-8"), reports), encoding="utf-8")
