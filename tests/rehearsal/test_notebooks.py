"""Every figure and table notebook at paper scale, and a coupling from clips to an explanation"""
import csv
import json
import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
from huggingface_hub import constants

import here
from releases import RED, WORDS
from transporter_nb.core.base import load_checkpoint
from transporter_nb.explain.transporter import Transporter
from transporter_nb.world.contrasts import PAPER_CONTRASTS
from transporter_nb.world.video import demo_video, save_mp4

NBS = Path(__file__).resolve().parents[2] / "nbs"
FIGURES = { # notebook: its parameters
    "fig1": dict(vlm="gemma3"), "fig3": dict(vlm="qwen25vl", n_strengths=3),
    "fig4": dict(vlm="phi4", n_seeds=2), "fig5": dict(vlm="videollama3", n_strengths=2),
    "fig6": dict(vlm="gemma3,smolvlm"), "fig7": dict(vlm="phi4"),
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
    assert options in json.dumps(record) or name in ("fig4", "fig6")  # the settings of the clips
    for ending in ("png", "pdf", "gif"):
        drawn, = desk.glob(f"*.{ending}")
        assert drawn.stat().st_size > 1000
    assert not list((desk / "repository").glob("figures/*"))


@pytest.mark.parametrize("name", ["table1", "table2", "table3"])
def test_a_table_of_the_world_says_so_before_models_are_loaded(desk, monkeypatch, name):
    monkeypatch.setattr(Transporter, "load", None)
    with pytest.raises(ValueError, match="runs at scale 'mini' only, got 'paper'"):
        here.run(NBS / f"{name}.ipynb", desk / "out.ipynb", scale="paper", device="cpu")


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
