"""A notebook as a page: an API entry above each exported cell, whose code is folded.

Stored outputs are kept. Nothing is imported and nothing is run: signatures and docments are read
from the text of the cells.
"""
import ast
import io
import re
import tokenize

import nbformat

PACKAGE = "transporter_nb"


class Text:
    """The text of a cell: its comments by line, and its expressions as they are written"""

    def __init__(self, source: str):
        self.source = source
        self.comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }

    def written(self, node: ast.expr | None) -> str:
        return re.sub(r"\s+", " ", ast.get_source_segment(self.source, node)) if node else ""

    def described(self, field: str, kind: ast.expr | None, remark: str) -> list[str]:
        """One line of the list below a signature, none where there is nothing to say"""
        said = [f"`{self.written(kind)}`"] * bool(kind) + [remark] * bool(remark)
        return [f":{field}: {' · '.join(said)}"] if said else []


def arguments(
    spec: ast.arguments, bound: bool,
) -> list[tuple[str, ast.arg, ast.expr | None]]:
    """Name with its stars, argument and default, in order; `bound` leaves out `self`"""
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + spec.defaults
    found = [(arg.arg, arg, default) for arg, default in zip(positional, defaults)][bound:]
    if spec.vararg: found.append((f"*{spec.vararg.arg}", spec.vararg, None))
    found += [(arg.arg, arg, default) for arg, default in zip(spec.kwonlyargs, spec.kw_defaults)]
    if spec.kwarg: found.append((f"**{spec.kwarg.arg}", spec.kwarg, None))
    return found


def signature(spec: ast.arguments, text: Text, bound: bool) -> str:
    """Names and defaults; the types stand in the list below"""
    shown = [
        name + (f"={text.written(default)}" if default else "")
        for name, _, default in arguments(spec, bound)
    ]
    if spec.kwonlyargs and not spec.vararg:
        shown.insert(len(spec.posonlyargs + spec.args) - bound, "*")
    return ", ".join(shown)


def call_lines(node: ast.FunctionDef, text: Text, bound: bool) -> list[str]:
    """What is passed and what comes back; a remark belongs to the last of those on its line"""
    listed = arguments(node.args, bound)
    ends = {
        max(part.end_lineno for part in (arg, default) if part): name
        for name, arg, default in listed
    }
    if node.returns: ends[node.returns.end_lineno] = "return"
    remark = {name: text.comments.get(line, "") for line, name in ends.items()}
    lines = []
    for name, arg, _ in listed:
        field = "param " + name.replace("*", r"\*")
        lines += text.described(field, arg.annotation, remark.get(name, ""))
    return lines + text.described("returns", node.returns, remark.get("return", ""))


def directive(kind: str, head: str, doc: str | None, lines: list[str]) -> str:
    return "\n".join([f"````{{py:{kind}}} {head}", "", doc or "", "", *lines, "````"])


def decorators(node: ast.FunctionDef) -> dict[str, ast.expr]:
    """Name to decorator, as `patch_to` to `@patch_to(HubVLM)`"""
    functions = {d: d.func if isinstance(d, ast.Call) else d for d in node.decorator_list}
    return {ast.unparse(f).rpartition(".")[2]: d for d, f in functions.items()}


def function_entry(node: ast.FunctionDef, text: Text, owner: str = "") -> str:
    """A function, or a method of the class `owner`"""
    named = decorators(node)
    if "patch" in named: owner = ast.unparse(node.args.args[0].annotation)
    if "patch_to" in named: owner = ast.unparse(named["patch_to"].args[0])
    keywords = {k.arg for d in named.values() if isinstance(d, ast.Call) for k in d.keywords}
    bound = bool(owner) and "staticmethod" not in named
    name = f"{owner}.{node.name}" if owner else node.name
    doc, lines = ast.get_docstring(node), call_lines(node, text, bound)
    if {"property", "cached_property"} & set(named) or "as_prop" in keywords:
        return directive("property", name, doc, lines)
    kind = "function"
    if owner: kind = "method" if bound else "staticmethod"
    if "classmethod" in named or "cls_method" in keywords: kind = "classmethod"
    return directive(kind, f"{name}({signature(node.args, text, bound)})", doc, lines)


def class_entries(node: ast.ClassDef, text: Text) -> list[str]:
    """A class with its fields or what its constructor takes, then its public methods"""
    functions = [member for member in node.body if isinstance(member, ast.FunctionDef)]
    fields = [member for member in node.body
              if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name)]
    start = next((function for function in functions if function.name == "__init__"), None)
    head, lines = node.name, []
    if start:
        head = f"{node.name}({signature(start.args, text, True)})"
        lines = call_lines(start, text, True)
    elif fields:
        shown = [f.target.id + (f"={text.written(f.value)}" if f.value else "") for f in fields]
        head = f"{node.name}({', '.join(shown)})"
        for field in fields:
            remark = text.comments.get(field.end_lineno, "")
            lines += text.described(f"param {field.target.id}", field.annotation, remark)
    methods = [function_entry(f, text, node.name) for f in functions if not f.name.startswith("_")]
    return [directive("class", head, ast.get_docstring(node), lines), *methods]


def entries(source: str) -> list[str]:
    """API entries of everything public that a cell defines; a constant needs a remark"""
    text, found = Text(source), []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found += class_entries(node, text)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found.append(function_entry(node, text))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, remark = node.targets[0].id, text.comments.get(node.end_lineno)
            if remark and not name.startswith("_"):
                found.append(directive("data", name, remark, []))
    return found


def opening(source: str, module: str | None) -> str:
    """The first cell without its notes to nbdev, and the name under which a module is imported"""
    source = re.sub(r"^- skip_exec:.*\n?", "", source, flags=re.M).rstrip()
    if module is None: return source
    full = f"{PACKAGE}.{module}"
    return f"{source}\n\n```{{py:module}} {full}\n```\n\nModule `{full}`."


def shown_cells(cell: nbformat.NotebookNode, heading: str) -> list[nbformat.NotebookNode]:
    """What a page shows of a code cell below `heading`: API entries, then the cell"""
    flags = set(re.findall(r"^#\|\s*(\w+)", cell.source, re.M))
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    if "hide" in flags or not cell.source: return []
    if {"export", "exporti"} & flags: cell.metadata.tags = ["hide-input"]
    cell.metadata.mystnb = {"image": {"alt": f"Output of a cell under “{heading}”"}}
    described = entries(cell.source) if "export" in flags else []
    return [*map(nbformat.v4.new_markdown_cell, described), cell]


def read(text: str) -> nbformat.NotebookNode:
    """A notebook as it is shown; nothing that it holds is executed"""
    notebook = nbformat.reads(text, as_version=4)
    exported = re.findall(r"#\| default_exp (\S+)", "\n".join(c.source for c in notebook.cells))
    first = notebook.cells[0]
    first.source = opening(first.source, exported[0] if exported else None)
    cells, heading = [], "this notebook"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cells += shown_cells(cell, heading)
        else:
            heading = [heading, *re.findall(r"^#+ (.*)", cell.source, re.M)][-1]
            cells.append(cell)
    notebook.cells = cells
    return notebook
