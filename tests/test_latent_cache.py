"""The cache of latents under what goes wrong: writers killed at any moment, several at once,
changed bytes, a limit; and its layout, which others read"""
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from transporter_nb.datasets.latents import (
    ClipPart, DamagedFile, LatentCache, LatentName, cache_info, is_whole, latents_key, read_tensors,
    share_pairs, verify_cache,
)

FORK = multiprocessing.get_context("fork")
SIZE = 60_000  # numbers a file: large enough to be killed inside a write


def place(cache, number): return cache.caption_path(f"caption {number}", "weights")


def content(number): return {"x": torch.full((SIZE,), float(number))}


def make(folder, numbers, made=None, limit=None):
    "Make what is missing, as a caching process does"
    cache = LatentCache(folder, limit)
    for wait in (False, True):
        for number in numbers:
            with cache.claim(place(cache, number), wait) as mine:
                if not mine: continue
                cache.write(place(cache, number), content(number))
                if made is not None: made.put(number)


def started(*arguments):
    process = FORK.Process(target=make, args=arguments)
    process.start()
    return process


def test_a_writer_killed_at_random_points_leaves_no_half_file(tmp_path):
    draw, numbers, interrupted = random.Random(0), range(400), 0
    before = {}
    for _ in range(12):
        process = started(tmp_path, numbers)
        time.sleep(draw.uniform(.01, .15))
        interrupted += process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert verify_cache(tmp_path) == {}
        now = {file.path.name: file.path.stat().st_mtime_ns
               for file in LatentCache(tmp_path).files()}
        assert before.items() <= now.items()  # nothing that was there is made again
        before = now
    assert interrupted >= 3 and before
    make(tmp_path, numbers)
    cache = LatentCache(tmp_path)
    for number in numbers: assert torch.equal(cache.read(place(cache, number))["x"],
                                              content(number)["x"])
    assert cache_info(tmp_path).files["captions"] == len(numbers)


def test_a_part_of_a_killed_writer_is_removed_once_it_is_old(tmp_path):
    make(tmp_path, [0])
    part = tmp_path / ".parts" / "12345678-1-elsewhere.safetensors"
    part.write_bytes(b"half")
    make(tmp_path, [1])
    assert part.exists()  # it may be written at this moment
    os.utime(part, (0, 0))
    make(tmp_path, [2])
    assert not part.exists() and cache_info(tmp_path).files["captions"] == 3


def test_two_processes_at_once_make_each_file_once(tmp_path):
    made, numbers = FORK.Queue(), list(range(40))
    processes = [started(tmp_path, order, made) for order in (numbers, numbers[::-1])]
    counts = Counter(made.get(timeout=60) for _ in numbers)
    for process in processes: process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert counts == Counter(numbers) and made.empty()
    assert verify_cache(tmp_path) == {}


def test_two_writers_of_the_same_file_leave_a_whole_one(tmp_path):
    def write():
        cache = LatentCache(tmp_path)
        for _ in range(30): cache.write(place(cache, 0), content(0))
    processes = [FORK.Process(target=write) for _ in range(2)]
    for process in processes: process.start()
    cache, reads = LatentCache(tmp_path), 0
    while any(process.is_alive() for process in processes):
        found = cache.read(place(cache, 0))  # checked: half a file would raise
        reads += found is not None
    for process in processes: process.join()
    assert reads and [process.exitcode for process in processes] == [0, 0]
    assert list((tmp_path / ".parts").iterdir()) == []


def test_the_claim_of_a_killed_process_is_free(tmp_path):
    def hold():
        cache = LatentCache(tmp_path)
        with cache.claim(place(cache, 0)) as mine:
            assert mine
            (tmp_path / "holds").touch()
            time.sleep(60)
    process = FORK.Process(target=hold)
    process.start()
    while not (tmp_path / "holds").exists(): time.sleep(.005)
    cache = LatentCache(tmp_path)
    with cache.claim(place(cache, 0)) as mine: assert mine is None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with cache.claim(place(cache, 0)) as mine: assert mine is True


def test_what_a_living_process_uses_is_not_evicted_and_a_dead_one_uses_nothing(tmp_path):
    make(tmp_path, range(4))
    size = place(LatentCache(tmp_path), 0).stat().st_size
    def use():
        cache = LatentCache(tmp_path)
        with cache.use() as keep:
            assert not keep(place(cache, 0), place(cache, 1))
            (tmp_path / "uses").touch()
            time.sleep(60)
    process = FORK.Process(target=use)
    process.start()
    while not (tmp_path / "uses").exists(): time.sleep(.005)
    assert cache_info(tmp_path).in_use == 2
    make(tmp_path, range(4, 9), limit=4 * size)
    cache = LatentCache(tmp_path)
    there = [number for number in range(9) if place(cache, number).exists()]
    assert {0, 1, 8} <= set(there) and len(there) <= 4
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert cache_info(tmp_path).in_use == 0
    make(tmp_path, range(9, 13), limit=4 * size)
    assert not place(cache, 0).exists() and not place(cache, 1).exists()


def test_the_file_unused_for_longest_goes_first(tmp_path):
    make(tmp_path, range(3))
    cache = LatentCache(tmp_path)
    for number, used in enumerate((300, 100, 200)): os.utime(place(cache, number), (used, used))
    changed = place(cache, 0).stat().st_mtime_ns
    assert cache.read(place(cache, 1))  # a use sets the time of use only
    assert place(cache, 1).stat().st_atime > 300 and place(cache, 0).stat().st_mtime_ns == changed
    size = place(cache, 0).stat().st_size
    make(tmp_path, [3], limit=int(3.5 * size))
    assert [n for n in range(4) if place(cache, n).exists()] == [0, 1, 3]


def test_a_changed_setting_deletes_nothing(tmp_path):
    cache, latents = LatentCache(tmp_path), torch.zeros(2, 3, 5, 7)
    part = ClipPart("1f", 0., None, 9, 40, 56)
    paths = [cache.latents_path(part, weights, "float32") for weights in ("ae", "af")]
    for path in paths: cache.write(path, {latents_key(latents): latents})
    assert len({*paths}) == 2 and all(map(is_whole, paths))


def test_every_changed_byte_is_found(tmp_path):
    cache = LatentCache(tmp_path)
    path = place(cache, 0)
    cache.write(path, {"x": torch.arange(5.), "y": torch.ones(2)}, {"caption": "one ball"})
    whole = path.read_bytes()
    for where in range(len(whole)):
        path.write_bytes(whole[:where] + bytes([whole[where] ^ 4]) + whole[where + 1:])
        with pytest.raises(DamagedFile, match="is damaged"): read_tensors(path)
    assert list(verify_cache(tmp_path)) == [path]


def test_the_layout_is_that_of_musubi_tuner(tmp_path):
    cache = LatentCache(tmp_path / "cache")
    latents = torch.randn(16, 3, 6, 10, generator=torch.manual_seed(0)).bfloat16()
    part = ClipPart("1f", 1.5, 4., 9, 48, 80)
    path = cache.latents_path(part, "ae", "bfloat16")
    caption = cache.caption_path("one ball", "t5")
    key = path.name[:32]
    assert path.name == f"{key}_00024-009_0080x0048_wan.safetensors"  # width before height
    assert path.parent == cache.folder and int(key, 16) >= 0
    cache.write(path, {latents_key(latents): latents})
    cache.write(caption, {"varlen_t5_bfloat16": torch.ones(4, 8).bfloat16()})
    with safe_open(str(path), "pt") as file:
        assert list(file.keys()) == ["latents_3x6x10_bfloat16"]
        assert file.get_tensor("latents_3x6x10_bfloat16").shape == (16, 3, 6, 10)
        assert file.metadata()["architecture"] == "wan"
        assert file.metadata()["format_version"] == "1.0.1"
    # as its trainer finds clips: `*_wan.safetensors`, split from the right
    found = list(cache.folder.glob("*_wan.safetensors"))
    assert found == [path]
    *stem, frames, size, _ = path.name.split("_")
    assert (stem, frames, size) == ([key], "00024-009", "0080x0048")
    share_pairs([(path, caption)], tmp_path / "theirs")
    clip, = (tmp_path / "theirs").glob("*_wan.safetensors")
    stem = "_".join(clip.name.split("_")[:-3])
    assert (tmp_path / "theirs" / f"{stem}_wan_te.safetensors").exists()
    assert LatentName.parse(clip.name)[1:] == (24, 9, 80, 48)


def test_the_command_names_a_damaged_file(tmp_path):
    make(tmp_path, range(2))
    path = place(LatentCache(tmp_path), 1)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    def command(*words):
        words = [sys.executable, "-m", "transporter_nb.datasets.latents", *words, str(tmp_path)]
        return subprocess.run(words, capture_output=True, text=True,
                              cwd=Path(__file__).resolve().parent.parent)
    info, verify = command("info"), command("verify")
    assert info.returncode == 0 and "2 captions" in info.stdout, info.stderr
    assert verify.returncode == 1 and path.name in verify.stdout
    assert path.exists()  # only on request
    assert command("verify", "--remove").returncode == 0 and not path.exists()
