"""Faulty clips among good ones: is each fault named, is no good clip lost, and what does it cost?

    python benchmarks/data.py                 # 10,000 clips, some minutes; writes data_faults.json
    python benchmarks/data.py --install       # the same, into figures/
    python benchmarks/data.py --clips 300 --records 2000 --limit 5   # a try

Tiny clips are written in every form that `datasets` reads, once without faults and once with
`--share` of them faulty, of twelve kinds. A decoder cannot be made to hang or to crash on purpose:
a mark at the end of the file makes the worker sleep for ever, or read from address 0. All other
faults are real files. Both sets are read by the same code in the same process, one after the
other, and the ratio of their times is reported.

Memory is that of a process of its own, which streams `--records` records through ledger and
workers. Their files are a few bytes each and nothing is decoded: frames of zeros are handed out."""
import argparse, csv, ctypes, io, json, re, subprocess, sys, tarfile, tempfile, time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

KINDS = { # kind -> verdict and words of the reason
    "truncated": ("unreadable", "Is the file complete|damaged|not decode"),
    "zero length": ("unreadable", "0 bytes"),
    "audio only": ("unreadable", "moving pictures"),
    "a web page": ("unreadable", "cannot be read as a video"),
    "resource fork": ("unreadable", "resource fork"),
    "hang": ("unreadable", "took longer than"),
    "crash": ("unreadable", "crashed the decoder twice .signal SIGSEGV"),
    "missing": ("missing", "there is no"),
    "too short": ("too short", "2 frames, 5 are needed"),
    "no caption": ("no caption", "none in"),
    "wrong caption file": ("no caption", "none in"),
    "duplicate": ("duplicate", "the same content and caption as"),
}
MARKS = {"hang": b"hang now", "crash": b"crash now"}
FORMATS = ("vatex", "lavib", "ego4d", "vidchapters", "csv", "jsonl", "parquet", "side-cars",
           "shards", "world")
ABSENT = { # what a form cannot have: an absent clip has no record there, or there is no text file
    "world": {"no caption", "wrong caption file", "resource fork", "duplicate"},
    "side-cars": {"missing"}, "shards": {"missing"},
    "vatex": {"wrong caption file", "resource fork"}, "lavib": {"resource fork"},
    "ego4d": {"wrong caption file", "resource fork"},
    "vidchapters": {"wrong caption file", "resource fork"},
    **dict.fromkeys(("csv", "jsonl", "parquet"), {"wrong caption file"}),
}


class Item(NamedTuple):
    "One clip to be written"
    name: str # Stands in the path of its record
    content: bytes|None # None: there is no file
    caption: str
    kind: str # One of `KINDS`, or "" for a good clip


def take(record):
    "As a worker decodes, with the marks of simulated faults"
    from transporter_nb.datasets.decoding import take_clip
    with open(record.path, "rb") as file:
        file.seek(max(0, record.path.stat().st_size - 16))
        end = file.read()
    if end.endswith(MARKS["hang"]): time.sleep(1e6)
    if end.endswith(MARKS["crash"]): ctypes.string_at(0)
    return take_clip(record, 5, 32)


def zeros(record):
    "Frames without decoding"
    import torch
    return torch.zeros(1, 5, 3, 32, 32)


# ---- clips

def boxed(video, words):
    "An mp4 file that ends in a box of its own, which players skip; so its content is its own"
    return video + (8 + len(words)).to_bytes(4, "big") + b"free" + words


@lru_cache(maxsize=1)
def base_clips():
    "A few good clips, one that is too short, and one of sound alone"
    import av, numpy as np
    from transporter_nb.world.video import demo_video, save_mp4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        discs = [clip for frames in range(9, 13) for clip in demo_video(frames, 32, 32)]
        good = [save_mp4(path, clip, fps=6, enlarge=1).read_bytes() for clip in discs]
        short = save_mp4(path, discs[0][:2], fps=6, enlarge=1).read_bytes()
        with av.open(str(path), "w") as container:
            sound = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
        return good, short, path.read_bytes()


def item(number, kind, before):
    "A clip of a kind; `before` is the good one that a duplicate repeats"
    good, short, sound = base_clips()
    name, words = f"c{number:06d}", f"clip {number:06d}".encode()
    whole, text = boxed(good[number % len(good)], words), f"a disc, number {number}"
    content = {
        "truncated": whole[:len(whole) // 2], "zero length": b"", "missing": None,
        "audio only": boxed(sound, words), "too short": boxed(short, words),
        "a web page": b"<!doctype html><title>404</title>" + words,
        "resource fork": b"\0\5\x16\7" + words,
        "hang": whole + MARKS["hang"], "crash": whole + MARKS["crash"],
    }.get(kind, whole)
    if kind == "duplicate": content, text = before.content, before.caption
    if kind == "no caption": text = ""
    if kind == "resource fork": name = f"._{name}"
    return Item(name, content, text, kind)


def plan_items(form, first, n, share, turn=0):
    "The clips of one form: faults evenly among good ones, all kinds from the `turn`-th on"
    kinds = [kind for kind in KINDS if kind not in ABSENT.get(form, ())]
    items, before, faults = [], None, round(n * share)
    places = {int((k + .5) * n / faults): kinds[(turn + k) % len(kinds)]
              for k in range(faults)}
    for k in range(n):
        one = item(first + k, places.get(k, ""), before)
        if not one.kind: before = one
        items.append(one)
    return items


# ---- forms

def put(path, content):
    "A file and its folders; None: no file"
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is not None: path.write_bytes(content)


def write_published(form, folder, items):
    "VATEX, LAVIB, Ego4D in chunks and VidChapters-7M, as they are published"
    from transporter_nb.datasets import published
    path = folder / "annotations.json"
    if form == "vatex":
        for one in items: put(folder / f"{one.name}_000000_000002.mp4", one.content)
        path.write_text(json.dumps([{"videoID": f"{one.name}_000000_000002", "enCap": [one.caption],
                                     "chCap": []} for one in items]))
        return published.read_vatex(path, folder)
    if form == "vidchapters":
        for one in items: put(folder / f"{one.name}.mp4", one.content)
        path.write_text(json.dumps({one.name: {"duration": 2, "timestamps": [[0, 1.5]], "sentences":
                                    [one.caption], "path": ""} for one in items}))
        return published.read_vidchapters(path, folder)
    rows = path.with_suffix(".csv")
    with open(rows, "w", newline="") as file:
        if form == "ego4d":
            for one in items: put(folder / one.name / "1.mp4", one.content)
            out = csv.writer(file, delimiter="\t")
            out.writerow(["video_uid", "clip_start", "clip_end", "clip_text", "narration_time"])
            out.writerows([one.name, 600., 601.5, one.caption, 600.5] for one in items)
        else:
            for one in items: put(folder / f"segments/{one.name}_shot1_0_0_0/vid.mp4", one.content)
            out = csv.writer(file)
            out.writerow(["name", "shot", "tmp_crop", "vrt_crop", "hrz_crop"])
            out.writerows([one.name, "1.0", 0, 0, 0] for one in items)
    if form == "ego4d": return published.read_ego4d_cuts(rows, folder)
    texts = folder / "captions.jsonl" # a wrong caption file names other clips
    texts.write_text("".join(json.dumps({
        "id": f"{one.name}{'_other' * (one.kind == 'wrong caption file')}_shot1_0_0_0",
        "caption": one.caption}) + "\n" for one in items))
    return published.read_lavib(rows, folder, texts)


def write_table(form, folder, items):
    "A table of one of three kinds"
    from transporter_nb.datasets.tables import table_records
    for one in items: put(folder / f"{one.name}.mp4", one.content)
    rows = [{"path": f"{one.name}.mp4", "caption": one.caption} for one in items]
    path = folder / f"clips.{form}"
    if form == "parquet":
        import pyarrow
        from pyarrow import parquet
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif form == "jsonl": path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            out = csv.DictWriter(file, ["path", "caption"])
            out.writeheader()
            out.writerows(rows)
    return table_records(path)


def texts_of(items):
    "Names and content of text files; a wrong one is no UTF-8"
    for one in items:
        text = one.caption.encode()
        if one.kind == "wrong caption file": text = b"\xff\xfe" + one.caption.encode("utf-16-le")
        yield f"{one.name}.txt", text


def write_own(form, folder, items):
    "Texts beside clips, shards, and the procedural world"
    from transporter_nb.datasets import tables
    if form == "world":
        records = tables.world_records(folder, len(items), enlarge=1)
        for one, record in zip(items, records):
            if one.kind: record.path.unlink()
            if one.kind: put(record.path, one.content)
        return records
    if form == "side-cars":
        for one in items: put(folder / f"{one.name}.mp4", one.content)
        for name, text in texts_of(items): put(folder / name, text)
        return tables.side_car_records(folder)
    for first in range(0, len(items), 500):
        part = items[first:first + 500]
        with tarfile.open(folder / f"clips-{first:06d}.tar", "w") as tar:
            for one, (name, text) in zip(part, texts_of(part)):
                for member, content in ((f"{one.name}.mp4", one.content), (name, text)):
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return tables.shard_records(folder)


def plant(folder, n, share):
    "Write `n` clips in all forms; their records, and kinds by number of the record"
    from transporter_nb.datasets.records import join_records
    parts, kinds, first = {}, [], 0
    for k, form in enumerate(FORMATS):
        count = n // len(FORMATS) + (k < n % len(FORMATS))
        items = plan_items(form, first, count, share, 5 * k) # 5: so that few clips have all kinds
        place = folder / form
        place.mkdir(parents=True)
        write = (write_published if form in FORMATS[:4] else write_table
                 if form in FORMATS[4:7] else write_own)
        parts[form] = write(form, place, items)
        by_name = {one.name.removeprefix("._"): one.kind for one in items}
        kinds += [one.kind for one in items] if form == "world" else [
            by_name[re.search(r"c\d{6}", str(record.path.relative_to(place)))[0]]
            for record in parts[form]]
        first += count
    return join_records(parts), kinds


# ---- measures

def run(records, path, workers, limit, allowed=.2):
    "Decode a data set; seconds, the ledger, and how many clips came"
    from transporter_nb.datasets.decoding import decode_clips
    from transporter_nb.datasets.ledger import Ledger
    begun = time.perf_counter()
    ledger = Ledger(path, records, allowed=allowed)
    used = [clip.index for clip in decode_clips(ledger, take, workers, limit=limit, ahead=256)]
    return time.perf_counter() - begun, ledger, used


def wrong_ends(ledger, kinds, used):
    "Records that ended otherwise than they should"
    found = []
    for index, kind in enumerate(kinds):
        verdict, words = KINDS.get(kind, ("used", "^$"))
        line = ledger[index]
        fits = line and line.verdict == verdict and re.search(words, line.reason)
        if not fits or (index in used) != (verdict == "used"):
            found.append(f"{ledger.records[index].id} ({kind or 'good'}): {line and line[1:3]}")
    return found


def measure_faults(n, share, workers, limit):
    "Clean and faulty sets, one after the other"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, part in (("clean", 0.), ("faulty", share)):
            (folder / name).mkdir()
        clean, _ = plant(folder / "clean" / "data", n, 0.)
        faulty, kinds = plant(folder / "faulty" / "data", n, share)
        run(clean[:2 * workers], folder / "warm.parquet", workers, limit) # starts the server
        clean_s, _, all_used = run(clean, folder / "clean.parquet", workers, limit)
        faulty_s, ledger, used = run(faulty, folder / "faulty.parquet", workers, limit)
        wrong = wrong_ends(ledger, kinds, set(used))
        return {"clips": n, "faults": sum(map(bool, kinds)), "kinds": dict(Counter(filter(
                None, kinds))), "counts": ledger.counts(), "clean s": clean_s, "faulty s": faulty_s,
                "ratio": faulty_s / clean_s, "wrong": wrong, "clean lost": n - len(all_used),
                "good lost": kinds.count("") - len(used)}


def child(n):
    "Stream many records, and print how much memory that took"
    import psutil
    from transporter_nb.datasets.decoding import decode_clips
    from transporter_nb.datasets.ledger import Ledger
    from transporter_nb.datasets.tables import table_records
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with open(folder / "clips.csv", "w") as file:
            file.write("path,caption\n")
            for k in range(n):
                put(folder / f"{k // 1000}" / f"{k}.mp4", str(k).encode())
                file.write(f"{k // 1000}/{k}.mp4,one small red ball slides left {k}\n")
        here = psutil.Process()
        list(decode_clips(Ledger(folder / "one.parquet", table_records(folder / "clips.csv")[:1]),
                          zeros, 1)) # whatever is loaded once
        begun, highest, count = here.memory_info().rss, 0, 0
        ledger = Ledger(folder / "ledger.parquet", table_records(folder / "clips.csv"))
        for count, _ in enumerate(decode_clips(ledger, zeros, 2), 1):
            if count % 500 == 0: highest = max(highest, here.memory_info().rss)
        highest = max(highest, here.memory_info().rss)
    print(json.dumps({"records": n, "used": count, "start": begun, "growth": highest - begun}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="replace the shipped record")
    parser.add_argument("--clips", type=int, default=10_000, help="of each of the two sets")
    parser.add_argument("--records", type=int, default=100_000, help="that are streamed")
    parser.add_argument("--share", type=float, default=.07, help="of faulty clips")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    parser.add_argument("--limit", type=float, default=1., help="seconds for one clip")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child: return child(asked.child)
    from transporter_nb.evaluate.results import figure_stem, save_record
    usual = {name: parser.get_default(name) for name in ("clips", "records", "share", "limit")}
    stem = figure_stem("data_faults", {n: vars(asked)[n] for n in usual}, usual, asked.install)
    found = measure_faults(asked.clips, asked.share, asked.workers, asked.limit)
    print(f"{found['clips']:,} clips, {found['faults']} faults of {len(found['kinds'])} kinds: "
          f"{found['counts']}")
    print(f"ended otherwise than planted: {len(found['wrong'])} {found['wrong'][:5]}; good clips "
          f"lost: {found['good lost']} of the faulty set, {found['clean lost']} of the clean one")
    print(f"clean {found['clean s']:.1f} s, faulty {found['faulty s']:.1f} s, "
          f"ratio {found['ratio']:.2f}")
    command = [sys.executable, __file__, "--child", str(asked.records)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout.splitlines()[-1])
    print(f"{memory['used']:,} of {memory['records']:,} records streamed: "
          f"{memory['growth'] / 2**20:.0f} MiB above the start")
    cards = [
        {"what": "planted faults of 12 kinds: records that ended otherwise than planted",
         "value": len(found["wrong"]), "target": 0, "better": "lower", "n": found["clips"]},
        {"what": "run time with planted faults over that of the clean set",
         "value": found["ratio"], "target": 1.3, "better": "lower", "n": found["clips"]},
        {"what": "memory above the start while streaming (MiB)",
         "value": memory["growth"] / 2**20, "target": 150, "better": "lower",
         "n": memory["records"]},
    ]
    print(save_record(stem, {"rows": cards, "faults": found, "memory": memory}))


if __name__ == "__main__": main()
