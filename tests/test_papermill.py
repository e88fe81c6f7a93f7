"""A parameter passed on the command line takes effect, and a wrong one fails at once"""
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
FIG7 = ROOT / "nbs" / "fig7.ipynb"
BIN = Path(sys.executable).parent


def run(*words, timeout=120):
    return subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def parameter_cells(notebook):
    return [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]


def test_a_parameter_survives_cleaning_and_takes_effect(tmp_path):
    path, result = tmp_path / "tiny.ipynb", tmp_path / "out.ipynb"
    cells = [new_markdown_cell("# Tiny\n\n> A parameter"), new_code_cell("vlm = 'phi4'", metadata={"tags": ["parameters"], "scrolled": True}), new_code_cell("print(f'asked {vlm}')")]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), path)

    cleaned = run(BIN / "nbdev_clean", "--fname", path)
    assert cleaned.returncode == 0, cleaned.stderr
    tagged, = parameter_cells(nbformat.read(path, as_version=4))
    assert dict(tagged.metadata) == {"tags": ["parameters"]}  # the tag stays, the rest goes

    done = run(BIN / "papermill", path, result, "-p", "vlm", "gemma3")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "asked gemma3" in str(nbformat.read(result, as_version=4).cells)


def test_experiments_that_take_parameters_have_one_tagged_cell():
    for path in sorted((ROOT / "nbs").glob("[!0-9]*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        assert len(parameter_cells(notebook)) == 1, f"{path.name} needs one cell tagged `parameters`"


@pytest.mark.skipif(not FIG7.exists(), reason="nbs/fig7.ipynb is not written yet")
def test_figure_7_names_the_vlms_that_exist(tmp_path):
    done = run(BIN / "papermill", FIG7, tmp_path / "out.ipynb", "-p", "vlm", "phi5")
    assert done.returncode != 0
    assert re.search(r"named 'phi5'; choose one of: .*\bphi4\b", done.stderr), done.stderr[-2000:]
