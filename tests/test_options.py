"""Options of loading that change numbers: weights in fewer bits, steps that are not computed, and
the place of the weights that fits a device"""
import threading
from importlib.util import find_spec

import pytest
import torch
from transformers import Gemma3Config

from transporter_nb.core.hub import LoadOptions, QUANTIZERS
from transporter_nb.core.parameters import read_options
from transporter_nb.explain.budget import (
    device_options, fitted_options, kept_bytes, published_bytes,
)
from transporter_nb.explain.plan import plan
from transporter_nb.explain.steering import steer
from transporter_nb.explain.transporter import Transporter
from transporter_nb.models.quantizing import held_bytes, network_bytes
from transporter_nb.models.registry import load_generator, load_vlm
from transporter_nb.models.testing import save_snapshot, tiny_generator, tiny_vlm
from transporter_nb.models.vlms.base import DESCRIBE, world_words

RED = "one large red ball slides left slowly over a stone floor"
CLIP = (9, 32, 32)
WORDS = [*world_words(), "frame", *(f"{k}:" for k in range(1, 9))]
EIGHT = LoadOptions(quantize="int8")
torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs the package torchao")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Wan of two experts and a VLM, in the layout of the hub"""
    wan = tiny_generator(n_layers=3, spread=.05, boundary_ratio=.875, guidance=(4., 3.))
    vlm = tiny_vlm("gemma3", words=WORDS, image_size=32, patch_size=8, hidden_size=32, n_layers=2,
                   vision_size=32)
    return {name: str(save_snapshot(model, tmp_path_factory.mktemp(name)))
            for name, model in (("wan", wan), ("vlm", vlm))}


def clip(): return torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))


ABSENT = [word for word, package in QUANTIZERS.items() if find_spec(package) is None]


@pytest.mark.parametrize("word", ABSENT)
def test_an_absent_package_is_named_before_weights_are_read(folders, word, monkeypatch):
    def read(*args, **options): raise AssertionError("weights were read")
    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", read)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {QUANTIZERS[word]}"):
        Transporter.load(folders["vlm"], folders["wan"], device="cpu", options=f"quantize={word}")


@torchao
def test_a_generator_in_eight_bits(folders):
    plain = load_generator(folders["wan"], device="cpu", clip_size=CLIP)
    for options in (EIGHT, LoadOptions(quantize="int8", offload="parts"),
                    LoadOptions(quantize="int8", offload="layers")):
        small = load_generator(folders["wan"], device="cpu", options=options, clip_size=CLIP)
        noise, prompt = plain.noise([0]), plain.encode_prompt([RED])
        for t in (.05, .6):  # one time for each expert
            exact, near = (wan.velocity(noise, prompt, t) for wan in (plain, small))
            assert 0 < (exact - near).norm() < .1 * exact.norm()
        embeds = prompt.embeds.clone().requires_grad_()
        small.velocity(noise, prompt.with_embeds(embeds), .6).square().sum().backward()
        assert embeds.grad.abs().max() > 0
    whole = load_generator(folders["wan"], device="cpu", options=EIGHT, clip_size=CLIP)
    for part in ("transformer", "transformer_2", "text_encoder"):
        counted = network_bytes(getattr(plain, part), "int8")
        assert abs(counted / held_bytes(getattr(whole, part)) - 1) < .02, part


@torchao
def test_a_vlm_in_eight_bits(folders):
    plain, small = (load_vlm(folders["vlm"], device="cpu", options=options, n_frames=5)
                    for options in (LoadOptions(), EIGHT))
    video = clip().requires_grad_()
    exact, near = (vlm.next_token_log_probs(vlm.embed(video), DESCRIBE) for vlm in (plain, small))
    assert 0 < (exact.exp() - near.exp()).abs().max() < .1
    near.exp()[0, 5].backward()
    assert video.grad.abs().max() > 0
    assert abs(network_bytes(plain.model, "int8") / held_bytes(small.model) - 1) < .02


def tiny_sweep(wan, **dials):
    concept = Shift(torch.full((1, wan.text_dim), .3))
    return steer(wan, RED, wan.noise([0]), concept, [0., .5, 1.], steps=12, **dials).latents


class Shift:
    """A concept that adds the same vector to every token"""
    def __init__(self, vectors): self.vectors, self.pair = vectors, None
    def offset(self, generator, caption):
        return self.vectors.expand(generator.config.prompt_tokens, -1)


@pytest.mark.parametrize("words", ["first_block:0.5", "taylorseer:3"])
def test_a_step_cache_ends_with_its_generation(words):
    wan = tiny_generator(n_layers=3, spread=.05, boundary_ratio=.875, guidance=(4., 3.))
    exact = tiny_sweep(wan)
    prompt = wan.encode_prompt([RED])

    def gradient():
        embeds = prompt.embeds.clone().requires_grad_()
        wan.velocity(wan.noise([0]), prompt.with_embeds(embeds), .6).square().sum().backward()
        return embeds.grad

    before = gradient()
    wan.step_cache = words
    one, other = tiny_sweep(wan), tiny_sweep(wan)
    assert torch.equal(one, other) and not torch.equal(one, exact)
    assert wan.step_counts["computed"] < wan.step_counts["asked"]
    assert torch.equal(gradient(), before)  # with the option still set
    for expert in (wan.transformer, wan.transformer_2): assert not expert.is_cache_enabled
    wan.step_cache = None
    assert torch.equal(tiny_sweep(wan), exact)


def test_rows_in_parts_have_outputs_of_their_own():
    """With a cache that never finds a small change, parts of a batch change nothing"""
    wan = tiny_generator(n_layers=3, spread=.05)
    exact = tiny_sweep(wan, batch_size=2)
    wan.step_cache = "first_block:0.000001"
    torch.testing.assert_close(tiny_sweep(wan, batch_size=2), exact)
    wan.step_cache = "taylorseer:2"
    whole, parts = tiny_sweep(wan), tiny_sweep(wan, batch_size=2)
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-3)


def test_another_thread_waits_for_the_generation():
    wan = tiny_generator(n_layers=3, spread=.05)
    prompt, noise, found = wan.encode_prompt([RED]), wan.noise([0]), []
    wan.step_cache = "first_block:0.9"
    with torch.no_grad(): exact = wan.velocity(noise, prompt, .3)

    def other(): found.append(torch.no_grad()(wan.velocity)(noise, prompt, .3))

    thread = threading.Thread(target=other)
    with wan.generation(), torch.no_grad():
        thread.start()
        for t in (.1, .2, .3): wan.velocity(noise, prompt, t)
        assert not found  # it asked inside the generation, and has no answer yet
    thread.join()
    assert torch.equal(found[0], exact)


def test_gradients_inside_a_cached_generation_are_refused():
    wan = tiny_generator(n_layers=3)
    wan.step_cache = "taylorseer"
    with pytest.raises(RuntimeError, match="after the generation"), wan.generation():
        wan.velocity(wan.noise([0]), wan.encode_prompt([RED]), .5)
    assert not wan.transformer.is_cache_enabled


def test_the_miniature_takes_a_cache_in_words():
    l2v = Transporter.load("phi4", device="cpu", options="cache=taylorseer:2")
    assert l2v.generator.step_cache == "taylorseer:2"
    assert "cache=taylorseer:2" in l2v.names["options"]


def test_a_place_is_chosen_unless_it_is_said():
    assert read_options("quantize=int8").loading.offload == "auto"
    assert read_options("quantize=int8, offload=none").loading == EIGHT
    assert device_options("gemma3", "cpu", asked=read_options("quantize=int8").loading) == EIGHT


def test_free_memory_decides(monkeypatch):
    """On a CUDA device the memory that is free now counts, and the models that are asked for"""
    for free, generator, offload in (
        (400, "wan", "none"), (80, "wan", "parts"), (24, "wan", "layers"),
        (80, "wan-1.3b", "none"), (24, "wan-1.3b", "parts"),
    ):
        monkeypatch.setattr("transporter_nb.explain.budget.free_memory", lambda _: free * 2**30)
        assert device_options("phi4", "cuda", generator).offload == offload, (free, generator)


def test_quantised_weights_are_what_is_placed():
    plain, eight = (published_bytes("phi4", "wan", LoadOptions(quantize=word))
                    for word in (None, "int8"))
    memory = 2.2 * sum(eight)
    assert sum(plain) > .5 * memory
    assert fitted_options(plain, memory).offload == "parts"
    assert fitted_options(eight, memory).offload == "none"


@pytest.fixture(scope="module")
def gemma_4b(tmp_path_factory):
    """The configuration of google/gemma-3-4b-it, without weights"""
    folder = tmp_path_factory.mktemp("gemma4b")
    Gemma3Config(
        text_config=dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
                         vocab_size=262208, sliding_window=1024),
        vision_config=dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                           num_attention_heads=16, image_size=896, patch_size=14),
        mm_tokens_per_image=256, architectures=["Gemma3ForConditionalGeneration"],
    ).save_pretrained(folder)
    return str(folder)


def test_a_vlm_of_4b_with_the_small_wan_fits_24_gb(gemma_4b):
    needs = plan("explain", gemma_4b, device="RTX 4090", generator="wan-1.3b")
    assert not needs.fits() and needs.fits(*needs.default_choice)
    assert needs.default().offload == "parts"
    cached = kept_bytes(gemma_4b, "paper", "wan-1.3b", "first_block")
    assert needs.kept["generated"] + 2 * 3 * 2 * 14_400 * 1536 == cached["generated"]


def test_sizes_of_a_snapshot_on_disk(folders):
    """A folder's own sizes: those of the loaded networks"""
    wan, vlm = load_generator(folders["wan"], device="cpu"), load_vlm(folders["vlm"], device="cpu")
    parts = *wan.experts, wan.text_encoder, wan.vae, vlm
    assert published_bytes(folders["vlm"], folders["wan"]) == list(map(network_bytes, parts))
    with pytest.raises(FileNotFoundError, match='--include "[*].json"'):
        plan("explain", "owner/absent")
