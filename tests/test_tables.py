"""Rows of a table survive a killed process, altered entries are refused, pages hold their rows"""
import json
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from transporter_nb.evaluate import typesetting
from transporter_nb.evaluate.figures import cut_texts
from transporter_nb.evaluate.rows import RowCache, compare_rows
from transporter_nb.evaluate.tables import Absent, Column, Row, Table, as_cell
from transporter_nb.evaluate.typesetting import Typography, save_table


class Estimate(NamedTuple):
    value: float
    low: float
    high: float
    n: int


SCRIPT = """
import sys, time
from pathlib import Path
from transporter_nb.evaluate.rows import RowCache
folder, stop = Path(sys.argv[1]), int(sys.argv[2])
cache = RowCache(folder / "cache")
for k in range(4):
    def compute():
        with open(folder / "calls", "a") as file: file.write(f"{k}\\n")
        if k == stop:
            (folder / "reached").touch()
            time.sleep(600)
        return {"row": k, "square": float(k * k)}
    assert cache.row(f"row {k}", {"seed": 3, "k": k}, compute) == {"row": k, "square": float(k * k)}
print(len(cache.summary()["read"]), len(cache.summary()["computed"]))
"""


def test_a_killed_table_loses_no_row_and_repeats_none(tmp_path, root):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    settings = {
        "cwd": root, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True,
        "stdout": subprocess.PIPE,
    }
    process = subprocess.Popen([*command, "2"], **settings)
    patience = time.monotonic() + 600
    while not (tmp_path / "reached").exists():
        waiting = process.poll() is None and time.monotonic() < patience
        assert waiting, "the table never came to its third row"
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and (tmp_path / "calls").read_text().split() == [
        "0", "1", "2",
    ]
    assert len(list((tmp_path / "cache").glob("*.json"))) == 2
    for cut in (tmp_path / "cache").glob("*.json"):  # as if writing had been cut as well
        cut.with_name(f".{cut.stem}.77.part.json").write_bytes(cut.read_bytes()[:99])
    done = subprocess.run([*command, "-1"], check=True, **settings)
    assert done.stdout.split() == ["2", "2"] and (tmp_path / "calls").read_text().split() == [
        "0", "1", "2", "2", "3",
    ]


def test_a_write_cut_short_leaves_no_entry(tmp_path, monkeypatch):
    cache, calls = RowCache(tmp_path), []
    def compute():
        calls.append(1)
        return 1
    with monkeypatch.context() as patched:
        patched.setattr(
            os, "replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")),
        )
        with pytest.raises(OSError, match="No space"):
            cache.row("a", {}, compute)
    assert list(tmp_path.iterdir()) == []
    assert [cache.row("a", {}, compute) for _ in range(2)] == [1, 1] and len(calls) == 2


def test_a_row_that_fails_is_not_kept(tmp_path):
    cache = RowCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.row("a", {}, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert list(tmp_path.iterdir()) == [] and cache.summary()["computed"] == []


def never():
    raise AssertionError("computed in silence")


def videos():
    return {
        "videos": torch.arange(2 * 3 * 3 * 2 * 4).reshape(2, 3, 3, 2, 4).to(torch.uint8),
        "scores": torch.tensor([.1, .2, .4], dtype=torch.float64),
    }, {"caption": "a red circle"}


def test_every_flipped_byte_of_clips_is_refused_or_harmless(tmp_path):
    cache = RowCache(tmp_path)
    expected = cache.tensors("ours", {"seed": 2}, videos)
    path = cache.path("ours", {"seed": 2}, "safetensors")
    whole, refused = path.read_bytes(), 0
    for k in range(len(whole)):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 4]) + whole[k + 1:])
        try:
            found = cache.tensors("ours", {"seed": 2}, never)
        except ValueError as error:
            refused += 1
            assert "Delete" in str(error) and "fresh=True" in str(error)
        else:  # a byte of the header that says nothing, such as the word "format"
            assert found.values == expected.values and all(
                torch.equal(found.tensors[name], value) for name, value in expected.tensors.items()
            )
    assert refused > len(whole) - 24
    path.write_bytes(whole)
    found = cache.tensors("ours", {"seed": 2}, never)
    assert found.tensors["videos"].dtype == torch.uint8
    assert found.tensors["scores"].dtype == torch.float64


@pytest.mark.parametrize("kept", [0, 1, 7, 60, -1])
def test_truncated_entries(tmp_path, kept):
    cache = RowCache(tmp_path)
    cache.row("a", {"n": 3}, lambda: 1.5)
    cache.tensors("a", {"n": 3}, videos)
    for path in list(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:kept])
    for read in (cache.row, cache.tensors):
        with pytest.raises(
            ValueError, match="an entry of the cache must be as it was written.*Delete",
        ):
            read("a", {"n": 3}, never)
    again = RowCache(tmp_path, fresh=["a"])
    assert again.row("a", {"n": 3}, lambda: 2.5) == 2.5 and RowCache(tmp_path).row(
        "a", {"n": 3}, never,
    ) == 2.5


def test_every_value_of_the_configuration_counts(tmp_path):
    cache, first = RowCache(tmp_path), {"seed": 0, "n": 64, "weights": "abc", "rate": .1}
    assert cache.row("a", first, lambda: 0) == 0
    for k, changed in enumerate(
        [{"seed": 1}, {"n": 65}, {"weights": "abd"}, {"rate": .2}, {"more": None}], 1,
    ):
        assert cache.row("a", first | changed, lambda: k) == k
    assert cache.row("a", dict(reversed(first.items())), never) == 0  # order says nothing
    assert len(list(tmp_path.iterdir())) == 6


def test_clips_of_another_configuration(tmp_path):
    cache = RowCache(tmp_path)
    cache.tensors("a", {"seed": 1}, videos)
    cache.path("a", {"seed": 1}, "safetensors").rename(cache.path("a", {"seed": 2}, "safetensors"))
    with pytest.raises(ValueError, match=r"another configuration \(other values of \['seed'\]\)"):
        cache.tensors("a", {"seed": 2}, never)


RACE = """
import sys, time
from pathlib import Path
from transporter_nb.evaluate.rows import RowCache
folder = Path(sys.argv[1])
def compute():
    (folder / sys.argv[2]).touch()
    while not ((folder / "first").exists() and (folder / "second").exists()): time.sleep(.005)
    return {"values": list(range(2000))}
assert RowCache(folder / "cache").row("a", {"seed": 1}, compute)["values"][-1] == 1999
"""


def test_two_processes_at_the_same_row(tmp_path, root):
    both = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), name], cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name in ("first", "second")
    ]
    try:
        assert [process.wait(600) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    assert RowCache(tmp_path / "cache").row("a", {"seed": 1}, never) == {
        "values": list(range(2000))
    } and len(list((tmp_path / "cache").iterdir())) == 1


def large(rows=40, columns=14):
    names = [
        "FVD-mini", "perceptual distance", "target reached", "others kept", "text-video cosine",
        "alignment gain", "smoothness over strength", "seconds a concept", "cos", "l1", "l2", "KL",
        "BLEU-4", "CIDEr",
    ][:columns]
    def cells(k):
        made = {
            name: Estimate(
                (k + 1.37) * 1.9**j / 7, (k + 1.1) * 1.9**j / 7, (k + 1.8) * 1.9**j / 7,
                64 if k % 3 else 8 + j,
            )
            for j, name in enumerate(names)
        }
        return made | {
            names[k % columns]: Absent(f"no model number {k % 5}"), names[(k + 3) % columns]: None,
            names[(k + 5) % columns]: "yes",
        }
    return Table(
        "A large table " * 3,
        [
            Column(
                name, "%" if j % 4 == 0 else "", ("higher", "lower", None)[j % 3],
                "a remark" * (j == 2),
            )
            for j, name in enumerate(names)
        ],
        [
            Row(
                f"method {k}" + " with a name that is rather long" * (k % 4 == 0),
                f"group {k // 10}", cells(k), "slow" * (k == 7), competes=k % 6 != 5,
            )
            for k in range(rows)
        ],
        ["A note that goes on. " * 9],
        {"method 1": {"FVD": 1234.5, "LPIPS": ".12"}, "method 2": {"FVD": 9, "CLIP": None}},
    )


def overlaps(figure):
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    renderer = figure.canvas.get_renderer()
    boxes = np.array([text.get_window_extent(renderer).extents for text in texts])
    # pixels of 110 an inch: a box is higher than its letters
    shrunk = boxes + np.array([.5, 1.5, -.5, -1.5])
    return [
        (texts[a].get_text(), texts[b].get_text())
        for a in range(len(texts))
        for b in range(a)
        if (shrunk[a, :2] < shrunk[b, 2:]).all() and (shrunk[b, :2] < shrunk[a, 2:]).all()
    ]


@pytest.mark.parametrize(
    "style", [Typography(), Typography(intervals="beside"), Typography(intervals="none", name=1.)],
    ids=["plain", "beside", "none"],
)
def test_nothing_overlaps_or_leaves_the_page(style):
    figure = large(13, 9).figure(style)
    figure.canvas.draw()
    assert cut_texts(figure) == [] and overlaps(figure) == []
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 6.5


def test_forty_rows_of_fourteen_columns_fit_a_large_page():
    figure = large().figure(Typography(size=6.5, name=1.4))
    width, height = figure.get_size_inches()
    assert width <= 16.54 and height <= 12.5  # inches: as wide as A3, a little higher
    assert cut_texts(figure) == [] and overlaps(figure) == []


def test_the_overlap_check_can_fail():
    figure = large(4, 3).figure()
    text = next(text for text in figure.findobj(Text) if text.get_text() == "method 1")
    text.set_x(text.get_position()[0] + .3)
    figure.canvas.draw()
    assert overlaps(figure) != []


def test_odd_names_reach_every_form(tmp_path):
    table = Table(
        "cost in $ & <more>", [Column("a, \"b\"\n$x^2$", better="lower")],
        [
            Row("$\\Phi$ and $\\tau = 0.1$, mean", "", {}),
            Row("50 $ a day", "", {"a, \"b\"\n$x^2$": np.float64(.25)}),
        ],
    )
    for path in save_table(table, tmp_path / "odd", {}):
        assert path.stat().st_size > 0
    assert cut_texts(table.figure()) == [] and "&lt;more&gt;" in table.html() and "0.250" in repr(
        table
    )


def test_swapped_rows_change_the_best():
    def best(first, second):
        return Table(
            "t", [Column("x", better="lower")],
            [Row("a", "", {"x": first}), Row("b", "", {"x": second})],
        ).best(Column("x", better="lower"))
    assert best(1., 2.) == {0} and best(2., 1.) == {1} and best(1., 1.) == set() and best(
        1., None,
    ) == set()


def test_a_table_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    table = large(3, 2)
    paths = save_table(table, tmp_path / "t", {"seed": 1})
    before = [path.read_bytes() for path in paths]
    def full(*_, **__):
        raise OSError("No space left on device")
    monkeypatch.setattr(typesetting, "record_text", full)
    with pytest.raises(OSError):
        save_table(table, tmp_path / "t", {"seed": 2})
    assert [path.read_bytes() for path in paths] == before and sorted(tmp_path.iterdir()) == sorted(
        paths
    )
    monkeypatch.undo()
    save_table(table, tmp_path / "t", {"seed": 2})
    # the same table gives the same bytes
    assert json.loads(paths[3].read_text())["seed"] == 2 and [
        path.read_bytes() for path in paths[:3]
    ] == before[:3]


def test_a_cell_from_the_cache_is_the_cell_that_was_measured(tmp_path):
    kept = RowCache(tmp_path).row(
        "a", {},
        lambda: {
            "x": Estimate(12.3, 11., 13.8, 64), "y": Absent("no model"),
            "z": Estimate(float("nan"), float("nan"), float("nan"), 3),
        },
    )
    assert as_cell(kept["x"]) == as_cell(Estimate(12.3, 11., 13.8, 64)) and as_cell(
        kept["y"]
    ) == as_cell(Absent("no model"))
    assert as_cell(kept["z"]).value is None and as_cell(kept["z"]).n == 3


def test_pairing_makes_an_interval_narrower():
    clips, noise = torch.randn(
        2, 80, generator=torch.Generator().manual_seed(5), dtype=torch.float64,
    )
    paired, shuffled = compare_rows(clips + .1 * noise + .1, clips, 3), compare_rows(
        clips.flip(0) + .1 * noise + .1, clips, 3,
    )
    assert paired.low > 0 and paired.share == 1. and (
        paired.high - paired.low
    ) * 4 < shuffled.high - shuffled.low
    assert compare_rows(clips, clips + .1 * noise + .1, 3).value == -paired.value
