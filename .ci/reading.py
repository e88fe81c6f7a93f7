"""How the notebooks read, in numbers: python .ci/reading.py [--gate] [--list] [PATH ...]

Widths of code lines, syntax nodes a line, export cells too long or without an example after them,
lines with a semicolon, words of prose a hundred lines of code, mannered words. `--gate` ends with
an error where a rule of style.md is broken; `--list` names every place.
"""
import argparse
import ast
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median, quantiles

import nbformat

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LINES = 100, 40 # columns of a line of code; lines of an export cell
EXPORT = re.compile(r"^#\|\s*exporti?\b", re.M)
# Models predict, encode and answer; these verbs make persons of them, or riddles of sentences.
MANNERED = re.compile(
    r"\b(?:wish(?:es|ed)?|belongs? to nobody|knows? nothing|knows? of|nobody|is told|tells? apart"
    r"|speaks? (?:of|for)|is its business|what (?:adds|may|makes|comes|stands)\b|who(?:ever)?\b"
    r"|taken as it is|stands? beside)", re.I)


def kind_of(cell, experiment):
    "export, test or experiment"
    if experiment: return "experiment"
    return "export" if EXPORT.search(cell.source) else "test"


def code_lines(source):
    "Lines that hold code or a comment; a formatted table of text counts as well"
    return [line for line in source.split("\n") if line.strip()]


def nodes_of(source):
    "Syntax nodes of a cell; 0 where magics make it no Python"
    try: return sum(1 for _ in ast.walk(ast.parse(source)))
    except SyntaxError: return 0


def joined(source):
    "Lines on which two statements are joined by a semicolon"
    try: tree = ast.parse(source)
    except SyntaxError: return []
    starts = defaultdict(list)
    for node in ast.walk(tree):
        for body in ("body", "orelse", "finalbody"):
            block = getattr(node, body, None)
            if not isinstance(block, list): continue
            for before, after in zip(block, block[1:]):
                if before.end_lineno == after.lineno: starts[after.lineno].append(after)
    return sorted(starts)


def read_notebook(path):
    "Facts about one notebook, and the places where it breaks a rule"
    notebook = nbformat.read(path, as_version=4)
    experiment = not re.match(r"\d_", path.relative_to(ROOT / "nbs").parts[0])
    facts, places = defaultdict(list), []
    cells = notebook.cells
    for k, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            facts["words"].append(len(cell.source.split()))
            facts["mannered"] += MANNERED.findall(cell.source)
            continue
        if cell.cell_type != "code": continue
        kind, lines = kind_of(cell, experiment), code_lines(cell.source)
        facts[kind] += [len(line) for line in lines]
        facts["nodes"].append((nodes_of(cell.source), len(lines)))
        wide = [line for line in lines if len(line) > WIDTH]
        places += [(cell.id, "wide", f"{len(line)} columns: {line.strip()[:60]}") for line in wide]
        places += [(cell.id, "joined", f"line {n} holds two statements")
                   for n in joined(cell.source)]
        if kind != "export": continue
        facts["cells"].append(len(cell.source.strip().split("\n")))
        if facts["cells"][-1] > LINES:
            places.append((cell.id, "long", f"{facts['cells'][-1]} lines"))
        after = next((c for c in cells[k + 1:] if c.cell_type == "code"), None)
        defines = re.search(r"^(?:def|class) (?!_)", cell.source, re.M)
        if defines and (after is None or EXPORT.search(after.source)):
            facts["bare"].append(cell.id)
            places.append((cell.id, "bare", "no example in the next code cell"))
    return facts, places


def spread(values):
    "median / 90th / 99th / longest"
    if len(values) < 2: return "-"
    cuts = quantiles(values, n=100)
    return f"{median(values):.0f} / {cuts[89]:.0f} / {cuts[98]:.0f} / {max(values)}"


def share_wide(values):
    "Per cent of lines wider than the rule"
    return f"{100 * sum(v > WIDTH for v in values) / len(values):.1f} %" if values else "-"


def report(paths):
    "Print the table, return the places"
    total, places = defaultdict(list), []
    for path in paths:
        facts, found = read_notebook(path)
        for key, values in facts.items(): total[key] += values
        places += [(path, *place) for place in found]
    widths = [w for kind in ("export", "test", "experiment") for w in total[kind]]
    nodes, lines = (sum(column) for column in zip(*total["nodes"]))
    count = {rule: sum(place[2] == rule for place in places) for rule in ("long", "bare", "joined")}
    rows = {
        "notebooks": len(paths),
        "columns of a line: median / 90th / 99th / longest": spread(widths),
        **{f"wider than {WIDTH}: {kind} lines": share_wide(total[kind])
           for kind in ("export", "test", "experiment")},
        "syntax nodes a line": f"{nodes / max(lines, 1):.1f}",
        f"export cells; longer than {LINES} lines": f"{len(total['cells'])}; {count['long']}",
        "export cells without an example after them": count["bare"],
        "lines with two statements": count["joined"],
        "words of prose a hundred lines of code": f"{100 * sum(total['words']) / max(lines, 1):.0f}",
        "mannered words a thousand words": f"{1000 * len(total['mannered']) / sum(total['words']):.1f}",
    }
    for name, value in rows.items(): print(f"{name:52s} {value}")
    return places


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks or folders; all by default")
    parser.add_argument("--gate", action="store_true", help="fail where a line is too wide")
    parser.add_argument("--list", action="store_true", help="name every place")
    given = parser.parse_args()
    roots = [path.resolve() for path in given.paths] or [ROOT / "nbs"]
    paths = [p for root in roots for p in ([root] if root.is_file() else root.rglob("*.ipynb"))]
    paths = sorted(p for p in paths if ".ipynb_checkpoints" not in p.parts)
    places = report(paths)
    broken = [place for place in places if place[2] in ("wide", "long", "joined")]
    for path, cell, rule, what in places if given.list else broken if given.gate else []:
        print(f"{path.relative_to(ROOT)} cell {cell}: {rule}: {what}")
    if given.gate and broken: sys.exit(f"{len(broken)} places break the rules of width and size")


if __name__ == "__main__": main()
