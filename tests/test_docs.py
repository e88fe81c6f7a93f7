"""What README and docs promise.

Links lead somewhere, Python lines run, the scorecard is of today, every export has an entry.
"""
import ast
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE_NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]_*/*.ipynb"))


def load(path):
    """A Python file that is no part of a package"""
    spec = spec_from_file_location(path.stem, ROOT / path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_link_of_readme_docs_and_notebooks_leads_somewhere():
    assert load(Path(".ci/links.py")).broken_sources() == []


PAGE = """
<a href="kept.html#here">good</a> <a href="kept.html#gone">bad</a> <a href="https://a.org">far</a>
<img src="gone.png"> <img src="data:image/png;base64,AA"> <script src="https://a.org/a.js"></script>
"""


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "kept.html").write_text('<h1 id="here">kept</h1>')
    (tmp_path / "page.html").write_text(PAGE)
    (tmp_path / "page.css").write_text(
        "@import '//a.org/a.css'; a { background: url(data:image/png;base64,AA) }")
    assert load(Path(".ci/links.py")).broken_site(tmp_path) == [
        "page.html loads https://a.org/a.js",
        "page.html: gone.png does not exist",
        "page.html: kept.html#gone has no such anchor",
        "page.css loads //a.org/a.css",
    ]


def test_the_scorecard_is_that_of_the_records():
    scorecard = load(Path(".ci/scorecard.py"))
    text = scorecard.page.read_text(encoding="utf-8")
    today = scorecard.with_card(text, scorecard.read_reports())
    assert text == today, "run `make report` and commit docs/scorecard.md"


@pytest.mark.parametrize("name", ["README.md", "docs/how_to.md"])
def test_its_python_lines_run_down_the_page(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), name, "exec"), {"__name__": "reader"})


def defined_in(path):
    """Functions and classes of a module that are exported"""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    exported, = [ast.literal_eval(node.value) for node in tree.body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    return {node.name for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in exported}


@pytest.mark.parametrize("path", MODULE_NOTEBOOKS, ids=lambda path: path.stem)
def test_every_export_has_an_entry(path):
    page = load(Path("docs/notebooks.py")).read(path.read_text(encoding="utf-8"))
    shown = "\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")
    entries = re.findall(r"^`{4}\{py:(?:function|class)\} (\w+)", shown, re.MULTILINE)
    module = re.search(r"\{py:module\} (\S+)", shown)[1]
    assert not defined_in(ROOT / (module.replace(".", "/") + ".py")) - set(entries)


def test_a_signature_is_taken_from_the_text():
    read_entries = load(Path("docs/notebooks.py")).entries
    entry, = read_entries('''
def scale(
    video:Float[Tensor, "frames 3"], # In [0, 1]
    *, by:float=1e-3, # Metres
    **others, # Passed on
) -> Tensor: # In metres
    "Make it larger"
''')
    assert entry.split("\n") == [
        "````{py:function} scale(video, *, by=1e-3, **others)", "",
        "Make it larger", "",
        ':param video: `Float[Tensor, "frames 3"]` · In [0, 1]',
        ":param by: `float` · Metres",
        r":param \*\*others: Passed on",
        ":returns: `Tensor` · In metres",
        "````",
    ]
