"""The explorer with its threads and without a browser: late results, cancelled learning, memory, two at once. Browser tests are in test_explorer.py."""
import gc
import threading
import time

import psutil
import pytest
import torch

from transporter_nb.l2v import Transporter
from transporter_nb.widgets import Explorer, Worker
from transporter_nb.world import EXAMPLE, caption

RED = caption(EXAMPLE)


@pytest.fixture(scope="module")
def phi4(): return Transporter.load("phi4")


def settle(explorer:Explorer, seconds:int=60):
    "Wait until no worker of an explorer has anything to do"
    for worker in (explorer.maker, explorer.student, explorer.desk): assert worker.join(seconds)


def state(explorer:Explorer) -> str: return explorer.out.status.value.split('data-state="')[1].split('"')[0]


@pytest.fixture
def explorer(phi4, tmp_path, monkeypatch):
    monkeypatch.setattr("transporter_nb.widgets.stops", lambda step: [0., 1.5]) # beside the five of the filmstrip; that all stops are made is one test's matter
    made = Explorer(l2v=phi4, folder=tmp_path)
    settle(made)
    yield made
    made.close()
    settle(made)


def test_everything_ahead_is_made(phi4):
    explorer = Explorer(l2v=phi4)
    settle(explorer)
    assert state(explorer) == "ready" and len(explorer.grid) == 31 # all stops of one slider
    assert "being made" not in explorer.out.strip.value
    explorer.close()


def test_the_last_of_many_moves_is_shown(explorer):
    explorer.set.seed.value = 5
    slider = explorer.sliders["red -> blue"]
    for k in range(20): slider.value = (k * 7 % 31) * .05 # a hand that shakes
    settle(explorer)
    assert f'data-strengths="{slider.value:g}"' in explorer.out.videos.value and state(explorer) == "ready"
    assert explorer.request.seed == 5 and explorer.grid.request.seed == 5


def test_what_comes_late_is_dropped(explorer):
    "A grid that arrives after the reader has gone on must not replace what they see"
    gate, prepare = threading.Event(), explorer.prepare
    def slow(l2v, request, row):
        if request.seed == 8: gate.wait(20)
        return prepare(l2v, request, row)
    explorer.prepare = slow
    explorer.set.seed.value = 8
    explorer.set.seed.value = 9
    gate.set(); settle(explorer)
    assert explorer.grid.request.seed == 9 and "-p seed 9" in explorer.out.recipe.value


def test_learning_can_be_cancelled_and_begun_again(explorer, phi4):
    before = list(phi4.bank)
    explorer.set.word.value = "stone"; explorer.set.into.value = "snowy"; explorer.add()
    assert explorer.learns == "stone -> snowy" and explorer.out.learning.layout.display == ""
    until = time.monotonic() + 20
    while explorer.out.progress.value == 0 and time.monotonic() < until: time.sleep(.02)
    assert explorer.out.progress.value > 0
    start = time.monotonic(); explorer.sliders["red -> blue"].value = .25 # a clip that is there: no waiting for the learner
    assert 'data-strengths="0.25"' in explorer.out.videos.value and time.monotonic() - start < 5
    explorer.add(); assert not explorer.queue # the same wish twice is one wish
    explorer.cancel(); settle(explorer)
    assert list(phi4.bank) == before and explorer.learns is None and "cancelled" in explorer.out.status.value and explorer.out.learning.layout.display == "none"
    explorer.add(); assert explorer.learns == "stone -> snowy"
    explorer.cancel(); settle(explorer); assert list(phi4.bank) == before


def test_an_error_is_told_and_nothing_stops(explorer, monkeypatch):
    monkeypatch.setattr(explorer, "prepare", lambda *_: (_ for _ in ()).throw(RuntimeError("<b>no</b> memory")))
    explorer.set.seed.value = 3; settle(explorer)
    assert state(explorer) == "error" and "&lt;b&gt;no&lt;/b&gt; memory" in explorer.out.status.value
    monkeypatch.undo(); explorer.set.seed.value = 4; settle(explorer)
    assert state(explorer) == "ready"


def test_a_folder_that_cannot_be_written_is_told(explorer, tmp_path):
    (tmp_path / "file").write_text("")
    explorer.folder = tmp_path / "file" / "below"
    explorer.save(); settle(explorer)
    assert 'data-state="error"' in explorer.out.files.value and state(explorer) == "ready"


def test_a_vlm_changes_under_way(monkeypatch):
    monkeypatch.setattr("transporter_nb.widgets.stops", lambda step: [0., 1.5])
    explorer = Explorer("phi4", change=["red -> blue"])
    explorer.set.vlm.value = "gemma3"; explorer.set.vlm.value = "phi4"; explorer.set.vlm.value = "gemma3"
    settle(explorer, 120)
    assert explorer.l2v.vlm.name == "gemma3" and state(explorer) == "ready" and "gemma3" in explorer.out.answers.value and "-p vlm gemma3" in explorer.out.recipe.value
    explorer.close()


def test_two_explorers_share_models_and_nothing_else(phi4, monkeypatch):
    monkeypatch.setattr("transporter_nb.widgets.stops", lambda step: [0., 1.5])
    one, two = Explorer(l2v=phi4), Explorer(l2v=phi4)
    settle(one); settle(two)
    one.sliders["red -> blue"].value = .2; two.sliders["red -> blue"].value = .8
    settle(one); settle(two)
    assert 'data-strengths="0.2"' in one.out.videos.value and 'data-strengths="0.8"' in two.out.videos.value and one.grid is not two.grid
    one.close(); two.close()


def test_memory_stays_bounded_over_500_moves(explorer):
    "Moves between clips that are there: what a move leaves behind is in widgets, not in the grid, whose bound its notebook tests"
    draws, slider, process, sizes = torch.Generator().manual_seed(0), explorer.sliders["red -> blue"], psutil.Process(), []
    stops = [row[0] for row in explorer.grid.clips]
    for k in range(500):
        slider.value = stops[torch.randint(len(stops), (), generator=draws).item()]
        if k % 25 == 0: gc.collect(); sizes.append(process.memory_info().rss)
    settle(explorer)
    assert state(explorer) == "ready" and len(explorer.grid) == 6 and len(explorer.grids) == 1
    assert sizes[-1] - sizes[4] < 32 * 2**20 # bytes; a page that kept what it showed would grow by 400 x .15 MB


def test_a_forgotten_worker_has_no_thread():
    worker, ran = Worker(), []
    for k in range(50): worker.ask(lambda: ran.append(1))
    assert worker.join(10) and worker.thread is None and ran
