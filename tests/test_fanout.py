"""Fan-out: refusals, what a failure leaves, the same bits on Ray, killed workers included"""
import json
import os
import signal
from threading import Lock

import pytest
import torch

from transporter_nb.concepts.bank import ConceptBank
from transporter_nb.core import fanout
from transporter_nb.core.fanout import FanOutError, fan_out, values_of
from transporter_nb.evaluate.runs import main, run_notebooks, told
from transporter_nb.explain import many
from transporter_nb.explain.many import explain_many, job_grid

RED = "one large red ball slides left slowly over a stone floor"


@pytest.mark.parametrize(("call", "said"), [
    (lambda: fan_out(abs, [1], engine="raye"), "Did you mean 'ray'"),
    (lambda: fan_out(abs, [1], workers=0), "workers must be a whole number"),
    (lambda: fan_out(abs, [1], threads=True), "threads must be a whole number"),
    (lambda: fan_out(abs, [1], tries=0), "tries >= 1"),
    (lambda: fan_out(abs, [1], gpus=-1.), "gpus >= 0"),
    (lambda: job_grid([], ["red -> blue"]), "captions is a list of one text or more"),
    (lambda: job_grid([RED], "red -> blue"), "changes is a list"),
    (lambda: job_grid([RED], ["green -> blue"]), "1 of 1 do not"),
    (lambda: job_grid([RED], ["green -> blue"], skip=True), "no caption holds"),
    (lambda: run_notebooks(["fig7", "fig77"], ["phi4"]), "Did you mean 'fig7'"),
])
def test_bad_input_is_refused_before_anything_runs(call, said, monkeypatch):
    def never(*_): raise AssertionError("something ran")
    monkeypatch.setattr(fanout, "_run_one", never)
    with pytest.raises(ValueError, match=said): call()


def test_a_failure_stops_nothing_and_is_raised_when_the_values_are_wanted():
    seen = []
    outcomes = fan_out(lambda n: 6 / n, [0, 1, 0, 2], say=seen.append)
    assert [outcome.value for outcome in outcomes] == [None, 6., None, 3.]
    assert seen == outcomes
    with pytest.raises(FanOutError, match="2 of 4 items failed"): values_of(outcomes)


def test_ctrl_c_is_no_failed_item():
    def stop(_): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fan_out(stop, [1])


def test_without_ray_everything_runs_here_and_says_so(monkeypatch):
    monkeypatch.setattr(fanout, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"transporter_nb\[cluster\]"):
        outcomes = fan_out(lambda n: os.getpid(), [1, 2], engine="ray")
    assert values_of(outcomes) == [os.getpid()] * 2


def notebook(path, source):
    cells = [{"cell_type": "code", "metadata": {"tags": tags}, "source": text, "outputs": [],
              "execution_count": None, "id": f"cell{k}"}
             for k, (tags, text) in enumerate(((["parameters"], "vlm = 'phi4'"), ([], source)))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": kernel},
                                "nbformat": 4, "nbformat_minor": 5}))


def test_the_command_ends_with_1_if_a_run_failed_and_runs_the_others(tmp_path, monkeypatch, capsys):
    notebook(tmp_path / "good.ipynb", f"open(r'{tmp_path}/' + vlm, 'w').write(vlm)")
    notebook(tmp_path / "bad.ipynb", "raise KeyError('lost')")
    monkeypatch.setattr("transporter_nb.evaluate.runs.repo_path", lambda *parts: tmp_path)
    assert main(["bad", "good", "--vlms", "phi4"]) == 1
    said = capsys.readouterr().out
    assert "FAILED  bad phi4" in said and "KeyError: 'lost'" in said and "ok      good" in said
    assert (tmp_path / "phi4").read_text() == "phi4"
    with pytest.raises(SystemExit): main(["absent"])
    assert "there is no notebook 'absent'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def two_workers():
    "One Ray for all tests of this file: starting it takes seconds"
    pytest.importorskip("ray")
    with fanout.ray_session(2) as ray: yield ray


def test_ray_gives_the_same_bits_and_survives_a_killed_worker(tmp_path, two_workers):
    def job(seed):
        mark = tmp_path / "died"
        if seed == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        draws = torch.Generator().manual_seed(seed)
        return torch.rand(100_000, generator=draws).sqrt().sum().item()
    def always(seed): os.kill(os.getpid(), signal.SIGKILL)
    there = values_of(fan_out(job, range(6), "ray"))
    lost, = fan_out(always, [1], "ray", tries=2)
    failed = fan_out(lambda n: 1 // n, [0, 1], "ray")
    notebook(tmp_path / "small.ipynb", f"open(r'{tmp_path}/' + vlm, 'w').write(vlm)")
    runs = run_notebooks(["small"], ["phi4", "gemma3"], engine="ray", root=tmp_path)
    assert (tmp_path / "died").exists()
    assert there == values_of(fan_out(job, range(6), threads=1))
    assert lost.value is None and "died in every try" in lost.error
    assert [outcome.value for outcome in failed] == [None, 1]
    assert "ZeroDivisionError" in failed[0].error
    assert [told(outcome)[:2] for outcome in runs] == ["ok", "ok"]
    assert {path.name for path in tmp_path.iterdir() if not path.suffix} >= {"phi4", "gemma3"}


def test_ray_says_what_it_cannot_do_instead_of_waiting(two_workers):
    with pytest.raises(ValueError, match="asks for 3 CPU, and Ray has 2 here"):
        fan_out(abs, [1], "ray", threads=3)
    with pytest.raises(ValueError, match="asks for 1 GPU"): fan_out(abs, [1], "ray", gpus=1)
    outcome, = fan_out(lambda _: Lock(), [1], "ray")
    assert outcome.value is None and outcome.error.startswith("Ray gave no value back")
    assert "pickle" in outcome.error and "died" not in outcome.error


def test_a_grid_has_the_same_bits_on_ray_and_nothing_is_made_twice(tmp_path, two_workers):
    grid = dict(captions=[RED, RED.replace("stone", "sandy")], changes=["red -> blue"],
                strengths=2, steps=2, folder=tmp_path)
    there = values_of(explain_many(engine="ray", **grid))
    written = {path: path.stat().st_mtime_ns for path in there}
    here = values_of(explain_many(threads=1, **grid))
    assert {path: path.stat().st_mtime_ns for path in here} == written
    again = values_of(explain_many(threads=1, **grid | {"folder": tmp_path / "here"}))
    for a, b in zip(there, again):
        clips = [path.with_suffix(".gif").read_bytes() for path in (a, b)]
        assert a.name == b.name and clips[0] == clips[1]
        one, other = (json.loads(path.read_text()) for path in (a, b))
        for row in (one, other): row.pop("run", None)
        assert one == other


def test_a_contrast_that_the_bank_lacks_is_learned_once_and_for_no_job_anew(monkeypatch):
    learned, real = [], ConceptBank.learn
    def learn(self, models, pair, *args, **kwargs):
        learned.append(pair.name)
        return real(self, models, pair, *args, **kwargs)
    monkeypatch.setattr(ConceptBank, "learn", learn)
    options = {"options": "concept_steps=2, concept_seeds=2"}
    made = values_of(explain_many([RED, RED.replace("stone", "sandy")], ["red -> yellow"],
                                  strengths=2, steps=2, load=options))
    assert learned == ["red -> yellow"]
    one, other = (explanation.settings["concepts"][0]["digest"] for explanation in made)
    assert one == other
    assert "red -> yellow" not in many._loaded("phi4", json.dumps(options)).bank
    many._loaded.cache_clear()
