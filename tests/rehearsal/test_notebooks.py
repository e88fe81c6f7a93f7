"""Every figure and table notebook at paper scale, and a coupling from clips to an explanation"""
import csv
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
from huggingface_hub import constants

import here
from releases import RED, WORDS
from transporter_nb.concepts import learning
from transporter_nb.concepts.learning import SameAnswer
from transporter_nb.core.base import load_checkpoint
from transporter_nb.evaluate import paper_tables, rows
from transporter_nb.evaluate.comparison import CONTROL, DIVERGE, MAXIMISE, STEER
from transporter_nb.evaluate.metrics.captions import CaptionScorer
from transporter_nb.evaluate.paper_tables import SAID, WAYS
from transporter_nb.explain.transporter import Transporter
from transporter_nb.world.contrasts import PAPER_CONTRASTS
from transporter_nb.world.video import demo_video, save_mp4

NBS = Path(__file__).resolve().parents[2] / "nbs"
FIGURES = { # notebook: its parameters
    "fig1": dict(vlm="gemma3"), "fig3": dict(vlm="qwen25vl", n_strengths=3),
    "fig4": dict(vlm="phi4", n_seeds=2), "fig5": dict(vlm="videollama3", n_strengths=2),
    "fig7": dict(vlm="phi4"),
    "fig8": dict(vlm="gemma3", generator="wan-1.3b"),
    "gallery": dict(vlm="smolvlm", only="red -> blue, walk -> run"),
    "explain_clip": dict(vlm="gemma3", n_words=1),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_at_paper_scale(snapshots, desk, decided, name):
    options = WORDS.replace("steps=2, c", "steps=4, c") if name == "fig4" else WORDS
    given = dict(scale="paper", device="cpu", options=options, **FIGURES[name])
    here.run(NBS / f"{name}.ipynb", desk / "out.ipynb", **given)
    record, = (json.loads(path.read_text()) for path in desk.glob("*.json"))
    assert record["parameters"]["scale"] == "paper"
    assert options in json.dumps(record) or name == "fig4"  # the settings of the clips
    for ending in ("png", "pdf", "gif"):
        drawn, = desk.glob(f"*.{ending}")
        assert drawn.stat().st_size > 1000
    assert not list((desk / "repository").glob("figures/*"))


def test_a_contrast_that_leaves_the_answer_alone_is_drawn_as_that(snapshots, desk, monkeypatch):
    def divergence(found, pair, vlm):
        if pair.source == "front" or (pair.source, vlm.name) == ("Chicago", "smolvlm"):
            raise SameAnswer(f"{vlm.name}'s answers to both sides of {pair.name!r} do not differ.")
        return max(found, .01)

    monkeypatch.setattr(learning, "check_divergence", divergence)
    here.run(NBS / "fig6.ipynb", desk / "out.ipynb", scale="paper", device="cpu", options=WORDS,
             vlm="gemma3,smolvlm")
    record, = (json.loads(path.read_text()) for path in desk.glob("*.json"))
    shown = [[sweep["vlm"] for sweep in panel["sweeps"]] for panel in record["panels"]]
    assert shown == [["gemma3", "smolvlm"], [], ["gemma3"]]
    assert [list(panel.get("left_out", ())) for panel in record["panels"]] == [
        [], ["gemma3", "smolvlm"], ["smolvlm"]]
    assert "do not differ" in record["panels"][2]["left_out"]["smolvlm"]
    claims = record["claims"]
    assert claims["smolvlm: Chicago -> New York, a concept can be learned"] is False
    assert sum("the target word gains" in claim for claim in claims) == 3
    assert len(list(desk.glob("fig6_*.png"))) == len(list(desk.glob("fig6_*.gif"))) == 1


TABLES = { # notebook: its parameters; one after the other they find each other's rows
    "table1": dict(clips=2, inverted=1, inversion_steps=2),
    "table2": dict(clips=2, inverted=1, inversion_steps=2), "table3": dict(clips=2),
}


@pytest.fixture(params=TABLES)
def table(request, snapshots, clips, shelf, desk, decided, monkeypatch):
    """Name and record of a table"""
    monkeypatch.setattr(rows, "repo_path", shelf.joinpath)
    monkeypatch.setattr(paper_tables, "CaptionScorer", partial( # METEOR's Java takes long to start
        CaptionScorer, [f"bleu{order}" for order in range(1, 5)], "plain"))
    given = TABLES[request.param] | ({"real": str(clips)} if request.param == "table2" else {})
    here.run(NBS / f"{request.param}.ipynb", desk / "out.ipynb", scale="paper", device="cpu",
             options=WORDS, vlm="gemma3", generator="wan-1.3b", **given)
    record, = (json.loads(path.read_text()) for path in desk.glob("*.json"))
    for ending in ("png", "pdf", "csv"): assert len(list(desk.glob(f"table?_*.{ending}"))) == 1
    assert not list((desk / "repository").glob("figures/*"))
    return request.param, record


def test_a_table_measures_what_needs_no_reader_and_says_why_it_lacks_the_rest(table):
    name, record = table
    assert record["parameters"]["scale"] == "paper" and record["parameters"]["clips"] == 2
    assert [case[1] for case in record["cases"]] == list(PAPER_CONTRASTS)[:2]
    cells = {(row["group"], row["row"]): row["cells"] for row in record["table"]["rows"]}
    measured, dashes = MEASURED_CELLS[name], DASHES[name]
    for place, column in measured:
        cell = cells[place][column]
        assert math.isfinite(cell["value"]) and not cell.get("reason"), (place, column)
    for place, column, why in dashes:
        cell = cells[place][column]
        assert cell.get("value") is None and why in cell["reason"], (place, column)
    if name == "table3": return
    before, after = cells[CONTROL, "unsteered"], cells[STEER, "target caption"]
    if name == "table1":
        assert before["gain"]["value"] == before["pixels to base"]["value"] == 0
        assert 0 < after["VLM's p(target)"]["value"] < 1 and after["pixels to base"]["value"] > 0
        assert math.isclose(after["before"]["value"], before["before"]["value"], rel_tol=.07)
    else: assert before["l2 to unsteered"]["value"] == 0 < after["l2 to unsteered"]["value"]


OURS = STEER, "TRANSPORTER"
MEASURED_CELLS = {
    "table1": [(OURS, "VLM's p(target)"), (OURS, "caption fit"), (OURS, "smoothness"),
               (OURS, "s a contrast"), ((STEER, "text interpolation"), "evaluations a clip"),
               ((STEER, "FreeSliders"), "gain"), ((CONTROL, "decode and re-encode"), "flicker"),
               ((MAXIMISE, "AM"), "own aim reached"), ((DIVERGE, "AM, jittered"), "gain")],
    "table2": [(OURS, "cos"), (OURS, "KL"), ((MAXIMISE, "AM"), "l2 to unsteered"),
               ((CONTROL, "other seed"), "cos to unsteered, grey taken away")],
    "table3": [(("coupling network", WAYS[0]), "B@1"), (("chance", "a grey clip"), SAID),
               (("coupling network", WAYS[0]), f"{SAID}, halfway"), (("concept bank", "KL"), SAID)],
}
DASHES = {
    "table1": [(OURS, "readable", "readers of the world"), (OURS, "FVD-mini", "I3D"),
               ((MAXIMISE, "LEAPS"), "gain", "a real clip of the target caption"),
               ((CONTROL, "retrieved clip"), "flicker", "a library of real clips")],
    "table2": [((MAXIMISE, "MACO"), "cos", "real clips"), (("real clips", "of the target"), "l2",
                                                            "no real clips")],
    "table3": [(("coupling network", "P = 100"), "B@4", "learned anew on training clips"),
               (("coupling network", "structure only"), "C", "train_paper trains one"),
               (("coupling network", WAYS[0]), "M", "was not asked for"),
               (("baseline", "LEAPS"), SAID, "a real clip of the target caption")],
}


def test_a_kernel_gets_options_as_words(snapshots, desk):
    words = [Path(sys.executable).parent / "papermill", "--no-progress-bar", NBS / "fig5.ipynb",
             desk / "out.ipynb", "-p", "scale", "paper", "-p", "device", "cpu", "-p", "options",
             WORDS, "-p", "n_strengths", "2"]
    env = os.environ | {"HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "unknown parameter" not in done.stderr
    assert len(list(desk.glob("fig5_videollama3_*.png"))) == 1


# ------------------------------------------------------------------------------ from clips to Phi
CLIPS = "clip_size=5x32x32, n_frames=2"
TRAINING = dict(scale="paper", vlm="gemma3", generator="wan-1.3b", device="cpu", steps=10,
                batch_size=2, accumulation=1, projections=3, width=32, layers=2, save_every=3,
                states=1, measured=1, options=CLIPS)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Videos with captions in a table"""
    folder = tmp_path_factory.mktemp("clips")
    texts = [entry.caption for entry in PAPER_CONTRASTS.values()][:5]
    for k in range(5): save_mp4(folder / f"{k}.mp4", demo_video(9)[0].roll(k, -1), fps=6)
    with open(folder / "clips.csv", "w", newline="") as table:
        rows = [(f"{k}.mp4", text) for k, text in enumerate(texts)]
        csv.writer(table).writerows([("path", "caption"), *rows])
    return folder


def train(clips, folder):
    notebook = NBS / "training" / "train_paper.ipynb"
    here.run(notebook, folder / "out.ipynb", data=str(clips), folder=str(folder), **TRAINING)
    return folder / "weights" / "coupling_gemma3_wan-1.3b.safetensors"


@pytest.fixture(scope="module")
def trained(snapshots, clips, tmp_path_factory): return train(clips, tmp_path_factory.mktemp("phi"))


def test_a_killed_training_goes_on_to_the_same_coupling(snapshots, clips, trained, tmp_path):
    state = tmp_path / "coupling_gemma3_wan-1.3b" / "state.safetensors"
    process = get_context("fork").Process(target=train, args=(clips, tmp_path))
    process.start()
    deadline = time.monotonic() + 600
    while not state.exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(.002)
    process.kill()
    process.join()
    assert process.exitcode == -SIGKILL and load_checkpoint(state).config["step"] < 10
    whole, resumed = load_checkpoint(trained), load_checkpoint(train(clips, tmp_path))
    assert whole.config == resumed.config
    assert all(torch.equal(value, resumed.tensors[name]) for name, value in whole.tensors.items())


def test_the_coupling_answers_beside_decode_and_re_encode(snapshots, trained):
    given = dict(scale="paper", device="cpu", options=WORDS, coupling=trained)
    l2v = Transporter.load("gemma3", "wan-1.3b", **given)
    e = l2v.explain(RED, "red -> blue", strengths=2, progress=False)
    assert e.settings["coupled"] and l2v.coupling.made_for["vlm"] == "gemma3"
    assert e.phi.target.isfinite().all() and not torch.equal(e.phi.target, e.reencoded.target)
    with pytest.raises(ValueError, match="was made for"):
        Transporter.load("gemma3", "wan", **given)
