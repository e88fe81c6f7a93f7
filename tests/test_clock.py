"""What published models are shown of a clip: frames, sizes, dates and prompts as their processors
make them, for the clips of a generator and for those of a file"""
import hashlib
import json
from pathlib import Path

import nbformat
import pytest
import torch
from make_processor_fixtures import FIXTURE, PROMPTS, film, folded, small_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from transporter_nb.concepts.bank import ConceptBank
from transporter_nb.concepts.concept import Concept, ConceptConfig
from transporter_nb.core.base import repo_path
from transporter_nb.core.hub import Snapshot
from transporter_nb.explain.transporter import Transporter
from transporter_nb.models.generators.wan import WanConfig, hub_config
from transporter_nb.models.registry import VLMS, find_adapter
from transporter_nb.models.testing import (
    LinearGenerator, save_snapshot, tiny_generator, tiny_settings, tiny_vlm)
from transporter_nb.models.view import Models
from transporter_nb.models.vlms.clock import PLANNED, Clock
from transporter_nb.models.vlms.preprocessing import (
    FRAMES_TEXT, flatten_patches, paced_frames, stepped_frames)
from transporter_nb.world import video
from transporter_nb.world.contrasts import parse_contrast
from transporter_nb.world.video import save_mp4

ASKED = "what colour is it?"
CLIPS = [(61, 16., 5), (61, 16., 32), (9, 2., 4), (180, 24., 8), (600, 29.97, 3)]
FACTS = json.loads(safe_open(FIXTURE, "pt").metadata()["facts"])
FROZEN = load_file(FIXTURE)
FAMILIES = {"gemma3": "gemma3", "phi4": "phi4", "videollama3": "videollama3",
            "qwen25vl": "qwen2_5_vl", "smolvlm": "smolvlm"} # ours, in the fixture


def published(name, n_frames=5, **sizes):
    "An adapter with a tokenizer of single characters, as if it came from the hub"
    sizes = ({"vision_size": 16} if name in ("qwen25vl", "videollama3") else {}) | sizes
    adapter = find_adapter("vlm", name, VLMS)
    words = ["two", "large", *(f"word{k}" for k in range(250))] # more tokens than characters
    built = {key: value for key, value in sizes.items() if not key.endswith("_pixels")}
    blank = tiny_vlm(name, words=words, **built)
    settings = tiny_settings(**sizes, n_frames=n_frames, hub_id="tiny/vlm")
    marks = [adapter.hub_mark(k) for k in range(1, n_frames + 1)]
    tokenizer = small_tokenizer()
    for token in adapter.special_tokens:
        if tokenizer.convert_tokens_to_ids(token) == tokenizer.unk_token_id:
            tokenizer.add_tokens([token], special_tokens=True)
    return adapter(settings, blank.model, tokenizer, marks).freeze()


def whole_prompt(vlm): return vlm.preamble.tolist() + vlm.prompt_ids(ASKED)


@pytest.mark.parametrize("frames, rate, n_frames", CLIPS)
def test_videollama3_dates_its_frames_by_the_clip(frames, rate, n_frames):
    vlm = published("videollama3", n_frames).set_clock(frames, rate)
    seconds = [k / rate for k in stepped_frames(frames, n_frames)]
    before, _, after = PROMPTS["videollama3"]
    text = FRAMES_TEXT["videollama3"].text(vlm.tokens_per_frame, seconds)
    expected = before + text + "\n" + after # the line break is the adapter's, see there
    assert whole_prompt(vlm) == vlm.tokenizer(expected, add_special_tokens=False).input_ids


@pytest.mark.parametrize("frames, rate, n_frames", [*CLIPS, (61, 16., 0), (600, 29.97, 0)])
def test_smolvlm_says_how_long_the_clip_is(frames, rate, n_frames):
    vlm = published("smolvlm", n_frames).set_clock(frames, rate)
    pace = (rate, n_frames, 0) if n_frames else ()
    shown = paced_frames(frames, rate, *pace)
    assert n_frames or len(shown) == round(frames / rate) # one a second
    assert vlm.n_tokens == len(shown) * vlm.tokens_per_frame
    before, _, after = PROMPTS["smolvlm"]
    after = after.replace("<|im_end|>", "<end_of_utterance>") # SmolVLM2's own end of a turn
    text = FRAMES_TEXT["smolvlm"].text(
        vlm.tokens_per_frame, [k / rate for k in shown], frames / rate)
    assert "You are provided the following series of" in text
    assert whole_prompt(vlm) == vlm.tokenizer(before + text + after,
                                              add_special_tokens=False).input_ids


@pytest.mark.parametrize("frames, rate", [(61, 16.), (180, 24.)])
def test_qwen_has_a_system_turn_and_the_clips_seconds(frames, rate):
    vlm = published("qwen25vl").set_clock(frames, rate)
    before, _, after = PROMPTS["qwen2_5_vl"]
    text = FRAMES_TEXT["qwen2_5_vl"].text(vlm.tokens_per_frame, [0.] * 5)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    expected = vlm.tokenizer(system + before + text + after, add_special_tokens=False).input_ids
    assert whole_prompt(vlm) == expected
    kinds = 2 * (torch.tensor(expected) == vlm.tokenizer.convert_tokens_to_ids(vlm.image_token))
    step = 2 / (10 / frames * rate) # two frames a patch; ten are taken: the processor's formula
    own, _ = vlm.model.model.get_rope_index(
        torch.tensor(expected)[None], kinds.int()[None], video_grid_thw=vlm.grid(1),
        second_per_grid_ts=[step])
    text_positions = torch.arange(len(expected))[None]
    assert vlm.rope_positions(text_positions)[:, 0].equal(own[:, 0])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_clip_of_another_length_is_dated_anew(name):
    vlm = published(name).set_clock(20, 4.)
    before = whole_prompt(vlm)
    tokens = vlm.embed(torch.rand(1, 40, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert tokens.shape == (1, vlm.n_tokens, vlm.vlm_dim)
    assert vlm.clock == Clock(40, 4., (16, 16))
    assert (whole_prompt(vlm) != before) == (name in ("videollama3", "smolvlm"))
    log_probs = vlm.next_token_log_probs(tokens, ASKED)
    assert torch.allclose(log_probs.logsumexp(-1), torch.zeros(1), atol=1e-4)


@pytest.mark.parametrize("name", ["phi4", "smolvlm", "qwen25vl"])
def test_a_miniature_keeps_its_marks(name):
    vlm = tiny_vlm(name, **({"vision_size": 16} if name == "qwen25vl" else {}))
    before = vlm.preamble.clone()
    assert vlm.set_clock(9, 2.).clock is None and vlm.preamble.equal(before)
    with vlm.clocked(9, 2.): assert vlm.preamble.equal(before)


def test_qwen_takes_pairs_of_frames_as_its_processor_does():
    vlm = published("qwen25vl", 4)
    assert vlm.shown_frames(61, 16.) == stepped_frames(61, 8, depth=2)
    assert vlm.shown_frames(7, 16.) == [*range(7), 6] # the last one is shown twice


def test_other_clips_for_a_while():
    vlm = published("videollama3").set_clock(61, 16.)
    before = whole_prompt(vlm)
    with vlm.clocked(61, 8., (32, 48)) as same:
        assert same is vlm and vlm.clock == (61, 8., (32, 48)) and whole_prompt(vlm) != before
    assert vlm.clock == (61, 16., PLANNED.size) and whole_prompt(vlm) == before
    with pytest.raises(RuntimeError), vlm.clocked(61, 8.): raise RuntimeError("in between")
    assert whole_prompt(vlm) == before


# What the processors gave for films of several lengths, rates and sizes

@pytest.fixture(params=FACTS["shown"], ids=lambda row: f"{row['family']} {row['clip']}")
def row(request): return request.param


def as_in(row):
    "The adapter of a row, with its settings, and the film of the row"
    name = next(ours for ours, theirs in FAMILIES.items() if theirs == row["family"])
    sizes = dict(patch_size=row["patch"], image_size=row["square"])
    if row["limits"]: sizes |= dict(zip(("min_pixels", "max_pixels"), row["limits"]))
    frames, rate, *size = row["clip"]
    vlm = published(name, row["n_frames"], **sizes).set_clock(frames, rate)
    return vlm, film(frames, *size)[None] / 255


def test_frames_positions_and_ids_are_the_processor_s(row):
    vlm, clip = as_in(row)
    which = vlm.follow(clip)
    assert which == row["frames"]
    if row["grid"]: assert vlm.grid(1).tolist() == row["grid"]
    tokens = vlm.tokenizer.convert_ids_to_tokens(whole_prompt(vlm))
    assert folded(tokens).replace("<end_of_utterance>", "<|im_end|>") == row["prompt"]
    if row["step"] is None: return
    ids = torch.tensor(vlm.preamble.tolist())[None]
    kinds = 2 * (vlm.blocks >= 0).int()[None]
    own, _ = vlm.model.model.get_rope_index(
        ids, kinds, video_grid_thw=torch.tensor(row["grid"]), second_per_grid_ts=[row["step"]])
    assert vlm.lead.equal(own[:, 0])


def test_pixels_are_the_processor_s(row, monkeypatch):
    vlm, clip = as_in(row)
    seen = []
    monkeypatch.setattr(type(vlm), "tower", lambda self, images, n: seen.append(images)
                        or torch.zeros(self.n_tokens, self.vlm_dim))
    vlm.embed(clip)
    pixels = seen[0]
    if row["grid"]: pixels = flatten_patches(pixels, row["patch"], 2, vlm.depth)
    assert list(pixels.shape) == row["pixels"]
    stride = max(1, pixels.numel() // 400) | 1
    apart = (pixels.flatten()[::stride] - FROZEN[row["part"]]).abs().max()
    levels = 255 * min(vlm.colours[1]) # ours are not rounded to grey levels
    assert apart * levels < 2


# The product: a generator states its clock, a file has its own

def with_dates(): return published("videollama3", 3, image_size=16)


def test_a_generator_says_how_fast_its_clips_are(tmp_path):
    wan = tiny_generator(frames=5)
    assert wan.clock == (5, 6., (wan.config.height, wan.config.width))
    assert WanConfig.paper().frame_rate == 16 and LinearGenerator().clock is None
    folder = save_snapshot(wan, tmp_path / "wan")
    def rate_of(**stated):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | stated))
        return hub_config(Snapshot(folder, "./wan", ""), (5, 48, 48)).frame_rate
    assert rate_of() == 24 # the autoencoder of Wan2.2-TI2V-5B, as the miniature's
    assert rate_of(frame_rate=12) == 12


def test_models_set_the_clock_of_their_generator():
    vlm, wan = with_dates(), tiny_generator(frames=5)
    before = whole_prompt(vlm)
    models = Models(wan, vlm)
    assert vlm.clock == wan.clock and whole_prompt(vlm) != before
    other = Models(tiny_generator(frames=5, frame_rate=12.), vlm) # shares the VLM
    assert vlm.clock.rate == 12
    models.embed(torch.rand(1, 5, 3, 48, 48))
    assert vlm.clock.rate == 6
    other.embed(torch.rand(1, 5, 3, 48, 48))
    assert vlm.clock.rate == 12


@pytest.mark.parametrize("rate", [6., 24.])
def test_explanations_are_asked_with_the_dates_of_the_generator(rate, monkeypatch):
    vlm, asked = with_dates(), []
    l2v = Transporter(tiny_generator(frames=5, steps=2, frame_rate=rate), vlm)
    l2v.bank = ConceptBank([Concept(
        parse_contrast("red -> blue"), torch.randn(1, 8), ConceptConfig(placement="word"))])
    whole = vlm.text_logits
    def listened(*given):
        asked.append(vlm.tokenizer.decode(vlm.preamble))
        return whole(*given)
    monkeypatch.setattr(vlm, "text_logits", listened)
    with vlm.clocked(9, 2.): pass # whatever was looked at before
    l2v.explain("one large red ball slides left slowly over a stone floor", "red -> blue",
                strengths=2, progress=False)
    seconds = [k / rate for k in stepped_frames(5, 3)]
    text = FRAMES_TEXT["videollama3"].marks(seconds)
    assert asked and all("".join(mark[:9].split()) in "".join(one.split())
                         for one in asked for mark in text)


def test_a_clip_from_a_file_is_asked_with_its_own_dates(tmp_path, monkeypatch):
    "The cell of explain_clip.ipynb that reads the file"
    notebook = nbformat.read(repo_path("nbs/explain_clip.ipynb"), 4)
    cell, = [one.source for one in notebook.cells if "sampled = sample_video(" in one.source]
    l2v, asked = Transporter(tiny_generator(frames=5), with_dates()), []
    vlm, size = l2v.vlm, (48, 48)
    monkeypatch.setattr(vlm, "caption", lambda tokens: asked.append(vlm.clock) or ["red"])
    clip = save_mp4(tmp_path / "mine.mp4", torch.rand(20, 3, *size), fps=4, enlarge=1)
    exec(cell, vars(video) | {
        "hashlib": hashlib, "torch": torch, "Path": Path, "clip": str(clip), "made_from": None,
        "vlm": "videollama3", "ours": {}, "install": False, "stem": "", "frames": 5, "size": size,
        "where": "cpu", "wan": l2v.generator, "model": vlm, "l2v": l2v,
        "figure_stem": lambda *given: "stem", "show_gif": lambda *given, **options: None,
        "word_log_probs": lambda tokens, words: asked.append(vlm.clock) or [0.]})
    assert [one[::2] for one in asked] == [(5, size)] * 2 # of 20 frames in 4.75 seconds
    assert [one.rate for one in asked] == pytest.approx([4 / 4.75] * 2, rel=1e-3)
    assert vlm.clock == l2v.generator.clock # generated clips come next
