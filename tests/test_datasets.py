"""Data sets: every planted fault is named, no good clip is lost, an interrupted ledger goes on, a
worker that dies costs one clip, and nothing leads out of the data's folder"""
import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from transporter_nb.datasets import records as records_module
from transporter_nb.datasets.decoding import ClipDecoder, TakeClip, decode_clips, outcomes
from transporter_nb.datasets.ledger import Ledger
from transporter_nb.datasets.published import (
    read_ego4d, read_ego4d_cuts, read_lavib, read_vatex, read_vidchapters,
)
from transporter_nb.datasets.records import ClipRecord, ClipRecords, read_member
from transporter_nb.datasets.tables import read_clips, shard_records
from transporter_nb.world.video import demo_video, save_mp4

ROOT = Path(__file__).resolve().parent.parent


def benchmark():
    """`benchmarks/data.py`, importable by the workers as well"""
    if "data_benchmark" not in sys.modules:
        path = ROOT / "benchmarks" / "data.py"
        spec = importlib.util.spec_from_file_location("data", path)
        sys.modules["data"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if str(path.parent) not in sys.path: sys.path.append(str(path.parent))
    return sys.modules["data"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    data, folder = benchmark(), tmp_path_factory.mktemp("planted")
    records, kinds = data.plant(folder / "data", 150, .3)
    seconds, ledger, used = data.run(records, folder / "ledger.parquet", 2, 5., allowed=.5)
    return data, records, kinds, ledger, used


def test_every_planted_fault_is_in_the_ledger_with_its_kind_and_no_good_clip_is_lost(planted):
    data, records, kinds, ledger, used = planted
    assert set(filter(None, kinds)) == set(data.KINDS)  # all twelve
    assert data.wrong_ends(ledger, kinds, set(used)) == []
    assert used == [k for k, kind in enumerate(kinds) if not kind]  # in order
    assert sum(ledger.counts().values()) == len(records)


def test_the_ledger_is_a_parquet_file_that_others_read(planted):
    from pyarrow import parquet
    _, records, kinds, ledger, _ = planted
    table = parquet.read_table(ledger.path).to_pylist()
    assert [row["id"] for row in table] == [record.id for record in records]
    assert {row["verdict"] for row, kind in zip(table, kinds) if not kind} == {"used"}
    assert all(row["reason"] for row, kind in zip(table, kinds) if kind)
    assert not list(ledger.path.parent.glob(".*"))  # no journal, no part of a file


def test_a_wrong_end_would_be_noticed(planted):
    data, _, kinds, ledger, used = planted
    swapped = ["missing" if kind == "zero length" else kind for kind in kinds]
    assert data.wrong_ends(ledger, swapped, set(used))
    assert data.wrong_ends(ledger, kinds, set(used[1:]))


def test_above_the_threshold_a_run_fails_with_counts_and_five_examples(planted, tmp_path):
    _, records, _, ledger, _ = planted
    copy = tmp_path / "ledger.parquet"
    copy.write_bytes(ledger.path.read_bytes())
    with pytest.raises(ValueError, match="at most 5.0% of the records may be bad") as refused:
        Ledger(copy, records).check()
    words = str(refused.value)
    assert f"({', '.join(f'{n:,} {verdict}' for verdict, n in ledger.counts().items())})" in words
    assert len(re.findall(r"\w/c\d{6}\S* \(", words)) == 5  # ids with their sources


# ---- interruptions

SCRIPT = """
import sys, time
from pathlib import Path
from transporter_nb.datasets.decoding import TakeClip, decode_clips
from transporter_nb.datasets.ledger import Ledger
from transporter_nb.datasets.tables import read_clips
folder = Path(sys.argv[1])
ledger = Ledger(folder / "runs" / "ledger.parquet", read_clips(folder), allowed=.5)
for clip in decode_clips(ledger, TakeClip(5, 16), 1):
    print(clip.record.id, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def clips_in(folder, n=6):
    """Good clips with texts, and one that was cut"""
    for k in range(n):
        save_mp4(folder / f"{k}.mp4", demo_video(5 + k)[0], fps=5)
        (folder / f"{k}.txt").write_text(f"a disc, {k}")
    whole = (folder / "1.mp4").read_bytes()
    (folder / "1.mp4").write_bytes(whole[:len(whole) // 2])
    return folder


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    clips_in(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    killed = subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert killed.stdout.readline() == "0.mp4\n"
    killed.kill()
    killed.wait()
    killed.stdout.close()
    done = subprocess.run([*command, "0"], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0.mp4", "2.mp4", "3.mp4", "4.mp4", "5.mp4"]
    ledger = Ledger(tmp_path / "runs" / "ledger.parquet", read_clips(tmp_path))
    assert ledger.counts() == {"used": 5, "unreadable": 1}
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["ledger.parquet"]


def test_a_worker_that_is_killed_costs_nothing(tmp_path):
    records = read_clips(clips_in(tmp_path))
    with ClipDecoder(TakeClip(5, 16), workers=1, ahead=1) as decoder:
        found = []
        for number, end in decoder.run(enumerate(records)):
            found.append(end.verdict)
            os.kill(decoder.workers[0].process.pid, signal.SIGKILL)
    assert found == ["used", "unreadable", *["used"] * 4]


def test_workers_end_with_the_decoder(tmp_path):
    records = read_clips(clips_in(tmp_path))
    stream = outcomes(enumerate(records), TakeClip(5, 16), 2)
    next(stream)
    assert multiprocessing.active_children()
    stream.close()
    assert not multiprocessing.active_children()


def test_workers_give_the_frames_of_this_process(tmp_path):
    records, take = read_clips(clips_in(tmp_path)), TakeClip(4, (24, 32), rate=5., fit="pad")
    ledgers = [Ledger(tmp_path / f"{n}.parquet", records, allowed=.5) for n in range(2)]
    here, there = (list(decode_clips(ledger, take, 2 * n)) for n, ledger in enumerate(ledgers))
    assert [clip[:3] for clip in here] == [clip[:3] for clip in there]
    assert all(torch.equal(one.video, two.video) for one, two in zip(here, there))


class Broken:
    """Cannot be unpickled, as a class whose library is absent in the worker"""
    def __call__(self, record): return None
    def __reduce__(self): return os.strerror, ("no number",)


def test_a_worker_that_cannot_start_ends_the_run_and_is_no_fault_of_a_clip(tmp_path):
    records = read_clips(clips_in(tmp_path))
    with pytest.raises(RuntimeError, match="ended before its first clip"):
        list(outcomes(enumerate(records), Broken(), 1))


# ---- safety

EVIL = "../../evil"


@pytest.mark.parametrize("reader, content", [
    (read_vatex, [{"videoID": EVIL, "enCap": ["a"]}]),
    (read_ego4d, {EVIL: {}}),
    (read_ego4d_cuts, [[EVIL, 0, 1, "a"]]),
    (read_vidchapters, {EVIL: {"duration": 1, "timestamps": [[0, 1]], "sentences": ["a"]}}),
], ids=["vatex", "ego4d", "cuts", "vidchapters"])
@pytest.mark.parametrize("name", [EVIL, "/etc/evil"])
def test_ids_never_lead_out_of_the_folder(reader, content, name, tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content).replace(EVIL, name))
    with pytest.raises(ValueError, match="files of a data set lie below"): reader(path, tmp_path)


@pytest.mark.parametrize("reader", [read_vatex, read_lavib, read_ego4d, read_ego4d_cuts,
                                    read_vidchapters], ids=lambda reader: reader.__name__)
def test_pickles_are_refused_by_name_and_by_content(reader, tmp_path):
    for name in ("data.pkl", "data.json", "data.csv"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        with pytest.raises(ValueError, match="a pickle is never loaded"):
            reader(tmp_path / name, tmp_path)
    assert not (tmp_path / "exploded").exists()


class Bomb:
    """Makes a file when it is unpickled"""
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()


def test_an_archive_writes_nothing_and_its_links_lead_nowhere(tmp_path):
    secret, folder = tmp_path / "secret.mp4", tmp_path / "data"
    secret.write_bytes(b"secret")
    folder.mkdir()
    with tarfile.open(folder / "clips.tar", "w") as tar:
        tar.add(secret, "../evil.mp4")
        link = tarfile.TarInfo("link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link)
    records = shard_records(folder)
    assert [record.path.name for record in records] == ["evil.mp4"]
    list(outcomes(enumerate(records), TakeClip(5, 16), 0))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["clips.tar", "data", "secret.mp4"]
    with pytest.raises(FileNotFoundError): read_member(folder / "clips.tar" / "link.mp4")


# ---- columns

def test_records_take_little_memory_and_keep_odd_values():
    odd = [ClipRecord("a", Path("ä/b c.mp4"), float("nan"), None, "a\n\"b\"\t狗", ""),
           ClipRecord("", Path("b"), 0., 2.5, "", "x")]
    for one, two in zip(ClipRecords(odd), odd): assert repr(one) == repr(two)
    many = ClipRecords(ClipRecord(f"clip {k:06d}", Path(f"folder/{k:06d}.mp4"), 0., None,
                                  "one large red ball slides left slowly", f"clips.csv, row {k}")
                       for k in range(20_000))
    assert many.table.nbytes < 150 * len(many)
    assert pickle.loads(pickle.dumps(many[17:19]))[1] == many[18]


def test_without_the_libraries_the_error_names_the_extra(monkeypatch):
    def absent(name): raise ImportError(name)
    monkeypatch.setattr(records_module, "import_module", absent)
    said = r"pyarrow, which is not installed.*transporter_nb\[data\]"
    with pytest.raises(ImportError, match=said): ClipRecords([])
