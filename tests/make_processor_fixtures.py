"""What the real processors of transformers give for a real clip: frozen once, so that ours are
compared with them where torchvision is absent

    # tests/fixtures/processors.safetensors, from its own clip
    python tests/make_processor_fixtures.py --write
    # every value, on the clips of a folder
    python tests/make_processor_fixtures.py --out full.safetensors --clips FOLDER

Needs torchvision and num2words, neither of them a dependency of the project: a folder where they
lie may be named in TORCHVISION_PATH. Registries give a CUDA build of torchvision; beside a CPU
build of torch two operators are missing at import, and no processor uses them, so they are declared
here."""
import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
FIXTURE = Path(__file__).parent / "fixtures" / "processors.safetensors"

# What the published processors are built with, where it is not the default of the class. Sources:
# preprocessor_config.json of google/gemma-3-12b-it (896 px squares, bilinear),
# Qwen/Qwen2.5-VL-7B-Instruct (56^2 to
# 16384 x 28^2 pixels a frame), HuggingFaceTB/SmolVLM2-2.2B-Instruct (384 px squares, videos of 64
# frames at most, one a second). VideoLLaMA 3, Phi-4 and Idefics 3: the defaults of the classes.
PUBLISHED = {
    "gemma3": dict(
        size={"height": 896, "width": 896}, resample=2, image_mean=[.5] * 3, image_std=[.5] * 3,
    ),
    "phi4": dict(size={"height": 448, "width": 448}, patch_size=14, dynamic_hd=36),
    "videollama3": dict(patch_size=14, merge_size=2, use_token_compression=False),
    "qwen2_5_vl": dict(
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}, patch_size=14,
        merge_size=2, temporal_patch_size=2, cap_pixels_per_frame=False,
    ),
    "smolvlm": dict(size={"longest_edge": 384}, max_image_size={"longest_edge": 384}),
    "smolvlm_stills": dict(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384}),
}
# The same processors on frames of 72 x 100 px: (family, its settings here, given as floats).
# Shrinking, growing, squares, splits, padding.
SMALL = {
    "gemma3": ("gemma3", dict(size={"height": 56, "width": 56})),
    "gemma3_float": ("gemma3", dict(size={"height": 56, "width": 56})),
    "gemma3_larger": ("gemma3", dict(size={"height": 112, "width": 112})),
    "phi4_one_crop": ("phi4", dict(size={"height": 56, "width": 56}, patch_size=14, dynamic_hd=1)),
    "phi4_crops": ("phi4", dict(size={"height": 56, "width": 56}, patch_size=14, dynamic_hd=36)),
    "phi4_crops_float": (
        "phi4", dict(size={"height": 56, "width": 56}, patch_size=14, dynamic_hd=36),
    ),
    "videollama3": (
        "videollama3",
        dict(
            size={"shortest_edge": 28 * 28, "longest_edge": 3 * 56 * 84},
            use_token_compression=False,
        ),
    ),
    "videollama3_float": (
        "videollama3",
        dict(
            size={"shortest_edge": 28 * 28, "longest_edge": 3 * 56 * 84},
            use_token_compression=False,
        ),
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        dict(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 84}, cap_pixels_per_frame=False),
    ),
    "qwen2_5_vl_larger": (
        "qwen2_5_vl",
        dict(
            size={"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 1280},
            cap_pixels_per_frame=False,
        ),
    ),
    "qwen2_5_vl_float": (
        "qwen2_5_vl",
        dict(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 84}, cap_pixels_per_frame=False),
    ),
    "smolvlm": ("smolvlm", dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 48})),
    "smolvlm_float": (
        "smolvlm", dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 48}),
    ),
    "smolvlm_stills": (
        "smolvlm_stills", dict(size={"longest_edge": 128}, max_image_size={"longest_edge": 48}),
    ),
    "smolvlm_stills_whole": (
        "smolvlm_stills",
        dict(
            size={"longest_edge": 128}, max_image_size={"longest_edge": 48},
            do_image_splitting=False,
        ),
    ),
    "idefics3": ("idefics3", dict(size={"longest_edge": 128}, max_image_size={"longest_edge": 48})),
}
FRAMES = [  # frames of the clip, its rate, count wanted, rate wanted
    (61, 16, None, 1), (61, 16, None, 2), (61, 16, 16, None), (61, 16, 8, None),
    (132, 25, None, 1), (132, 25, 7, None), (250, 25, None, 2), (2000, 24, None, 1),
    (2000, 30, 5, None), (4321, 29.97, None, 2), (100, 30, None, .5), (9, 6, 5, None),
    (7, 30, 4, None), (97, 24, 13, None), (1801, 23.976, 64, None),
]


def torchvision():
    """Make torchvision importable beside any build of torch; None where there is none"""
    if "torchvision" in sys.modules: return sys.modules["torchvision"]
    folder = os.environ.get("TORCHVISION_PATH")
    if folder and folder not in sys.path: sys.path.insert(0, folder)
    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec(
        "num2words"
    ) is None:
        return None
    import torch
    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision.library = library  # the operators live as long as this
    import torchvision as module
    return module


def pixels(family, options, clip, float_input):
    """Pixel values of a clip of bytes (frames 3 height width) and whatever says how they are laid
    out"""
    import torch
    import transformers
    clip = clip.float() if float_input else clip  # 0 to 255, and nothing is rounded
    if family in ("gemma3", "phi4"):
        name = {"gemma3": "Gemma3ImageProcessor", "phi4": "Phi4MultimodalImageProcessor"}[family]
        out = getattr(transformers, name)(**options)(list(clip), return_tensors="pt")
        if family == "gemma3": return {"pixels": out["pixel_values"]}
        return {
            "pixels": out["image_pixel_values"], "mask": out["image_attention_mask"].bool(),
            "tokens": torch.as_tensor(out["num_img_tokens"]),
        }
    if family in ("smolvlm_stills", "idefics3"):
        names = {"smolvlm_stills": "SmolVLMImageProcessor", "idefics3": "Idefics3ImageProcessor"}
        processor = getattr(transformers, names[family])(**options)
        out = processor([list(clip)], return_tensors="pt")
        return {"pixels": out["pixel_values"][0]}
    name = {
        "videollama3": "VideoLlama3VideoProcessor", "qwen2_5_vl": "Qwen2VLVideoProcessor",
        "smolvlm": "SmolVLMVideoProcessor",
    }[family]
    out = getattr(transformers, name)(**options)(
        [clip], return_tensors="pt", do_sample_frames=False,
    )
    if family == "smolvlm": return {"pixels": out["pixel_values"][0]}
    return {"pixels": out["pixel_values_videos"], "grid": out["video_grid_thw"]}


def frames():
    """Which frames each video processor takes"""
    from transformers import Qwen2VLVideoProcessor, SmolVLMVideoProcessor, VideoLlama3VideoProcessor
    from transformers.video_utils import VideoMetadata
    videollama, qwen, smol, table = (
        VideoLlama3VideoProcessor(), Qwen2VLVideoProcessor(), SmolVLMVideoProcessor(), []
    )
    for total, rate, count, fps in FRAMES:
        meta = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
        row = {"total": total, "rate": rate, "count": count, "fps": fps}
        for name, processor in (("videollama3", videollama), ("qwen2_5_vl", qwen)):
            row[name] = processor.sample_frames(meta, num_frames=count, fps=fps).tolist()
        if count is None: row["smolvlm"] = smol.sample_frames(meta, num_frames=64, fps=fps).tolist()
        table.append(row)
    return table


def small_tokenizer():
    """Words of the prompts, and the special tokens of all families"""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = [
        "<pad>", "<unk>", "<bos>", "<image_soft_token>", "<start_of_image>", "<end_of_image>",
        "<start_of_turn>", "<end_of_turn>", "<|video_pad|>", "<|image_pad|>", "<|vision_start|>",
        "<|vision_end|>", "<image>", "<video>", "<|image|>", "<|audio|>",
        "<fake_token_around_image>", "<global-img>", "<|im_start|>", "<|im_end|>", "<|user|>",
        "<|end|>", "<|assistant|>",
    ]
    # one token a character: nothing that is written goes unseen
    core = Tokenizer(
        models.WordLevel(
            {
                **{token: k for k, token in enumerate(special)},
                **{chr(k): len(special) + k for k in range(128)},
            },
            unk_token="<unk>",
        )
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer


PROMPTS = {  # around the placeholder of a video; Gemma 3 and Phi-4 take one for each frame
    "videollama3": (
        "<|im_start|>user\n", "<|video_pad|>",
        "what colour is it?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen2_5_vl": (
        "<|im_start|>user\n", "<|vision_start|><|video_pad|><|vision_end|>",
        "what colour is it?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "smolvlm": ("<|im_start|>User: ", "<video>", "what colour is it?<|im_end|>\nAssistant:"),
    "gemma3": (
        "<bos><start_of_turn>user\n", "<start_of_image>",
        "what colour is it?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "phi4": ("<|user|>", "<|image|>", "what colour is it?<|end|><|assistant|>"),
}
SECONDS = [0., 1.25, 62.5]  # of the three frames, in a clip of 4 a second
RATE, TOTAL = 4, 260


def prompts(clip):
    """input_ids of a prompt with a clip of three frames, by the full processors, and token types
    where there are some"""
    import transformers
    from transformers.video_utils import VideoMetadata
    table = {}
    for family, (before, mark, after) in PROMPTS.items():
        tokenizer = small_tokenizer()
        options = SMALL[family if family != "phi4" else "phi4_one_crop"][1]
        if family in ("gemma3", "phi4"):
            if family == "gemma3":
                processor = transformers.Gemma3Processor(
                    transformers.Gemma3ImageProcessor(**options), tokenizer, image_seq_length=4,
                )
            else:
                tokenizer.image_token, tokenizer.audio_token = "<|image|>", "<|audio|>"
                tokenizer.image_token_id, tokenizer.audio_token_id = (
                    tokenizer.convert_tokens_to_ids(["<|image|>", "<|audio|>"])
                )
                processor = transformers.Phi4MultimodalProcessor(
                    transformers.Phi4MultimodalImageProcessor(**options),
                    transformers.Phi4MultimodalFeatureExtractor(), tokenizer,
                )
            out = processor(
                images=[list(clip)] if family == "gemma3" else list(clip),
                text=[before + mark * len(clip) + after], add_special_tokens=False,
                return_tensors="pt",
            )
        else:
            tokenizer.image_token, tokenizer.video_token = {"smolvlm": ("<image>", "<video>")}.get(
                family, ("<|image_pad|>", "<|video_pad|>"),
            )
            tokenizer.image_token_id, tokenizer.video_token_id = tokenizer.convert_tokens_to_ids(
                [tokenizer.image_token, tokenizer.video_token]
            )
            full, still, film = {
                "videollama3": (
                    "VideoLlama3Processor", "VideoLlama3ImageProcessor",
                    "VideoLlama3VideoProcessor",
                ),
                "qwen2_5_vl": (
                    "Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor",
                ),
                "smolvlm": ("SmolVLMProcessor", "SmolVLMImageProcessor", "SmolVLMVideoProcessor"),
            }[family]
            extra = {"image_seq_len": 9} if family == "smolvlm" else {}
            processor = getattr(transformers, full)(
                image_processor=getattr(transformers, still)(), tokenizer=tokenizer,
                video_processor=getattr(transformers, film)(**options), **extra,
            )
            meta = VideoMetadata(
                total_num_frames=TOTAL, fps=RATE, duration=TOTAL / RATE,
                frames_indices=[round(s * RATE) for s in SECONDS],
            )
            out = processor(
                videos=[clip], text=[before + mark + after], video_metadata=[meta],
                do_sample_frames=False, add_special_tokens=False, return_tensors="pt",
            )
        table[family] = {
            "input_ids": out["input_ids"][0].tolist(),
            "token_types": out["token_type_ids"][0].tolist() if "token_type_ids" in out else None,
        }
    return table


# family, (frames, rate, height, width) of a clip, frames or steps shown (0: the processor's own
# choice); Phi-4's clips are squares, as its adapter shows one crop of each frame
SHOWN = [
    ("gemma3", (61, 16., 40, 40), 5), ("gemma3", (12, 6., 48, 80), 3),
    ("phi4", (61, 16., 40, 40), 5), ("phi4", (12, 6., 90, 90), 3),
    ("videollama3", (61, 16., 40, 40), 5), ("videollama3", (30, 24., 48, 80), 4),
    ("videollama3", (13, 6., 72, 40), 13),
    ("qwen2_5_vl", (61, 16., 40, 40), 3), ("qwen2_5_vl", (30, 24., 48, 80), 2),
    ("qwen2_5_vl", (25, 29.97, 90, 60), 4), ("qwen2_5_vl", (8, 6., 12, 12), 4),
    ("smolvlm", (61, 16., 40, 40), 0), ("smolvlm", (150, 24., 48, 80), 0),
    ("smolvlm", (700, 10., 30, 20), 0), ("smolvlm", (30, 6., 64, 40), 3),
]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"  # of Qwen's template
SIZES = {  # of the processors here: side of the squares, patch, least and most pixels
    # Phi-4: its processor counts tokens for 448 px alone
    "gemma3": (32, 4, None), "phi4": (448, 14, None),
    "videollama3": (56, 4, (16 * 16, 5 * 40 * 48)),
    "qwen2_5_vl": (56, 4, (24 * 24, 48 * 64)), "smolvlm": (48, 4, None),
}


def film(frames, height, width):
    """A clip of bytes (frames 3 height width) that is the same everywhere: edges, ramps, motion"""
    import torch
    k, c, y, x = torch.meshgrid(*map(torch.arange, (frames, 3, height, width)), indexing="ij")
    return ((x * x // 3 + 5 * y * (c + 1) + 11 * k * (x > y)) % 256).byte()


def folded(tokens):
    """Tokens as text, runs of a special token as their number"""
    from itertools import groupby
    runs = [(token, len(list(run))) for token, run in groupby(tokens)]
    return "".join(f"{token}*{n} " if n > 1 < len(token) else token * n for token, n in runs)


def film_processor(family, n_frames):
    """The full processor of a family whose frames are a video, and its words for frames"""
    import transformers
    square, patch, limits = SIZES[family]
    bounds = dict(zip(("shortest_edge", "longest_edge"), limits or ()))
    tokenizer, cut = small_tokenizer(), dict(size=bounds, patch_size=patch, merge_size=2)
    tokenizer.image_token, tokenizer.video_token = {"smolvlm": ("<image>", "<video>")}.get(
        family, ("<|image_pad|>", "<|video_pad|>"),
    )
    tokenizer.image_token_id, tokenizer.video_token_id = tokenizer.convert_tokens_to_ids(
        [tokenizer.image_token, tokenizer.video_token]
    )
    if family == "smolvlm":
        edge = {"longest_edge": square}
        video = transformers.SmolVLMVideoProcessor(size=edge, max_image_size=edge)
        words = {"fps": 1, "num_frames": 64} if n_frames == 0 else {
            "num_frames": n_frames, "skip_secs": 0}
        return transformers.SmolVLMProcessor(
            image_processor=transformers.SmolVLMImageProcessor(), tokenizer=tokenizer,
            video_processor=video, image_seq_len=(square // patch // 2)**2,
        ), words
    if family == "videollama3":
        video = transformers.VideoLlama3VideoProcessor(**cut, use_token_compression=False)
        still = transformers.VideoLlama3ImageProcessor()
        kind, words = transformers.VideoLlama3Processor, {"num_frames": n_frames}
    else:
        video = transformers.Qwen2VLVideoProcessor(
            **cut, temporal_patch_size=2, cap_pixels_per_frame=False)
        still = transformers.Qwen2VLImageProcessor()
        kind, words = transformers.Qwen2_5_VLProcessor, {"num_frames": 2 * n_frames}
    return kind(image_processor=still, tokenizer=tokenizer, video_processor=video), words


def shown_film(family, clip, n_frames):
    """What a processor of videos makes of a film: it chooses, resizes, cuts and dates the frames"""
    from transformers.video_utils import VideoMetadata
    frames, rate, height, width = clip
    processor, words = film_processor(family, n_frames)
    if "num_frames" in words and family == "smolvlm" and n_frames: words["fps"] = rate
    before, mark, after = PROMPTS[family]
    before = {"qwen2_5_vl": SYSTEM}.get(family, "") + before
    after = {"videollama3": "\n"}.get(family, "") + after  # the adapter's, inferred; see there
    meta = VideoMetadata(total_num_frames=frames, fps=rate, duration=frames / rate)
    which = processor.video_processor.sample_frames(meta, **words)
    out = processor(
        videos=[film(frames, height, width)], text=[before + mark + after], video_metadata=[meta],
        do_sample_frames=True, add_special_tokens=False, return_tensors="pt", **words,
    )
    pixels = out["pixel_values"][0] if family == "smolvlm" else out["pixel_values_videos"]
    return pixels, processor.tokenizer.convert_ids_to_tokens(out["input_ids"][0]), {
        "frames": [int(k) for k in which],
        "grid": out["video_grid_thw"].tolist() if "video_grid_thw" in out else None,
        "step": float(out["second_per_grid_ts"][0]) if "second_per_grid_ts" in out else None,
    }


def shown_images(family, clip, n_frames):
    """What a processor of images makes of frames that the adapter chose, evenly, and marked"""
    import torch
    import transformers
    frames, _, height, width = clip
    square, patch, _ = SIZES[family]
    which = torch.linspace(0, frames - 1, n_frames).round().long().tolist()
    tokenizer, size = small_tokenizer(), {"height": square, "width": square}
    if family == "gemma3":
        processor = transformers.Gemma3Processor(
            transformers.Gemma3ImageProcessor(
                size=size, resample=2, image_mean=[.5] * 3, image_std=[.5] * 3,
            ), tokenizer, image_seq_length=(square // patch // 2)**2,
        )
    else:
        tokenizer.image_token, tokenizer.audio_token = "<|image|>", "<|audio|>"
        tokenizer.image_token_id, tokenizer.audio_token_id = tokenizer.convert_tokens_to_ids(
            ["<|image|>", "<|audio|>"]
        )
        processor = transformers.Phi4MultimodalProcessor(
            transformers.Phi4MultimodalImageProcessor(size=size, patch_size=patch, dynamic_hd=1),
            transformers.Phi4MultimodalFeatureExtractor(), tokenizer,
        )
    before, mark, after = PROMPTS[family]
    images = list(film(frames, height, width)[which])
    text = "".join(f"Frame {k}: {mark}" for k in range(1, n_frames + 1))
    out = processor(
        images=[images] if family == "gemma3" else images, text=[before + text + after],
        add_special_tokens=False, return_tensors="pt",
    )
    pixels = out["pixel_values"] if family == "gemma3" else out["image_pixel_values"][:, 1]
    tokens = tokenizer.convert_ids_to_tokens(out["input_ids"][0])
    return pixels, tokens, {"frames": which, "grid": None, "step": None}


def films():
    """Frames, grid, step, prompt and a part of the pixels of every film, by family"""
    tensors, rows = {}, []
    for family, clip, n_frames in SHOWN:
        make = shown_images if family in ("gemma3", "phi4") else shown_film
        pixels, tokens, facts = make(family, clip, n_frames)
        name = f"shown.{len(rows)}"
        stride = max(1, pixels.numel() // 400) | 1
        tensors[name] = pixels.flatten()[::stride].contiguous()
        square, patch, limits = SIZES[family]
        rows.append(facts | {
            "family": family, "clip": clip, "n_frames": n_frames, "square": square, "patch": patch,
            "limits": limits, "pixels": list(pixels.shape), "part": name, "prompt": folded(tokens),
        })
    return tensors, rows


def read_clip(path, n_frames=3, every=10):
    """Bytes (frames 3 height width), every tenth frame of a file"""
    import av
    import torch
    with av.open(str(path)) as container:
        frames = [
            torch.from_numpy(frame.to_ndarray(format="rgb24"))
            for k, frame in enumerate(container.decode(video=0))
            if k < n_frames * every and k % every == 0
        ]
    return torch.stack(frames).permute(0, 3, 1, 2).contiguous()


def main():
    import torch
    from safetensors.torch import load_file, save_file
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--write", action="store_true", help="freeze the fixture again, from the clip it holds",
    )
    parser.add_argument(
        "--clip",
        help="with --write: a file to cut the fixture's clip from, 72 x 100 px of three frames",
    )
    parser.add_argument("--clips", help="a folder of mp4 files")
    parser.add_argument("--out", help="write every value on those clips here")
    given = parser.parse_args()
    if torchvision() is None:
        sys.exit(
            "torchvision and num2words are needed; install them beside, and name the folder in "
            "TORCHVISION_PATH"
        )
    torch.set_num_threads(1)
    tensors, facts = {}, {}
    if given.write:
        clip = read_clip(given.clip)[:, :, 20:92, 30:130].contiguous() if given.clip else load_file(
            FIXTURE
        )["clip"]
        tensors["clip"] = clip
        for case, (family, options) in SMALL.items():
            for part, value in pixels(family, options, clip, case.endswith("_float")).items():
                facts[f"{case}.{part}"] = list(value.shape)
                # an odd stride visits all channels, rows and patches
                stride = max(1, value.numel() // 1500) | 1
                tensors[f"{case}.{part}"] = value.flatten()[::stride].contiguous()
        print("bytes", sum(t.numel() * t.element_size() for t in tensors.values()))
        import transformers
        parts, rows = films()
        tensors |= parts
        facts = {
            "shapes": facts, "frames": frames(), "prompts": prompts(clip), "shown": rows,
            "words": [__import__("num2words").num2words(n) for n in range(100)],
            "versions": {
                "transformers": transformers.__version__, "torch": torch.__version__,
                "torchvision": torchvision().__version__,
            },
        }
        FIXTURE.parent.mkdir(exist_ok=True)
        save_file(tensors, FIXTURE, {"facts": json.dumps(facts)})
        print(FIXTURE, FIXTURE.stat().st_size)
    for path in sorted(Path(given.clips).glob("*.mp4")) if given.out else []:
        clip = read_clip(path, 2)
        tensors[f"{path.stem}/clip"] = clip
        for family, options in PUBLISHED.items():
            shown = clip[:1] if family in ("smolvlm_stills", "phi4") else clip  # many squares
            for part, value in pixels(family, options, shown, False).items():
                tensors[f"{path.stem}/{family}.{part}"] = value.contiguous()
    if given.out: save_file(tensors, given.out)


if __name__ == "__main__": main()
