"""Weights in bfloat16 as the libraries load them, offloaded weights, clips of any float type"""
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from transporter_nb.concepts.answer_gradients import GradientConfig, learn_by_gradient
from transporter_nb.concepts.concept import ConceptConfig
from transporter_nb.concepts.learning import learn_concept
from transporter_nb.world.contrasts import parse_contrast
from transporter_nb.coupling.testing import tiny_coupling
from transporter_nb.models.generators import wan as wan_module
from transporter_nb.models.generators.wan import (
    PARTS, WanGenerator, blank_generator, load_hub,
)
from transporter_nb.core.hub import LoadOptions
from transporter_nb.explain.transporter import Transporter
from transporter_nb.evaluate.metrics.alignment import FrameAlignment, clip_score
from transporter_nb.evaluate.metrics.readers import read_change, sweep_distances
from transporter_nb.evaluate.metrics.video import (
    frechet_video_distance, nearest_perceptual_distance, perceptual_distance,
)
from transporter_nb.models.registry import VLMS, find_adapter, load_generator, load_vlm
from transporter_nb.models.testing import tiny_config, tiny_vlm
from transporter_nb.explain.steering import steer
from transporter_nb.models.view import Models
from transporter_nb.world.video import contact_sheet, encode_gif, resize_video
from transporter_nb.models.vlms import hub as hub_module
from transporter_nb.models.vlms.base import DESCRIBE, world_words
from transporter_nb.models.vlms.hub import put_on_device

RED, CHANGE = "one large red ball slides left slowly over a stone floor", "red -> blue"
LOW = (torch.float16, torch.bfloat16, torch.float64)
QUICK = ConceptConfig(placement="word", steps=2, n_seeds=2, batch_size=2, sample_steps=2,
                      states_per_seed=1)
OPTIONS = {
    "bfloat16": LoadOptions(),
    "bfloat16, parts": LoadOptions(offload="parts"),
    "bfloat16, layers": LoadOptions(offload="layers"),
    "bfloat16, autoencoder too": LoadOptions(vae_dtype="bfloat16"),
    "float32": LoadOptions(dtype="float32"),
}


def two_experts():
    return tiny_config(
        n_layers=2, latents_mean=(.1,) * 6, latents_std=(.5,) * 6, boundary_ratio=0.875,
        guidance=(4.0, 3.0), steps=3, hub="tiny/wan", revision="main")


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    """A snapshot in the hub's layout"""
    folder, generator = tmp_path_factory.mktemp("wan"), WanGenerator.new(two_experts())
    for part in PARTS:
        getattr(generator, part).save_pretrained(folder / part)
    generator.tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def load_wan(wan_folder, monkeypatch):
    monkeypatch.setattr(wan_module, "require", lambda source: wan_folder)
    return lambda options: load_hub(two_experts(), "cpu", options)


def small(name):
    """A tiny random VLM"""
    words = [*world_words(), "frame", *(f"{k}:" for k in range(1, 6))]
    return tiny_vlm(name, words=words, image_size=32, patch_size=8, hidden_size=32, n_layers=2,
                    vision_size=32, vision_layers=2)


@pytest.fixture(scope="module")
def vlm_folders(tmp_path_factory):
    """Snapshots of every VLM in the hub's layout; Phi-4's with its vision adapter"""
    folders = {name: tmp_path_factory.mktemp(name) for name in VLMS}
    for name, folder in folders.items():
        vlm = small(name)
        vlm.model.save_pretrained(folder)
        vlm.tokenizer.save_pretrained(folder)
        if name != "phi4": continue
        lora = LoraConfig(r=2, target_modules=r"model\.layers.*o_proj", init_lora_weights=False)
        vlm.model.add_adapter(lora, "vision")
        vlm.model.save_pretrained(folder / "vision-lora")
    return folders


@pytest.fixture
def load_vlm_from_hub(vlm_folders, monkeypatch):
    def load(name, options):
        monkeypatch.setattr(hub_module, "require", lambda source: vlm_folders[name])
        settings = replace(small(name).settings, hub_id="tiny/vlm", revision="main")
        return find_adapter("vlm", name, VLMS).from_hub(settings, "cpu", options)
    return load


def couple(wan, vlm):
    return tiny_coupling(wan.latent_shape(1)[1:], wan.text_dim, wan.config.prompt_tokens,
                         vlm.n_tokens, vlm.vlm_dim, seed=1)


def clip_of(dtype=torch.float32, size=32):
    return torch.rand(2, 9, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


def types_of(network):
    return {name: value.dtype for name, value in network.named_parameters()}


def test_diffusers_keeps_some_weights_in_float32(load_wan):
    """Without them the other tests would prove nothing"""
    types = list(types_of(load_wan(LoadOptions()).transformer).values())
    assert types[0] == torch.float32 and torch.bfloat16 in types


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_dry_run_has_the_types_of_the_release(load_wan, options):
    loaded = load_wan(replace(options, offload="none"))
    blank = blank_generator("mini", two_experts(), PARTS, "cpu", options)
    for part in PARTS:
        assert types_of(getattr(loaded, part)) == types_of(getattr(blank, part))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_generation(load_wan, options):
    wan, whole = load_wan(options), load_wan(LoadOptions(dtype="float32"))
    def sample(generator):
        return generator.sample(generator.encode_prompt([RED]), seeds=[0, 1], steps=3)
    latents, expected = sample(wan), sample(whole)
    assert wan.encode_prompt([RED]).embeds.dtype == latents.dtype == torch.float32
    assert (latents - expected).square().mean().sqrt() < .03 * expected.std()
    video = wan.decode(latents)
    assert video.dtype == wan.encode(video.clamp(0, 1)).dtype == torch.float32


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", LOW)
def test_the_edges_of_the_generator(load_wan, options, dtype):
    """Velocities come back in the type of the latents, videos and encoded clips in float32"""
    wan = load_wan(options)
    noise, condition = wan.noise([0]).to(dtype), wan.encode_prompt([RED])
    assert wan.velocity(noise, condition, .9).dtype == dtype
    assert wan.decode(noise).dtype == wan.encode(clip_of(dtype)).dtype == torch.float32
    found, expected = (wan.velocity(z, condition, .123).float() for z in (noise, noise.float()))
    assert torch.allclose(found, expected, atol=.02)


def test_times_keep_their_digits(load_wan, monkeypatch):
    wan, seen = load_wan(LoadOptions()), []

    def expert(network, latents, embeds, timestep):
        seen.append(timestep.item())
        return latents
    monkeypatch.setattr(wan_module, "run_expert", expert)
    wan.velocity(wan.noise([0]).bfloat16(), wan.null_condition(1), .123)
    assert seen == [pytest.approx(877., abs=1e-3)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", VLMS)
def test_every_vlm_from_prompt_to_answer(load_wan, load_vlm_from_hub, name, options):
    wan, vlm = load_wan(options), load_vlm_from_hub(name, options)
    coupling, pair = couple(wan, vlm), parse_contrast(CHANGE)
    video = wan.decode(wan.sample(wan.encode_prompt([RED]), seeds=[0], steps=2)).clamp(0, 1)
    tokens = vlm.embed(video)
    assert tokens.shape == (1, vlm.n_tokens, vlm.vlm_dim) and tokens.isfinite().all()
    log_probs = vlm.next_token_log_probs(tokens, DESCRIBE)
    assert log_probs.dtype == torch.float32 and abs(log_probs.exp().sum().item() - 1) < 1e-3
    for phi in (None, coupling):
        concept = learn_concept(Models(wan, vlm, phi), pair, RED, QUICK, progress=False)
        assert concept.vectors.dtype == torch.float32 and concept.vectors.isfinite().all()
        assert concept.meta["unexplained"] >= 0
    run = steer(wan, RED, wan.noise([0]), concept, [0., .5, 1.], steps=2)
    latents, condition = run.latents[0], run.condition
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    seen = vlm.embed(wan.decode(latents).clamp(0, 1))
    for part in coupling(latents, condition.embeds, condition.mask, seen):
        assert part.dtype == torch.float32 and part.isfinite().all()


@pytest.mark.parametrize("name", ["phi4", "gemma3"])
def test_an_explanation_with_all_that_belongs_to_it(load_wan, load_vlm_from_hub, name):
    wan, vlm = load_wan(LoadOptions()), load_vlm_from_hub(name, LoadOptions())
    l2v = Transporter(wan, vlm, couple(wan, vlm), names={"scale": "paper"})
    l2v.bank.learn(Models(wan, vlm, l2v.coupling), CHANGE, RED, QUICK, False)
    for weight in (0., .5, 1.):
        e = l2v.explain(RED, CHANGE, strengths=2, steps=2, vlm_weight=weight)
        assert e.phi.target.isfinite().all() and e.videos.dtype == torch.float32
    assert e.certificate is not None
    config = GradientConfig(steps=2, batch_size=2, n_clips=2, sample_steps=1, through="phi")
    learned = learn_by_gradient(Models(wan, vlm, l2v.coupling), CHANGE, [RED], config)
    assert learned.vectors.isfinite().all() and learned.vectors.dtype == torch.float32


@pytest.mark.parametrize("offload", ["parts", "layers"])
@pytest.mark.parametrize("name", VLMS)
def test_offloading_changes_nothing(name, offload):
    whole, moved = small(name), put_on_device(small(name), LoadOptions(offload=offload), "cpu")
    assert all(value.is_meta for value in moved.parameters())
    tokens = whole.embed(clip_of())
    assert torch.equal(moved.embed(clip_of()), tokens)
    answers = [vlm.next_token_log_probs(tokens, DESCRIBE) for vlm in (whole, moved)]
    assert torch.equal(*answers)
    assert all(value.is_meta for value in moved.parameters()) # nothing stays behind


def test_the_vision_adapter_of_phi4_is_loaded(load_vlm_from_hub):
    names = [name for name, _ in load_vlm_from_hub("phi4", LoadOptions()).model.named_parameters()]
    assert any("lora_A.frames" in name for name in names)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", VLMS)
@pytest.mark.parametrize("size", [32, 48])
def test_a_vlm_takes_clips_of_any_float_type(name, dtype, size):
    vlm, clip = small(name), clip_of(dtype, size)
    assert torch.allclose(vlm.embed(clip), vlm.embed(clip.float()), atol=1e-4)


def brought_by_the_reader(clips):
    texts = lambda captions: torch.ones(len(captions), 3072)
    return clip_score(clips, [RED] * len(clips), FrameAlignment(torch.nn.Flatten(), texts, "own"))


def frechet(clips):
    distance = frechet_video_distance(clips.repeat(3, 1, 1, 1, 1), clip_of())
    return torch.tensor(distance.estimate.value)


MEASURES = {
    "clip score": lambda x: clip_score(x, [RED] * len(x)),
    "an image model": brought_by_the_reader,
    "Frechet distance": frechet,
    "perceptual distance": lambda x: perceptual_distance(x, x.flip(0)),
    "nearest clip": lambda x: nearest_perceptual_distance(x, clip_of()),
    "sweep": lambda x: sweep_distances(torch.stack([x, x.flip(0), x]))[0],
    "readers": lambda x: read_change(x, RED, CHANGE, x.flip(0)).readable,
    "resize": lambda x: resize_video(x, 20),
    "sheet": lambda x: torch.from_numpy(contact_sheet(x)),
    "picture": lambda x: torch.tensor(encode_gif(x[0])[:3] == b"GIF"),
}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_measures_take_clips_of_any_float_type(measure, dtype):
    clip = clip_of(dtype)
    found, expected = measure(clip).float(), measure(clip.float()).float()
    assert torch.allclose(found, expected, atol=4e-3) # a result may be in bfloat16


@pytest.mark.parametrize("dtype", LOW)
def test_phi_takes_tensors_of_any_float_type(dtype):
    wan, vlm = load_generator(device="cpu"), load_vlm("phi4", device="cpu")
    coupling, condition = couple(wan, vlm), wan.encode_prompt([RED])
    tokens = torch.randn(1, vlm.n_tokens, vlm.vlm_dim, generator=torch.Generator().manual_seed(3))
    parts = wan.noise([0]), condition.embeds, tokens
    latents, embeds, seen = (value.to(dtype) for value in parts)
    for t in (.3, torch.tensor([.3], dtype=dtype)):
        output = coupling(latents, embeds, condition.mask, seen, t)
        wide = latents.float(), embeds.float(), condition.mask, seen.float()
        expected = coupling(*wide, float(t))
        for one, other in zip(output, expected):
            assert one.dtype == torch.float32 and torch.allclose(one, other, atol=1e-3)
    assert coupling.projection(latents, embeds, condition.mask, .3).dtype == torch.float32
    assert coupling.structure(seen, .3).dtype == torch.float32
