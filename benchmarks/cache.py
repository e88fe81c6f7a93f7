"""The second epoch from the cache of latents against decoding and encoding again, in one run.

    python benchmarks/cache.py                  # a minute; writes latent_cache.json
    python benchmarks/cache.py --clips 64       # more clips
    python benchmarks/cache.py --install        # the same, into figures/

Clips of the miniature's world are written as videos. In the first epoch each is decoded, encoded by
the shipped autoencoder and the shipped VLM, and written to the cache. In the second each is read.
Order and reading are those of a training. Both epochs run in this process, on one thread."""
import argparse
import tempfile
import time
from pathlib import Path

import torch

from transporter_nb.core.hub import DTYPES
from transporter_nb.datasets.latents import ClipPart, LatentCache, cache_info, latents_key
from transporter_nb.datasets.order import SampleOrder
from transporter_nb.datasets.streaming import StreamedBatches
from transporter_nb.evaluate.results import figure_stem, save_record
from transporter_nb.models.cache import model_digests
from transporter_nb.models.registry import load_generator, load_vlm
from transporter_nb.world.video import sample_video, save_mp4
from transporter_nb.world.words import render, sample_scenes

DTYPE = "float16"


class Clips:
    "Latents and tokens of clips: from the cache, or decoded and encoded"
    def __init__(self, paths, cache, generator, vlm):
        self.paths, self.cache, self.generator, self.vlm = paths, cache, generator, vlm
        self.digests = model_digests(generator, vlm)

    def __len__(self): return len(self.paths)

    @torch.no_grad()
    def encoded(self, path):
        config = self.generator.config
        video = sample_video(path, config.frames, (config.height, config.width)).video
        return (self.generator.encode(video)[0].to(DTYPES[DTYPE]),
                self.vlm.embed(video)[0].to(DTYPES[DTYPE]))

    def __getitem__(self, index):
        config = self.generator.config
        part = ClipPart(f"clip {index}", 0., None, config.frames, config.height, config.width)
        path = self.cache.latents_path(part, self.digests["generator"], DTYPE)
        beside = self.cache.tokens_path(path, self.digests["vlm"])
        latents, tokens = self.cache.read(path), self.cache.read(beside)
        if latents and tokens: return *latents.values(), tokens["target"]
        latents, tokens = self.encoded(self.paths[index])
        self.cache.write(path, {latents_key(latents): latents})
        self.cache.write(beside, {"target": tokens})
        return latents, tokens


def epoch(clips, number, batch_size):
    "Seconds, hits and misses of one epoch, and the sum of what was read"
    cache, each = clips.cache, len(clips) // batch_size
    cache.hits = cache.misses = 0
    order, total, begun = SampleOrder(len(clips), batch_size), 0., time.perf_counter()
    for batch in StreamedBatches(clips, order, number * each, (number + 1) * each):
        total += sum(float(latents.double().sum() + tokens.double().sum())
                     for latents, tokens in batch)
    return time.perf_counter() - begun, cache.hits, cache.misses, total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="replace the shipped record")
    parser.add_argument("--clips", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--vlm", default="phi4", help="one of the shipped VLMs")
    asked = parser.parse_args()
    if asked.clips < 8 or asked.clips % 8: parser.error("clips must be a multiple of 8")
    torch.set_num_threads(1)
    generator = load_generator("wan", "mini", "cpu", codec=True)
    vlm = load_vlm(asked.vlm, device="cpu")
    if generator.clock: vlm.set_clock(*generator.clock)
    with tempfile.TemporaryDirectory() as folder:
        paths = [save_mp4(Path(folder) / f"{k}.mp4", clip, enlarge=4)
                 for k, clip in enumerate(render(sample_scenes(asked.clips, 21)))]
        clips = Clips(paths, LatentCache(Path(folder) / "cache"), generator, vlm)
        first, second = epoch(clips, 0, 8), epoch(clips, 1, 8)
        size = cache_info(clips.cache.folder).bytes
    assert abs(first[3] - second[3]) < 1e-9 * abs(first[3]) + 1e-9, "the epochs read other numbers"
    rows = [{"epoch": name, "samples a second": asked.clips / seconds, "hits": hits,
             "misses": misses, "hit rate": hits / (hits + misses)}
            for name, (seconds, hits, misses, _) in (("decoded", first), ("cached", second))]
    for row in rows:
        print(f"{row['epoch']:8s} {row['samples a second']:9.1f} samples a second, "
              f"hit rate {row['hit rate']:.1%} of {row['hits'] + row['misses']} reads")
    ratio = rows[1]["samples a second"] / rows[0]["samples a second"]
    each = size / asked.clips
    print(f"the second epoch is {ratio:.0f} times as fast; {each / 1024:.1f} KiB a clip")
    given = {"clips": asked.clips, "vlm": asked.vlm}
    stem = figure_stem("latent_cache", given, {"clips": 32, "vlm": "phi4"}, asked.install)
    card = {"what": "cache: second epoch against decoding and encoding again, samples a second",
            "vlm": asked.vlm, "value": ratio, "target": 20., "better": "higher", "n": asked.clips}
    print(save_record(stem, {"rows": [card], "epochs": rows, "bytes a clip": each}))


if __name__ == "__main__": main()
