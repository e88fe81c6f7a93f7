"""A notebook as a page: an API entry above each exported cell, whose code is folded; stored outputs are kept.

Nothing is imported and nothing is run: signatures and docments are read from the text of the cells.
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
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        self.source = source

    def written(self, node: ast.expr | None) -> str:
        return re.sub(r"\s+", " ", ast.get_source_segment(self.source, node)) if node else ""

    def described(self, field: str, kind: ast.expr | None, remark: str) -> list[str]:
        """One line of the list below a signature, none where there is nothing to say"""
        said = [f"`{self.written(kind)}`"] * bool(kind) + [remark] * bool(remark)
        return [f":{field}: {' · '.join(said)}"] if said else []


def arguments(spec: ast.arguments, bound: bool) -> list[tuple[str, ast.arg, ast.expr | None]]:
    """Name with its stars, argument and default, in the order of the signature; `bound` leaves out `self`"""
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + spec.defaults
    found = [(arg.arg, arg, default) for arg, default in zip(positional, defaults)][bound:]
    if spec.vararg: found.append((f"*{spec.vararg.arg}", spec.vararg, None))
    found += [(arg.arg, arg, default) for arg, default in zip(spec.kwonlyargs, spec.kw_defaults)]
    if spec.kwarg: found.append((f"**{spec.kwarg.arg}", spec.kwarg, None))
    return found


def signature(spec: ast.arguments, text: Text, bound: bool) -> str:
    """Names and defaults; the types stand in the list below"""
    shown = [name + (f"={text.written(default)}" if default else "") for name, _, default in arguments(spec, bound)]
    if spec.kwonlyargs and not spec.vararg: shown.insert(len(spec.posonlyargs + spec.args) - bound, "*")
    return ", ".join(shown)


def call_lines(node: ast.FunctionDef, text: Text, bound: bool) -> list[str]:
    """What is passed and what comes back; a remark belongs to the last of those on its line"""
    listed = arguments(node.args, bound)
    ends = {max(part.end_lineno for part in (arg, default) if part): name for name, arg, default in listed}
    if node.returns: ends[node.returns.end_lineno] = "return"
    remark = {name: text.comments.get(line, "") for line, name in ends.items()}
    lines = [text.described("param " + name.replace("*", r"\*"), arg.annotation, remark.get(name, "")) for name, arg, _ in listed]
    return sum(lines, []) + text.described("returns", node.returns, remark.get("return", ""))


def directive(kind: str, head: str, doc: str, lines: list[str]) -> str:
    return "\n".join([f"````{{py:{kind}}} {head}", "", doc, "", *lines, "````"])


def function_entry(node: ast.FunctionDef, text: Text, owner: str = "") -> str:
    """A function, or a method of the class `owner`"""
    named = {ast.unparse(d.func if isinstance(d, ast.Call) else d).rpartition(".")[2]: d for d in node.decorator_list}
    if "patch" in named: owner = ast.unparse(node.args.args[0].annotation)
    if "patch_to" in named: owner = ast.unparse(named["patch_to"].args[0])
    keywords = {k.arg for decorator in node.decorator_list if isinstance(decorator, ast.Call) for k in decorator.keywords}
    is_property = bool({"property", "cached_property"} & set(named)) or "as_prop" in keywords
    of_class = "classmethod" in named or "cls_method" in keywords
    bound = bool(owner) and "staticmethod" not in named
    name = f"{owner}.{node.name}" if owner else node.name
    lines = call_lines(node, text, bound)
    if is_property: return directive("property", name, ast.get_docstring(node) or "", lines)
    kind = "function" if not owner else "classmethod" if of_class else "method" if bound else "staticmethod"
    return directive(kind, f"{name}({signature(node.args, text, bound)})", ast.get_docstring(node) or "", lines)


def class_entries(node: ast.ClassDef, text: Text) -> list[str]:
    """A class with its fields or the arguments of its constructor, then its public methods"""
    functions = [member for member in node.body if isinstance(member, ast.FunctionDef)]
    start = next((function for function in functions if function.name == "__init__"), None)
    fields = [member for member in node.body if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name)]
    if start:
        head, lines = f"{node.name}({signature(start.args, text, True)})", call_lines(start, text, True)
    else:
        shown = [f.target.id + (f"={text.written(f.value)}" if f.value else "") for f in fields]
        head = node.name + (f"({', '.join(shown)})" if fields else "")
        lines = sum((text.described(f"param {f.target.id}", f.annotation, text.comments.get(f.end_lineno, "")) for f in fields), [])
    methods = [function_entry(f, text, node.name) for f in functions if not f.name.startswith("_")]
    return [directive("class", head, ast.get_docstring(node) or "", lines), *methods]


def entries(source: str) -> list[str]:
    """API entries of everything public that a cell defines"""
    text, found = Text(source), []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef): found += class_entries(node, text)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"): found.append(function_entry(node, text))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.end_lineno in text.comments:
            if not node.targets[0].id.startswith("_"): found.append(directive("data", node.targets[0].id, text.comments[node.end_lineno], []))
    return found


def opening(source: str, module: str | None) -> str:
    """The first cell without its notes to nbdev, and the name under which a module is imported"""
    source = re.sub(r"^- skip_exec:.*\n?", "", source, flags=re.M).rstrip()
    return source if module is None else f"{source}\n\n```{{py:module}} {PACKAGE}.{module}\n```\n\nModule `{PACKAGE}.{module}`."


def read(text: str) -> nbformat.NotebookNode:
    """A notebook as it is shown; nothing that it holds is executed"""
    notebook = nbformat.reads(text, as_version=4)
    module = next(iter(re.findall(r"#\| default_exp (\S+)", "\n".join(cell.source for cell in notebook.cells))), None)
    notebook.cells[0].source = opening(notebook.cells[0].source, module)
    cells, heading = [], "this notebook"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = next(reversed(re.findall(r"^#+ (.*)", cell.source, re.M)), heading)
            cells.append(cell)
            continue
        flags = re.findall(r"^#\|\s*(\w+)", cell.source, re.M)
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
        if "hide" in flags or not cell.source: continue
        if "export" in flags: cells += [nbformat.v4.new_markdown_cell(entry) for entry in entries(cell.source)]
        if {"export", "exporti"} & set(flags): cell.metadata.tags = ["hide-input"]
        cell.metadata.mystnb = {"image": {"alt": f"Output of a cell under “{heading}”"}}
        cells.append(cell)
    notebook.cells = cells
    return notebook
