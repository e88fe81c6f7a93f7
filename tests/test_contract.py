"""What every notebook promises: its name, its opening, its size, its outputs, and the folders it
may import from"""
import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = [path for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
         if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)]
NOTEBOOKS = {path.relative_to(ROOT / "nbs").with_suffix("").as_posix(): nbformat.read(path, 4)
             for path in PATHS}
NUMBERED = [name for name in NOTEBOOKS if re.match(r"\d_", name)]
EXPERIMENTS = [name for name in NOTEBOOKS if name not in NUMBERED]


def module_of(name):
    "`2_models/01_generators.base` exports `models.generators.base`"
    folder, stem = name.split("/")
    return f"{folder[2:]}.{stem.split('_', 1)[1]}"


MODULES = {module_of(name): int(name[0]) for name in NUMBERED}  # dotted module -> layer


def code(name, export_only=False):
    cells = [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == "code"]
    return [
        cell for cell in cells if re.search(r"^#\|\s*export", cell.source, re.M)
    ] if export_only else cells


def imports(source):
    """Dotted names a cell imports; magics and lines for other tools are left out"""
    lines = [line for line in source.split("\n") if not line.lstrip().startswith(("%", "!"))]
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import): yield from ((alias.name, None) for alias in node.names)


def test_there_are_notebooks():
    assert len(NUMBERED) >= 5 and len(set(MODULES)) == len(NUMBERED)


@pytest.mark.parametrize("name", NUMBERED)
def test_a_numbered_notebook_exports_the_module_of_its_name(name):
    targets = [
        target
        for cell in code(name)
        for target in re.findall(r"^#\|\s*default_exp\s+(\S+)", cell.source, re.M)
    ]
    module = module_of(name)
    assert re.fullmatch(r"\d_[a-z]+/\d\d_[a-z0-9_.]+", name)
    assert targets == [module]
    assert (ROOT / "transporter_nb" / (module.replace(".", "/") + ".py")).exists()


def test_every_module_has_a_notebook():
    package = ROOT / "transporter_nb"
    modules = {
        ".".join(path.relative_to(package).with_suffix("").parts)
        for path in package.rglob("*.py")
        if path.name not in ("__init__.py", "_modidx.py")
    } - {"doctor"}  # the command of `app.doctor`, four lines by hand
    assert modules == set(MODULES)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_opens_with_a_title_and_a_subtitle(name):
    first = NOTEBOOKS[name].cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S.*\n+> \S", first.source), first.source[:80]


@pytest.mark.parametrize("name", NUMBERED)
def test_export_cells_fit_a_screen(name):
    long = {
        cell.id: lines
        for cell in code(name, export_only=True)
        if (lines := len(cell.source.strip().split("\n"))) > 40
    }
    assert not long, f"lines by cell: {long}; split with @patch"


@pytest.mark.parametrize("name", NUMBERED)
def test_a_notebook_stays_readable_in_one_sitting(name):
    assert len(NOTEBOOKS[name].cells) <= 60


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_imports_are_explicit(name):
    for cell in code(name):
        for module, what in imports(cell.source):
            assert what != "*", f"star import from {module}"
            assert module != "__future__", "annotations must stay live: jaxtyping reads them"


@pytest.mark.parametrize("name", NUMBERED)
def test_the_folder_agrees_with_the_imports(name):
    layer = int(name[0])
    for cell in code(name):
        for module, what in imports(cell.source):
            if not module.startswith("transporter_nb"): continue
            dotted = module.removeprefix("transporter_nb").lstrip(".")
            imported = f"{dotted}.{what}" if f"{dotted}.{what}" in MODULES else dotted
            assert imported in MODULES, f"{module} has no notebook"
            below = MODULES[imported]
            assert below <= layer, f"folder {layer} imports {imported} of folder {below}"


def test_notebooks_of_a_folder_are_numbered_without_gaps():
    for folder in {name.split("/")[0] for name in NUMBERED}:
        numbers = [int(name.split("/")[1][:2]) for name in NUMBERED if name.startswith(folder)]
        assert sorted(numbers) == list(range(1, len(numbers) + 1)), folder


OPENED = re.compile(r"quickstart|explorer|explain|explain_clip|bring_your_own_vlm|gallery"
                    r"|fig\d|table\d|training/\w+|studies/\w+")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_a_reader_opens_stands_at_the_top(name):
    assert OPENED.fullmatch(name), "trainings and studies have folders of their own"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_exports_nothing(name):
    assert not code(name, export_only=True)
    assert not any("default_exp" in cell.source for cell in code(name))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_kept_and_clean(name):
    pictures, size = 0, 0
    for cell in code(name):
        for output in cell.outputs:
            text = str(output)
            size += len(text)
            pictures += "image/" in text
            assert output.output_type != "error", f"{cell.id} ended in {output.get('ename')}"
            # Figures print where they are saved. Those that are kept were run in /home/reader, on
            # purpose.
            shown = re.search(r"/(home|root|Users|work|tmp)/(?!reader/)\w", text)
            assert not shown, f"cell {cell.id} shows a path of one machine"
    assert size < (200_000 if name in NUMBERED else 1_000_000), f"{size} bytes of output"
    if any(
        "plt.show()" in cell.source
        and not re.search(r"^#\|\s*(gpu|weights|slow|eval:\s*false)", cell.source, re.M)
        for cell in code(name)
    ):
        assert pictures, "a reader on the web sees no plot: run it and keep the outputs"


@pytest.fixture(scope="module")
def reading():
    "The measure of .ci/reading.py"
    spec = importlib.util.spec_from_file_location("reading", ROOT / ".ci" / "reading.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_code_is_read_without_scrolling(reading, name):
    broken = ("wide", "long", "joined")
    _, places = reading.read_notebook(ROOT / "nbs" / f"{name}.ipynb")
    found = [f"cell {cell}: {what}" for cell, rule, what in places if rule in broken]
    assert not found, "\n".join(found)


def test_no_ten_lines_of_code_stand_twice(reading, tmp_path):
    found = [f"{path.relative_to(ROOT)}:{line} and {other.relative_to(ROOT)}:{again}, {n} lines"
             for (path, line), (other, again), n in reading.repeats(reading.module_paths())]
    assert not found, "\n".join(found)
    body = "\n".join(f"x{k} = {k}" for k in range(11))
    first, last = tmp_path / "first.py", tmp_path / "last.py"
    first.write_text(body)
    last.write_text("import re\n" + body.replace("x5 =", "x5  =  ").replace("\n", " # said\n\n"))
    assert reading.repeats([first, last]) == [((first, 1), (last, 2), 11)]
    last.write_text(body.replace("x5", "y5"))
    assert reading.repeats([first, last]) == []


FILES = [path for folder in ("tests", "benchmarks", ".ci")
         for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_read_without_scrolling(path):
    wide = [n for n, line in enumerate(path.read_text().split("\n"), 1) if len(line) > 100]
    assert not wide, f"lines {wide} have more than 100 columns"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_metadata_is_clean(name):
    for cell in NOTEBOOKS[name].cells:
        assert set(cell.metadata) <= {"tags"}, cell.metadata
        assert cell.cell_type != "code" or cell.execution_count is None


@pytest.mark.parametrize("module", MODULES)
def test_every_export_says_what_it_is(module):
    # under the shape checker: annotations must be ones it can read
    loaded = importlib.import_module(f"transporter_nb.{module}")
    assert loaded.__doc__, "the subtitle becomes the module's docstring"
    for name in loaded.__all__:
        thing = getattr(loaded, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
        assert inspect.getdoc(thing), f"{name} has no docstring"
        if inspect.isfunction(thing):
            bare = [
                p.name
                for p in inspect.signature(thing).parameters.values()
                if p.annotation is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            ]
            assert not bare, f"{name}: no type for {bare}"
