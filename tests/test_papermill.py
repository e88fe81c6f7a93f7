"""A parameter passed on the command line takes effect, and a wrong one fails at once"""
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
EXPERIMENTS = {path.stem: path for folder in ("", "training", "studies")
               for path in sorted((ROOT / "nbs" / folder).glob("*.ipynb"))}


def run(*words, timeout=600):
    return subprocess.run(
        [str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )


def parameter_cells(notebook):
    return [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]


def test_a_parameter_survives_cleaning_and_takes_effect(tmp_path):
    path, result = tmp_path / "tiny.ipynb", tmp_path / "out.ipynb"
    cells = [
        new_markdown_cell("# Tiny\n\n> A parameter"),
        new_code_cell("vlm = 'phi4'", metadata={"tags": ["parameters"], "scrolled": True}),
        new_code_cell("print(f'asked {vlm}')"),
    ]
    nbformat.write(
        new_notebook(
            cells=cells,
            metadata={
                "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
            },
        ),
        path,
    )

    cleaned = run(BIN / "nbdev_clean", "--fname", path)
    assert cleaned.returncode == 0, cleaned.stderr
    tagged, = parameter_cells(nbformat.read(path, as_version=4))
    assert dict(tagged.metadata) == {"tags": ["parameters"]}  # the tag stays, the rest goes

    done = run(BIN / "papermill", path, result, "-p", "vlm", "gemma3")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "asked gemma3" in str(nbformat.read(result, as_version=4).cells)


def test_experiments_that_take_parameters_have_one_tagged_cell():
    for path in EXPERIMENTS.values():
        notebook = nbformat.read(path, as_version=4)
        assert len(
            parameter_cells(notebook)
        ) == 1, f"{path.name} needs one cell tagged `parameters`"


# What each experiment is passed, and what it must then say. Every one of these stops before
# anything is computed.
FIGURES = ["fig1", "fig3", "fig4", "fig5", "fig6", "fig7", "fig8", "gallery", "explain_clip"]
TABLES = [
    "table1", "table2", "table3", "proxies", "mimic", "calibration", "faithfulness",
    "train_planted", "shaping_sweep",
]
WRONG = {
    (figure, "vlm", "phi5"): r"(?=.*phi5).*\bphi4\b.*\bgemma3\b.*\bvideollama3\b"
    for figure in FIGURES + TABLES
}
WRONG |= {(figure, "source", "purple"): r"purple" for figure in FIGURES if figure != "explain_clip"}
WRONG |= {
    ("explain_clip", "clip", "nowhere.mp4"): r"nowhere\.mp4",
    ("train_planted", "models", "pace_sky"): r"pace_sky.*pace_floor_1_tuned_0",
    ("faithfulness", "methods", "guess"): r"guess.*VLM-shaped",
    ("faithfulness", "vlm", "phi4"): r"videollama3",
}
WRONG |= {
    ("fig7", "install", "maybe"): r"install must be True or False, got 'maybe'",
    ("table1", "stem", "figures/mine"): r"only -p install True writes there",
    ("fig7", "nonsense", "3"): r"takes no parameter 'nonsense'.*Its parameters: vlm",
    ("explain", "caption_", "x"): r"takes no parameter 'caption_'. Did you mean 'caption'",
    ("train_mini", "step", "3"): r"takes no parameter 'step'. Did you mean 'steps'",
    ("train_mini", "scale", "paper"): r"takes no parameter 'scale'",
    ("fig7", "options", "ofload=parts"): r"Did you mean 'offload'",
    ("proxies", "scale", "paper"): r"runs at scale 'mini' only, got 'paper'",
    ("table1", "scale", "huge"): r"scale must be one of",
    ("table3", "scale", "huge"): r"scale must be one of",
    ("fig5", "scale", "huge"): r"scale must be one of",
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    "Status and stderr of every run of `WRONG`, by papermill's command line without a kernel"
    folder = tmp_path_factory.mktemp("refused")
    cases, answers = folder / "cases.json", folder / "answers.json"
    cases.write_text(json.dumps([command(key, folder) for key in WRONG]))
    before = figures()
    run(sys.executable, ROOT / "tests" / "refusals.py", cases, answers, timeout=3600)
    assert before == figures(), "a refused run wrote a figure"
    return dict(zip(WRONG, json.loads(answers.read_text()), strict=True))


def command(key, folder):
    "Words of papermill's command line"
    name, parameter, value = key
    out = folder / f"{name}_{parameter}.ipynb"
    return ["--no-progress-bar", str(EXPERIMENTS[name]), str(out), "-p", parameter, value]


def figures(): return {path: path.stat().st_mtime_ns for path in (ROOT / "figures").iterdir()}
def last_line(text): return text.strip().split("\n")[-1]


@pytest.mark.parametrize("key", WRONG, ids="-".join)
def test_a_passed_parameter_takes_effect_and_a_wrong_one_is_refused(refused, key):
    status, said = refused[key]
    assert status == 1
    assert re.search(WRONG[key], last_line(said), re.S), said[-1500:]


def test_with_a_kernel_a_wrong_parameter_is_refused_alike(refused, tmp_path):
    key = "fig7", "options", "ofload=parts"
    done = run(BIN / "papermill", *command(key, tmp_path), timeout=600)
    assert done.returncode == 1 and last_line(done.stderr) == last_line(refused[key][1])
