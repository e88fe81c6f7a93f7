"""Every VLM with every generator at paper scale: load, learn, explain, shape, certify, save"""
import json
import math
from pathlib import Path

import pytest
import torch

import here
from releases import RED, WORDS
from transporter_nb.concepts.bank import ConceptBank
from transporter_nb.concepts.concept import ConceptConfig
from transporter_nb.concepts.directions import mean_text_difference
from transporter_nb.explain.transporter import Transporter
from transporter_nb.models.registry import VLMS

NBS = Path(__file__).resolve().parents[2] / "nbs"
CHANGE = "red -> blue"
GRID = [(vlm, generator) for vlm in VLMS for generator in ("wan", "wan-1.3b")]


def load(vlm, generator="wan", more=""):
    return Transporter.load(vlm, generator, scale="paper", device="cpu", options=WORDS + more)


@pytest.fixture(scope="module", params=GRID, ids="-".join)
def l2v(snapshots, request): return load(*request.param)


@pytest.fixture(scope="module")
def explained(l2v):
    return l2v.explain(RED, CHANGE, strengths=2, progress=False)


def test_a_release_is_loaded_in_bfloat16_in_the_sizes_asked_for(l2v, capsys):
    types = {value.dtype for value in l2v.generator.transformer.parameters()}
    assert types == {torch.bfloat16, torch.float32}  # diffusers keeps some
    assert l2v.vlm.model.dtype == torch.bfloat16
    config, two = l2v.generator.config, l2v.names["generator"] == "wan"
    assert (config.frames, config.height, config.width) == (5, 32, 32)
    assert (l2v.generator.transformer_2 is not None) == two and l2v.generator.default_steps == 2
    assert l2v.vlm.settings.n_frames == 2 and l2v.names["options"] == WORDS
    adapters = [name for name in l2v.vlm.state_dict() if "lora_" in name]
    assert bool(adapters) == (l2v.vlm.name == "phi4")


def test_a_missing_concept_is_learned_as_the_paper_learns(l2v, explained):
    concept = l2v.bank[CHANGE]
    assert concept.config == ConceptConfig.paper(steps=2, n_seeds=2)
    assert len(concept.meta["losses"]) == 2 and concept.vectors.any()
    assert concept.meta["divergence"] > 1e-3


def test_an_explanation_has_clips_and_answers(explained):
    assert explained.videos.shape == (2, 5, 3, 32, 32) and explained.videos.isfinite().all()
    for said in (explained.phi, explained.reencoded):
        chances = torch.cat([said.source, said.target])
        assert ((0 < chances) & (chances < 1)).all() and said.divergence.isfinite().all()
        assert said.divergence[0] == 0 and len(said.captions) == 2
    assert explained.phi is explained.reencoded and not explained.settings["coupled"]
    assert explained.settings["steps"] == 2


def test_the_vlm_shapes_a_concept(l2v):
    e = l2v.explain(RED, CHANGE, strengths=[1.], progress=False, vlm_weight=1.)
    measured, = e.settings["concepts"]  # the VLM's answers to varied words, and no learning
    assert measured["pair"] == CHANGE and measured["answers"] is not None
    assert e.settings["vlm_weight"] == 1 and e.videos.isfinite().all()


def test_a_certificate_is_given(explained):
    facts = explained.certificate.as_dict()
    assert facts and explained.is_certified


def test_an_explanation_is_saved_with_its_options(explained, desk):
    saved = explained.save(desk / "red")
    assert {path.suffix for path in map(type(desk), saved)} >= {".png", ".gif", ".json"}
    record = json.loads((desk / "red.json").read_text())
    assert WORDS in json.dumps(record)
    assert "<img" in explained._repr_html_()


def test_a_figure_is_drawn(l2v, explained, desk, monkeypatch):
    """Figure 5 with these models as they are: nothing is loaded or learned again"""
    monkeypatch.setattr(Transporter, "load", lambda **given: l2v)
    names = {kind: l2v.names[kind] for kind in ("vlm", "generator")}
    here.run(NBS / "fig5.ipynb", desk / "out.ipynb", scale="paper", device="cpu", options=WORDS,
             caption=RED, source="red", target="blue", n_strengths=2, **names)
    record, = (json.loads(path.read_text()) for path in desk.glob("fig5_*.json"))
    assert record["parameters"] | names == record["parameters"]
    assert len(record["sweep"]) == 2 and not record["inverted"]
    for ending in ("png", "pdf", "gif"):
        drawn, = desk.glob(f"fig5_*.{ending}")
        assert drawn.stat().st_size > 1000


def test_a_bank_comes_back_and_explains_alike(l2v, explained, tmp_path):
    path = tmp_path / "concepts.safetensors"
    l2v.bank.save_pretrained(path)
    bank = ConceptBank.from_pretrained(path)
    again = Transporter(l2v.generator, l2v.vlm, None, bank, l2v.names, l2v.usual)
    e = again.explain(RED, CHANGE, strengths=2, progress=False)
    assert torch.equal(e.videos, explained.videos)
    assert torch.equal(e.phi.target, explained.phi.target)


@pytest.mark.parametrize("offload", ["parts", "layers"])
@pytest.mark.parametrize("vlm", VLMS)
def test_offloaded_weights_explain_alike(snapshots, vlm, offload):
    here, away = load(vlm), load(vlm, more=f", offload={offload}, vae_tiling")
    for l2v in (here, away): l2v.bank = small_bank(here)
    one, other = (l2v.explain(RED, CHANGE, strengths=[1.], progress=False) for l2v in (here, away))
    assert torch.allclose(one.videos, other.videos, atol=1e-4)
    # logits of bfloat16 have steps of up to 6 % of a probability (between 8 and 16: .0625)
    assert torch.allclose(one.phi.target, other.phi.target, rtol=.07)
    assert math.isclose(one.distance[0], other.distance[0], rel_tol=.02)


def small_bank(l2v):
    "A concept without training: the difference of both captions"
    pair = l2v.changes(RED, CHANGE)[1]
    return ConceptBank([mean_text_difference(l2v.generator, pair, [RED], "sequence")])
