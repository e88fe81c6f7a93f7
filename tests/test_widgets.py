"""The explorer with its threads and without a browser: late results, cancelled learning, memory,
two at once. Browser tests are in test_explorer.py."""
import asyncio
import gc
import json
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch

from transporter_nb.world.contrasts import parse_contrast
from transporter_nb.explain.transporter import Transporter
from transporter_nb.app.screen import Worker
from transporter_nb.app.widgets import Explorer
from transporter_nb.world.words import EXAMPLE, caption

RED = caption(EXAMPLE)
PATIENCE = 240 # Seconds until a test gives up; no test waits that long, however busy the machine


@pytest.fixture(scope="module")
def phi4(): return Transporter.load("phi4")


def settle(explorer:Explorer):
    "Wait until no worker of an explorer has anything to do"
    # twice: what one brings may be work for another
    for worker in 2 * (explorer.maker, explorer.student, explorer.desk):
        assert worker.join(PATIENCE)


def wait_until(holds, what:str):
    "Until a condition holds"
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(.01)


def state(explorer:Explorer) -> str:
    return explorer.out.status.value.split('data-state="')[1].split('"')[0]


@pytest.fixture
def explorer(phi4, tmp_path, monkeypatch):
    # beside the five of the filmstrip; that all stops are made is one test's matter
    monkeypatch.setattr("transporter_nb.app.clips.stops", lambda step: [0., 1.5])
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
    assert f'data-strengths="{slider.value:g}"' in explorer.out.videos.value and state(
        explorer
    ) == "ready"
    assert explorer.request.seed == 5 and explorer.grid.request.seed == 5


def test_what_comes_late_is_dropped(explorer):
    "A grid that arrives after the reader has gone on must not replace what they see"
    gate, prepare = threading.Event(), explorer.prepare
    def slow(l2v, request, row):
        if request.seed == 8: gate.wait(PATIENCE)
        return prepare(l2v, request, row)
    explorer.prepare = slow
    explorer.set.seed.value = 8
    explorer.set.seed.value = 9
    gate.set()
    settle(explorer)
    assert explorer.grid.request.seed == 9 and "-p seed 9" in explorer.out.recipe.value
    shown = []
    for turn in (explorer.turn - 1, explorer.turn, None): explorer.arrive(turn, shown.append, turn)
    assert shown == [explorer.turn, None] # of the turn, or wanted whatever comes between


def test_a_slider_moved_while_another_vlm_loads(explorer, monkeypatch):
    "What was on screen stays until the other VLM is there, and then it is the other that answers"
    gate, explorer.own = threading.Event(), None
    def slow(name, *_):
        gate.wait(PATIENCE)
        return Transporter.load(name)
    monkeypatch.setattr("transporter_nb.app.page.load_transporter", slow)
    explorer.loaded.clear()
    explorer.set.vlm.options = ["phi4", "gemma3"]
    explorer.set.vlm.value = "gemma3"
    explorer.sliders["red -> blue"].value = .5
    explorer.set.seed.value = 3
    explorer.add()
    explorer.save()
    explorer.open_word("red")
    gate.set()
    settle(explorer)
    assert (
        explorer.l2v.vlm.name == "gemma3" and state(explorer) == "ready"
        and "-p vlm gemma3" in explorer.out.recipe.value
        and "-p seed 3" in explorer.out.recipe.value
    )


def test_another_concept_under_the_same_name_makes_other_clips(explorer, phi4):
    kept, before = phi4.bank["red -> blue"], explorer.out.videos.value
    try:
        phi4.bank["red -> blue"] = replace(kept, vectors=torch.zeros_like(kept.vectors))
        explorer.set.seed.value = 1
        settle(explorer)
        explorer.set.seed.value = 0
        settle(explorer)
        base, steered = explorer.grid[0.,], explorer.grid[1.,]
        assert torch.equal(base.video, steered.video) or (
            base.video - steered.video
        ).abs().max() < 1e-3
        explorer.certify()
        settle(explorer)
        assert "does not follow" in explorer.out.certificate.value
    finally: phi4.bank["red -> blue"] = kept


def test_one_word_becomes_one_other_word(explorer, phi4, monkeypatch):
    "Whatever the order: while one change of a word is learned, another is asked for"
    gate = threading.Event()
    def learn(l2v, change, text, progress):
        gate.wait(PATIENCE)
        l2v.bank[change] = replace(l2v.bank["red -> blue"], pair=parse_contrast(change))
        return l2v.bank[change]
    monkeypatch.setattr("transporter_nb.app.widgets.learn_apart", learn)
    explorer.set.word.value = "stone"
    explorer.set.into.value = "snowy"
    explorer.add()
    explorer.set.into.value = "leafy"
    explorer.add()
    assert "a word becomes one other word" in explorer.out.status.value and list(
        explorer.sliders
    ) == ["red -> blue"]
    explorer.set.into.value = "snowy"
    explorer.add()
    assert "is being learned" in explorer.out.status.value
    gate.set()
    settle(explorer)
    assert list(explorer.sliders) == ["red -> blue", "stone -> snowy"] and state(
        explorer
    ) == "ready"
    explorer.drop("stone -> snowy")
    explorer.set.caption.value = RED.replace("stone", "sandy")
    settle(explorer)
    assert "stone -> snowy" in phi4.bank
    del phi4.bank["stone -> snowy"]


def test_a_save_is_of_what_is_on_screen(explorer, tmp_path):
    gate, prepare = threading.Event(), explorer.prepare
    def slow(l2v, request, row):
        gate.wait(PATIENCE)
        return prepare(l2v, request, row)
    explorer.prepare = slow
    explorer.set.seed.value = 5
    explorer.save()
    explorer.certify()
    explorer.save() # while the clips of seed 5 are made, seed 0 is on screen
    gate.set()
    settle(explorer)
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["settings"]["seed"] == 0 and len(
        list(tmp_path.glob("*.json"))
    ) == 1
    explorer.save()
    settle(explorer)
    assert len(list(tmp_path.glob("*.json"))) == 2 # another request, another name


def test_results_come_back_on_the_thread_of_the_loop(phi4, monkeypatch):
    "As in a notebook, where widgets belong to the thread that runs the event loop"
    monkeypatch.setattr("transporter_nb.app.clips.stops", lambda step: [0., 1.5])
    seen = set()
    async def main():
        explorer = Explorer(l2v=phi4)
        show = explorer.show
        explorer.show = lambda: (seen.add(threading.get_ident()), show())
        explorer.set.seed.value = 2 # while it loads: that wish counts, too
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            await asyncio.sleep(.05)
            shown = explorer.shown and explorer.shown[0].request.seed == 2
            if state(explorer) == "ready" and shown and explorer.maker.thread is None:
                break
        explorer.close()
        return state(explorer)
    assert asyncio.run(main()) == "ready" and seen == {threading.get_ident()}


def test_a_closed_explorer_lets_go(phi4):
    explorer = Explorer(l2v=phi4)
    explorer.close()
    settle(explorer)
    assert not explorer.grids and explorer.grid is None and not explorer.queue


def test_a_closed_explorer_ends_a_certificate_at_its_next_step(explorer):
    "Not after all its clips"
    gate, steps = threading.Event(), []
    generator = explorer.l2v.generator
    velocity = generator.velocity
    def slow(*args):
        steps.append(len(args[0]))
        gate.wait(PATIENCE)
        return velocity(*args)
    generator.velocity = slow
    try:
        explorer.certify()
        wait_until(lambda: steps, "no certificate is made")
        explorer.close()
        gate.set()
        assert explorer.desk.join(600)
        assert len(steps) == 1, f"{len(steps)} steps, one was running"
    finally: del generator.velocity


def test_learning_can_be_cancelled_and_begun_again(explorer, phi4):
    before = list(phi4.bank)
    explorer.set.word.value = "stone"
    explorer.set.into.value = "snowy"
    explorer.add()
    assert explorer.learns == "stone -> snowy" and explorer.out.learning.layout.display == ""
    wait_until(lambda: explorer.out.progress.value > 0, "nothing is learned")
    explorer.sliders["red -> blue"].value = .25 # a clip that is there: no waiting for the learner
    assert 'data-strengths="0.25"' in explorer.out.videos.value
    bar = explorer.out.progress
    assert explorer.learns == "stone -> snowy" and bar.value < bar.max # it has not ended meanwhile
    explorer.add()
    assert not explorer.queue # the same wish twice is one wish
    explorer.cancel()
    settle(explorer)
    assert (
        list(phi4.bank) == before and explorer.learns is None
        and "cancelled" in explorer.out.status.value
        and explorer.out.learning.layout.display == "none"
    )
    explorer.add()
    assert explorer.learns == "stone -> snowy"
    explorer.cancel()
    settle(explorer)
    assert list(phi4.bank) == before


def test_an_error_is_told_and_nothing_stops(explorer, monkeypatch):
    monkeypatch.setattr(
        explorer, "prepare", lambda *_: (_ for _ in ()).throw(RuntimeError("<b>no</b> memory")),
    )
    explorer.set.seed.value = 3
    settle(explorer)
    assert state(
        explorer
    ) == "error" and "&lt;b&gt;no&lt;/b&gt; memory" in explorer.out.status.value
    monkeypatch.undo()
    explorer.set.seed.value = 4
    settle(explorer)
    assert state(explorer) == "ready"


def test_a_folder_that_cannot_be_written_is_told(explorer, tmp_path):
    (tmp_path / "file").write_text("")
    explorer.folder = tmp_path / "file" / "below"
    explorer.save()
    settle(explorer)
    assert 'data-state="error"' in explorer.out.files.value and state(explorer) == "ready"


def test_a_vlm_changes_under_way(monkeypatch):
    monkeypatch.setattr("transporter_nb.app.clips.stops", lambda step: [0., 1.5])
    explorer = Explorer("phi4", change=["red -> blue"])
    explorer.set.vlm.value = "gemma3"
    explorer.set.vlm.value = "phi4"
    explorer.set.vlm.value = "gemma3"
    settle(explorer)
    assert (
        explorer.l2v.vlm.name == "gemma3" and state(explorer) == "ready"
        and "gemma3" in explorer.out.answers.value and "-p vlm gemma3" in explorer.out.recipe.value
    )
    explorer.close()


def test_two_explorers_share_models_and_nothing_else(phi4, monkeypatch):
    monkeypatch.setattr("transporter_nb.app.clips.stops", lambda step: [0., 1.5])
    one, two = Explorer(l2v=phi4), Explorer(l2v=phi4)
    settle(one)
    settle(two)
    one.sliders["red -> blue"].value = .2
    two.sliders["red -> blue"].value = .8
    settle(one)
    settle(two)
    assert (
        'data-strengths="0.2"' in one.out.videos.value
        and 'data-strengths="0.8"' in two.out.videos.value and one.grid is not two.grid
    )
    one.close()
    two.close()


def test_memory_stays_bounded_over_500_moves(explorer):
    """Moves between clips that are there: what a move leaves behind is in widgets, not in the grid,
    whose bound its notebook tests"""
    draws, slider, process, sizes = torch.Generator().manual_seed(0), explorer.sliders[
        "red -> blue"
    ], psutil.Process(), []
    stops = [row[0] for row in explorer.grid.clips]
    for k in range(500):
        slider.value = stops[torch.randint(len(stops), (), generator=draws).item()]
        if k % 25 == 0:
            gc.collect()
            sizes.append(process.memory_info().rss)
    settle(explorer)
    assert state(explorer) == "ready" and len(explorer.grid) == 6 and len(explorer.grids) == 1
    # bytes; a page that kept what it showed would grow by 400 x .08 MB
    assert sizes[-1] - sizes[4] < 12 * 2**20


def test_a_forgotten_worker_has_no_thread():
    worker, ran = Worker(), []
    for k in range(50): worker.ask(lambda: ran.append(1))
    assert worker.join(10) and worker.thread is None and ran
