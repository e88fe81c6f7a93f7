"""One contract for every adapter of a VLM, at tiny sizes; adapters broken on purpose, to see that
each rule can fail; and the size of an adapter"""
import math
from types import MethodType

import pytest
import torch

from transporter_nb.models import registry
from transporter_nb.core.base import checkpoint_path, package_path
from transporter_nb.models.registry import (
    VLMS, find_adapter, load_vlm, register_vlm, shipped_vlm_names, vlm_names,
)
from transporter_nb.models.vlms.contract import RULES, check_adapter
from transporter_nb.models.vlms.hub import VLMSettings
from transporter_nb.models.vlms.training import VLMTraining, train_vlm
from transporter_nb.world.words import render, sample_scenes

TINY = VLMSettings(
    n_frames=3, image_size=32, patch_size=8, hidden_size=32, n_layers=2, n_heads=2, vision_size=48,
    vision_layers=2, vision_heads=3,
)
CLIPS = render(sample_scenes(3, seed=0))
CLIP_MEAN, CLIP_STD = torch.tensor(
    [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
)[..., None, None]


# The class's own path from pixels, written out without a line of the adapters: what `forward` of
# each class takes besides the ids.
# three of nine, -1 to 1; a clip is 32 px already
def frames(video): return 2 * video[:, [0, 4, 8]] - 1


def blocks(video):
    """Patches of 8 px in blocks of 2 x 2, channels before pixels"""
    return video.flatten(0, 1).view(-1, 3, 2, 2, 8, 2, 2, 8).permute(
        0, 2, 5, 3, 6, 1, 4, 7,
    ).reshape(-1, 3 * 8 * 8)


def pairs(video):
    """The same for five frames and the last once more, two in a patch"""
    shown = (video[:, [0, 2, 4, 6, 8, 8]] - CLIP_MEAN) / CLIP_STD
    return shown.view(-1, 2, 3, 2, 2, 8, 2, 2, 8).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(
        -1, 3 * 2 * 8 * 8,
    )


INPUTS = {
    "phi4": lambda vlm, video, ids: dict(
        image_pixel_values=frames(video).flatten(0, 1)[:, None].repeat(1, 2, 1, 1, 1),
        image_sizes=torch.full((3 * len(video), 2), 32),
        image_attention_mask=torch.ones(3 * len(video), 2, 4, 4),
    ),
    "gemma3": lambda vlm, video, ids: dict(
        pixel_values=frames(video).flatten(0, 1),
        token_type_ids=(ids == vlm.model.config.image_token_id).long(),
    ),
    "videollama3": lambda vlm, video, ids: dict(
        pixel_values_videos=blocks(frames(video)),
        video_grid_thw=torch.tensor([[3, 4, 4]] * len(video)),
        video_merge_sizes=torch.tensor([2] * len(video)),
    ),
    "qwen25vl": lambda vlm, video, ids: dict(
        pixel_values_videos=pairs(video), video_grid_thw=torch.tensor([[3, 4, 4]] * len(video)),
        mm_token_type_ids=2 * (ids == vlm.model.config.video_token_id).int(),
    ),
    "smolvlm": lambda vlm, video, ids: dict(pixel_values=frames(video)),
}


def from_pixels(vlm, video, turn):
    ids = torch.cat([vlm.preamble, torch.tensor(turn)]).expand(len(video), -1)
    made = vlm.model(input_ids=ids, **INPUTS[vlm.name](vlm, video, ids), use_cache=False)
    return made.logits[:, -1]


def tiny(name):
    return find_adapter("vlm", name, VLMS).new(TINY).freeze()


def test_every_adapter_has_its_path_from_pixels():
    assert list(INPUTS) == vlm_names()


@pytest.mark.parametrize("name", INPUTS)
def test_the_contract(name):
    report = check_adapter(tiny(name), CLIPS, from_pixels)
    assert [row.rule for row in report] == list(RULES) and "not checked" not in repr(report)


# Each adapter broken where its class is peculiar: everything still runs.
@pytest.mark.parametrize("name, attribute, value", [
    ("gemma3", "two_way", False),  # tokens of a frame blind to those after them
    ("qwen25vl", "rope_positions", lambda self, positions: positions),  # one axis instead of three
    ("phi4", "two_way", True),
    # patches down before across
    ("videollama3", "embed", lambda self, video: type(self).embed(self, video.transpose(3, 4))),
    # another scale of colours
    ("smolvlm", "embed", lambda self, video: type(self).embed(self, video * 255 / 256)),
])
def test_a_quiet_mistake_is_seen(name, attribute, value):
    vlm = tiny(name)
    object.__setattr__(vlm, attribute, MethodType(value, vlm) if callable(value) else value)
    with pytest.raises(
        ValueError, match=f"adapter '{name}': injected embeddings must answer as pixels do",
    ):
        check_adapter(vlm, CLIPS, from_pixels)


def shuffled(self, video): return type(self).embed(self, video).roll(1, 0)
def lost(self, video): return type(self).embed(self, video)[:, 1:]
def heap(self, video):
    return type(self).embed(self, video).mean(1, keepdim=True).repeat(1, self.n_tokens, 1)
def noisy(self, video): return type(self).embed(self, video) + 1e-3 * torch.rand(1)
def detached(self, video): return type(self).embed(self, video).detach()
def blind(self, z, text): return type(self).text_logits(self, torch.zeros_like(z), text)
def causal(self, z, text):
    return type(self).text_logits(
        self, z, text._replace(visible=torch.ones_like(text.visible).tril()),
    )
def few_words(self, z, text): return type(self).text_logits(self, z, text)[..., :30]
def raw(self, z, turns): return type(self).turn_log_probs(self, z, turns) + 0.1
def stand_ins(self, question, prefix=""):
    return self.text_ids(f"{question} {self.closing} {prefix}")


@pytest.mark.parametrize("attribute, value, message", [
    ("embed", shuffled, "embedded the same alone and in a batch"),
    ("embed", lost, r"embed must give .batch, n_tokens, vlm_dim. = .3, 12, 32., got .3, 11, 32."),
    ("embed", noisy, "alone and in a batch"),
    ("embed", heap, "a clip and its reverse"),
    ("embed", detached, "embed must be differentiable"),
    ("text_logits", blind, "different clips must get different answers"),
    ("text_logits", causal, "turns side by side must be blind"),
    ("text_logits", few_words, "got 30. Give vocab_size"),
    ("turn_log_probs", raw, "must sum to 1, got a logsumexp of 0.1"),
    ("prompt_ids", stand_ins, "unknown words must be refused"),
], ids=lambda value: getattr(value, "__name__", None))
def test_each_rule_can_fail(attribute, value, message):
    vlm = tiny("smolvlm")
    object.__setattr__(vlm, attribute, MethodType(value, vlm))
    if value is heap: vlm.preamble[vlm.blocks < 0] = vlm.preamble[0]  # and frames without marks
    with pytest.raises(ValueError, match=message):
        check_adapter(vlm, CLIPS)


def test_one_that_still_learns():
    with pytest.raises(ValueError, match="no weight may learn once the VLM is frozen"):
        check_adapter(tiny("smolvlm").requires_grad_(True), CLIPS)


def test_one_that_forgets(monkeypatch):
    vlm = tiny("smolvlm")
    monkeypatch.setattr(
        type(vlm), "load", classmethod(lambda cls, path: cls.new(TINY, seed=1).freeze()),
    )
    with pytest.raises(ValueError, match="a loaded VLM must answer as the saved one"):
        check_adapter(vlm, CLIPS)


# What Gemma 3 and Phi-4 have more: masks of their own; an adapter of weights, parts without a call
@pytest.mark.parametrize("name, most", [
    ("qwen25vl", 80), ("smolvlm", 80), ("videollama3", 80), ("gemma3", 100), ("phi4", 100)])
def test_a_further_vlm_is_cheap(name, most):
    lines = package_path("models", "vlms", f"{name}.py").read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) < most, f"{len(code)} lines"


@pytest.mark.parametrize("name", ["qwen25vl", "smolvlm"])
def test_it_can_be_trained(name, tmp_path):
    vlm = find_adapter("vlm", name, VLMS).new(TINY)
    before = vlm.embed(CLIPS).detach()
    losses = train_vlm(
        vlm, VLMTraining(steps=3, locate_steps=1, batch_size=2, warmup=1, matmul="ieee"),
        resume_path=tmp_path / "state.safetensors",
    )
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and (
        vlm.embed(CLIPS) - before
    ).abs().max() > 1e-3
    vlm.save(tmp_path / "vlm.safetensors")
    assert type(vlm).load(path=tmp_path / "vlm.safetensors").caption(
        vlm.embed(CLIPS[:1]), max_tokens=2,
    )


def test_without_weights_the_way_to_them_is_told():
    for name in vlm_names():
        if checkpoint_path(f"vlm_{name}").exists(): continue
        with pytest.raises(
            FileNotFoundError, match=f"no miniature of '{name}'.*-p part vlm -p vlm {name}",
        ):
            load_vlm(name)
    assert "phi4" in shipped_vlm_names()


def test_a_vlm_of_ones_own(monkeypatch):
    monkeypatch.setattr(registry, "VLMS", dict(VLMS))
    Mine = type(
        "Mine", (find_adapter("vlm", "smolvlm", VLMS),),
        {"name": "mine", "load": classmethod(lambda cls, scale, device: cls.new(TINY))},
    )
    register_vlm("mine", Mine)
    assert load_vlm(
        "mine"
    ).name == "mine" and "mine" in vlm_names() and "mine" not in shipped_vlm_names()
    with pytest.raises(ValueError, match="is a VLM of the package"): register_vlm("qwen25vl", Mine)
    for name in ("a,b", "Mine", "my vlm", ""):
        with pytest.raises(ValueError, match="small letters, digits and underscores"):
            register_vlm(name, Mine)


@pytest.mark.parametrize("name", INPUTS)
def test_colours_out_of_range_are_refused(name):
    vlm = tiny(name)
    for wrong, message in (
        (2 * CLIPS - 1, r"got -.* use \(video \+ 1\) / 2"), (CLIPS / 0, "NaN"),
        (CLIPS * 255, "got .* to 2"),
    ):
        with pytest.raises(ValueError, match=message): vlm.embed(wrong)
    # jaxtyping sees it first, where it is on
    with pytest.raises((TypeError, ValueError)): vlm.embed((CLIPS * 255).byte())
    assert vlm.embed(CLIPS + 5e-4).isfinite().all()  # rounding is let in
    (gradient,) = torch.autograd.grad(
        vlm.embed(clips := CLIPS.clone().requires_grad_()).square().sum(), clips,
    )
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
