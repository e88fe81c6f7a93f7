"""How the notebooks read, in numbers: python .ci/reading.py [--gate] [--list] [PATH ...]

Widths of code lines, syntax nodes a line, export cells too long or without an example after them,
lines with a semicolon, words of prose a hundred lines of code, mannered words; and, of the package,
runs of lines that stand twice. `--gate` ends with an error where a rule of style.md is broken;
`--list` names every place.
"""
import argparse
import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from statistics import median, quantiles

import nbformat

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LINES = 100, 40 # columns of a line of code; lines of an export cell
RUN = 10 # lines of code in a row that may not stand twice
BROKEN = ("wide", "long", "joined", "twice") # what `--gate` refuses
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


def beside_code(tree):
    "Numbers of the lines of docstrings, imports, signatures and `__all__`"
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines.update(range(node.lineno, node.body[0].lineno)) # backends share signatures
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        if text or names or isinstance(node, (ast.Import, ast.ImportFrom)):
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def plain_lines(path):
    "Number and text of each line of code, without comments and with single spaces"
    source, words = path.read_text(), defaultdict(list)
    left_out = beside_code(ast.parse(source))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if line in left_out or token.type == tokenize.COMMENT or not token.string.strip(): continue
        words[line].append(token.string)
    return [(line, " ".join(words[line])) for line in sorted(words)]


def repeats(paths, run=RUN):
    "Runs of lines that stand twice: both places, as (path, first line), and their length"
    rows = {path: plain_lines(path) for path in paths}
    starts = defaultdict(list)
    for path, lines in rows.items():
        for k in range(len(lines) - run + 1):
            starts[tuple(text for _, text in lines[k:k + run])].append((path, k))
    pairs = {(first, last) for places in starts.values() for first, last in combinations(places, 2)
             if first[0] != last[0] or last[1] - first[1] >= run} # no run overlaps itself
    def moved(pair, by): return tuple((path, k + by) for path, k in pair)
    found = []
    for pair in sorted(pair for pair in pairs if moved(pair, -1) not in pairs):
        more = next(n for n in range(1, len(pairs) + 1) if moved(pair, n) not in pairs)
        found.append((*((path, rows[path][k][0]) for path, k in pair), run + more - 1))
    return found


def module_paths():
    "The modules of the package, without the index that nbdev writes"
    found = (ROOT / "transporter_nb").rglob("*.py")
    return sorted(path for path in found if path.name != "_modidx.py")


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
    prose = sum(total["words"])
    twice = repeats(module_paths())
    places += [(path, line, "twice", f"{n} lines as in {other.relative_to(ROOT)} line {again}")
               for (path, line), (other, again), n in twice]
    rows = {
        "notebooks": len(paths),
        "columns of a line: median / 90th / 99th / longest": spread(widths),
        **{
            f"wider than {WIDTH}: {kind} lines": share_wide(total[kind])
            for kind in ("export", "test", "experiment")
        },
        "syntax nodes a line": f"{nodes / max(lines, 1):.1f}",
        f"export cells; longer than {LINES} lines": f"{len(total['cells'])}; {count['long']}",
        "export cells without an example after them": count["bare"],
        "lines with two statements": count["joined"],
        f"runs of {RUN} lines that stand twice": len(twice),
        "words of prose a hundred lines of code": f"{100 * prose / max(lines, 1):.0f}",
        "mannered words a thousand words": f"{1000 * len(total['mannered']) / prose:.1f}",
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
    broken = [place for place in places if place[2] in BROKEN]
    for path, where, rule, what in places if given.list else broken if given.gate else []:
        kind = "line" if rule == "twice" else "cell"
        print(f"{path.relative_to(ROOT)} {kind} {where}: {rule}: {what}")
    if given.gate and broken: sys.exit(f"{len(broken)} places are too wide, too long or copies")


if __name__ == "__main__": main()
