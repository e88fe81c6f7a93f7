"""From clips to a coupling: bad clips are named, other models are refused, and a killed run ends
with the weights of one that was never killed"""
import csv
import io
import json
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from transporter_nb.core.base import load_checkpoint
from transporter_nb.coupling.network import CouplingNetwork
from transporter_nb.datasets.ledger import Ledger
from transporter_nb.datasets.tables import read_clips
from transporter_nb.models.pairing import check_coupling
from transporter_nb.models.registry import load_generator, load_vlm
from transporter_nb.models.testing import tiny_generator, tiny_vlm
from transporter_nb.world.video import demo_video, save_mp4

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "training" / "train_paper.ipynb"
SMALL = dict(scale="mini", vlm="phi4", clips=5, steps=6, batch_size=2, projections=3, save_every=2,
             measured=1, device="cpu", workers=1)


def run(folder, **changes):
    "The cells of the notebook in this process, as papermill passes parameters; what they print"
    space, said = {"__name__": "__main__"}, io.StringIO()
    with redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backend without a screen warns at plt.show
        for cell in json.loads(NOTEBOOK.read_text())["cells"]:
            if cell["cell_type"] != "code": continue
            exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
            if "parameters" in cell["metadata"].get("tags", []):
                space.update(SMALL | dict(folder=str(folder)) | changes)
    plt.close("all")
    return said.getvalue()


def start(folder):
    "The same in a process of its own, to be killed: a kernel would outlive its papermill"
    here = str(Path(__file__).parent)
    words = f"import sys; sys.path.insert(0, {here!r})\n" \
            f"from test_train_paper import run\nrun({str(folder)!r})"
    return subprocess.Popen([sys.executable, "-c", words], cwd=ROOT, stderr=subprocess.PIPE)


def cached(folder):
    "Whole files of clips; a killed process also leaves a hidden part of one, which is never read"
    return {path.name: path.stat().st_mtime_ns
            for path in folder.glob("clips/*/[!.]*.safetensors")}


def kill_when(process, ready, timeout=900):
    "SIGKILL as soon as `ready()`; the process must still have been at work"
    deadline = time.monotonic() + timeout
    while not ready():
        assert process.poll() is None, process.communicate()[1].decode()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(.005)
    process.kill()
    process.communicate()
    assert process.returncode == -9


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_killed_while_caching_and_while_training_it_ends_with_the_same_weights(whole, tmp_path):
    kill_when(start(tmp_path), lambda: len(cached(tmp_path)) >= 2)
    before = cached(tmp_path)
    assert 2 <= len(before) < 5
    state = tmp_path / "coupling_phi4" / "state.safetensors"
    kill_when(start(tmp_path), state.exists)
    assert load_checkpoint(state).config["step"] in (2, 4)  # not finished
    between = cached(tmp_path)
    assert len(between) == 5 and before.items() <= between.items()  # none was made again
    run(tmp_path)
    assert cached(tmp_path) == between
    name = "weights/coupling_phi4.safetensors"
    first, last = (load_checkpoint(folder / name) for folder in (whole[0], tmp_path))
    assert first.config == last.config
    assert first.tensors.keys() == last.tensors.keys()
    assert all(torch.equal(first.tensors[key], last.tensors[key]) for key in first.tensors)


def test_costs_are_printed_first_and_the_bytes_of_the_cache_are_right(whole):
    lines = whole[1].splitlines()
    assert lines[0] == "5 records, 5 to decode; survey.parquet: {}"
    assert lines[1].startswith("cache: ") and "6 steps of 1 x 2" in lines[2]
    assert lines[3].startswith("on cpu, by arithmetic: caching")
    on_disk, planned = (float(word) for word in lines[-2].replace(",", "").split()
                        if word[0].isdigit())
    assert abs(on_disk - planned) < .1 * planned


def test_the_coupling_names_its_models_and_is_refused_for_others(whole):
    coupling = CouplingNetwork.from_pretrained(whole[0] / "weights" / "coupling_phi4.safetensors")
    assert (coupling.made_for["generator"], coupling.made_for["vlm"]) == ("wan", "phi4")
    wan, phi = load_generator(device="cpu"), load_vlm("phi4", device="cpu")
    check_coupling(coupling, wan, phi)
    with torch.no_grad(): phi.model.lm_head.weight.add_(1.)  # tokens of clips stay
    check_coupling(coupling, wan, phi)
    with torch.no_grad():
        for value in phi.parameters(): value.add_(.1 * torch.randn_like(value))
    with pytest.raises(ValueError, match="was made for the VLM 'phi4'.*is another"):
        check_coupling(coupling, wan, phi)
    with pytest.raises(ValueError, match="was made for"):
        check_coupling(coupling, tiny_generator(), tiny_vlm("phi4"))


@pytest.mark.parametrize("changes, message", [
    (dict(data="nowhere"), "there is no nowhere"),
    (dict(scale="paper"), "data must name a table or a folder"),
    (dict(steps=-1), r"got {'steps': -1}"),
    (dict(states=0), "states is at least 1"),
    (dict(vlm="phi9"), "no vlm named 'phi9'"),
    (dict(precision="half"), "precision must be auto, bfloat16 or float32, got 'half'"),
    (dict(fit="squeeze"), "fit is 'crop', 'pad' or 'stretch', got 'squeeze'"),
    (dict(bad_share=2.), "allowed share is in"),
], ids=lambda value: "".join(value) if isinstance(value, dict) else "")
def test_bad_input_is_refused_before_a_model_is_loaded(changes, message, tmp_path, monkeypatch):
    from transporter_nb.models import registry
    monkeypatch.setattr(registry, "load_vlm", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message): run(tmp_path, **changes)
    assert not (tmp_path / "clips").exists()


def test_an_interrupted_training_goes_on_with_the_same_settings_only(whole):
    with pytest.raises(ValueError, match="was made with other batch_size, plan"):
        run(whole[0], steps=8, batch_size=1)


def test_too_many_bad_records_end_the_run_before_a_model_is_loaded(tmp_path):
    red = demo_video(9)[0]
    for k in range(6): save_mp4(tmp_path / f"{k}.mp4", red, fps=6)
    rows = [(f"{k}.mp4", "one red ball" if k % 2 else "") for k in range(8)]
    with open(tmp_path / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *rows])
    with pytest.raises(ValueError) as refused: run(tmp_path / "runs", data=str(tmp_path))
    error = str(refused.value)
    assert "at most 5.0% of the records may be bad, and 5 of 8 are so far (2 missing" in error
    assert "0.mp4 (clips.csv, row 1): no caption" in error
    records = read_clips(tmp_path)
    ledger = Ledger(tmp_path / "runs" / "survey.parquet", records)
    assert ledger.counts() == {"missing": 2, "no caption": 3}
    assert not (tmp_path / "runs" / "clips").exists()
