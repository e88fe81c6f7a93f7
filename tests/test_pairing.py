"""A coupling or a bank works with the models it was made for; any other pairing is refused"""
import shutil
from copy import deepcopy
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from transporter_nb.explain import transporter as l2v_module
from transporter_nb.concepts.bank import ConceptBank
from transporter_nb.concepts.concept import Concept, ConceptConfig
from transporter_nb.world.contrasts import parse_contrast
from transporter_nb.core.base import (
    checkpoint_path, load_checkpoint, save_checkpoint, tensor_digest,
)
from transporter_nb.coupling.network import CouplingNetwork
from transporter_nb.models import view
from transporter_nb.models.generators.wan import WanGenerator
from transporter_nb.explain.transporter import Transporter
from transporter_nb.models.registry import load_generator, load_vlm
from transporter_nb.app.page import MISLED, load_transporter
from transporter_nb.models.view import Models

RED = "one large red ball slides left slowly over a stone floor"
SHIPPED = ("phi4", "gemma3", "videollama3")
DIGESTS = { # of the tensors before the files had a record: a record changes no weight
    "coupling_phi4": "f9537122c368",
    "coupling_gemma3": "a165bfe8b6ce",
    "coupling_videollama3": "86304ec8b2fe",
    "concepts_phi4": "695dd88725a6",
    "concepts_gemma3": "695dd88725a6",
    "concepts_videollama3": "695dd88725a6",
}
SMALL = ConceptConfig(steps=1, n_seeds=2, batch_size=2, sample_steps=1, states_per_seed=1)


@pytest.fixture(scope="module")
def wan():
    return load_generator(device="cpu")


@pytest.fixture(scope="module")
def vlms():
    return {name: load_vlm(name, device="cpu") for name in SHIPPED}


@pytest.fixture(scope="module")
def couplings():
    paths = {name: checkpoint_path(f"coupling_{name}") for name in SHIPPED}
    return {name: CouplingNetwork.from_pretrained(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def banks():
    paths = {name: checkpoint_path(f"concepts_{name}") for name in SHIPPED}
    return {name: ConceptBank.from_pretrained(path) for name, path in paths.items()}


@pytest.fixture
def no_clips(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a clip was made")
    monkeypatch.setattr(WanGenerator, "sample", never)


def refused(words, *parts):
    with pytest.raises(ValueError, match=words):
        Transporter(*parts)


@pytest.mark.parametrize("name", DIGESTS)
def test_a_record_changed_no_weight(name):
    path = checkpoint_path(name)
    assert tensor_digest(load_checkpoint(path).tensors)[:12] == DIGESTS[name]
    assert path.stat().st_size < 16 * 2**20


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_name_their_models(name, wan, vlms, couplings, banks):
    records = [concept.meta["made_for"] for concept in banks[name].values()]
    assert len(records) == 18
    for record in [couplings[name].made_for, *records]:
        assert (record["vlm"], record["generator"]) == (name, "wan")
        assert record["sizes"]["vlm_tokens"] == vlms[name].n_tokens
        assert record["sizes"]["latent_shape"] == list(wan.latent_shape(1)[1:])


@pytest.mark.parametrize("vlm,other", permutations(SHIPPED, 2))
@pytest.mark.parametrize("part,fix", [("coupling", "make train"), ("concepts", "bank.adopt")])
def test_every_wrong_pairing_is_refused(vlm, other, part, fix, tmp_path, monkeypatch, no_clips):
    wrong = tmp_path / "wrong.safetensors"
    shutil.copyfile(checkpoint_path(f"{part}_{other}"), wrong)

    def elsewhere(name, scale="mini"):
        return wrong if name == f"{part}_{vlm}" else checkpoint_path(name, scale)
    monkeypatch.setattr(l2v_module, "checkpoint_path", elsewhere)
    rule = f"for the VLM '{other}'.*'{vlm}'|made for VLM tokens|measured with '{other}'.*'{vlm}'"
    with pytest.raises(ValueError, match=rule) as error:
        Transporter.load(vlm=vlm, device="cpu")
    assert fix in str(error.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_right_pairing_loads(name, no_clips):
    l2v = Transporter.load(vlm=name, device="cpu")
    assert len(l2v.bank) == 18 and l2v.coupling.made_for["vlm"] == name


def test_models_refuse_what_a_transporter_refuses(wan, vlms, couplings, no_clips):
    with pytest.raises(ValueError, match="make train PART=coupling VLM=gemma3"):
        Models(wan, vlms["gemma3"], couplings["phi4"])
    whole = Models(wan, vlms["phi4"], couplings["phi4"])
    assert whole.routed("reencoded").coupling is None


def test_a_transporter_checks_its_models_once(wan, vlms, couplings, monkeypatch):
    l2v = Transporter(wan, vlms["phi4"], couplings["phi4"])
    asked = []
    monkeypatch.setattr(view, "check_coupling", lambda *parts: asked.append(parts))
    assert l2v.models is l2v.models and not asked
    l2v.coupling = None
    assert l2v.models.coupling is None and not asked
    l2v.coupling = couplings["phi4"]
    assert l2v.models.coupling is couplings["phi4"] and len(asked) == 1


def test_a_planted_vlm_keeps_the_honest_coupling(no_clips):
    for name in MISLED:
        assert load_transporter(name, device="cpu").coupling.made_for["vlm"] == "videollama3"


def test_a_language_model_may_change_and_a_tower_may_not(wan, vlms, couplings, banks):
    coupling, bank, tuned = couplings["gemma3"], banks["gemma3"], deepcopy(vlms["gemma3"])
    tuned.model.model.language_model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert Transporter(wan, tuned, coupling, bank).coupling is coupling
    for value in tuned.model.model.vision_tower.parameters():
        value.mul_(1.2)
    refused("tokens of a fixed clip.*make train", wan, tuned, coupling)
    refused("tokens of a fixed clip.*bank.adopt", wan, tuned, None, bank)
    assert Transporter(wan, tuned).coupling is None # decode and re-encode needs no file


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_are_the_same_models(name, dtype, wan, vlms, couplings, banks):
    low = [deepcopy(model).to(dtype) for model in (wan, vlms[name])]
    assert Transporter(*low, couplings[name], banks[name]).bank is banks[name]


def test_another_generator_is_refused(wan, vlms, couplings, banks):
    vlm, coupling, bank = vlms["phi4"], couplings["phi4"], banks["phi4"]
    fresh, trained_on = WanGenerator.new(wan.config, seed=5).freeze(), deepcopy(wan)
    for value in trained_on.transformer.parameters():
        value.mul_(1.3)
    refused("the concept '.*states of the empty prompt.*bank.learn", fresh, vlm, None, bank)
    refused("the concept '.*velocity at fixed latents.*bank.learn", trained_on, vlm, None, bank)
    refused("the coupling.*states of the empty prompt", fresh, vlm, coupling)
    Transporter(trained_on, vlm, coupling) # latents and prompts mean what they meant


def test_wrong_sizes_are_refused_without_a_record(wan, vlms, couplings):
    config = couplings["phi4"].config
    sizes = {"vlm_tokens": 20, "vlm_dim": 64, "text_dim": 32, "latent_shape": (96, 5, 4, 8)}
    for name, size in sizes.items():
        wrong = CouplingNetwork(replace(config, **{name: size}))
        refused("the coupling was made for", wan, vlms["phi4"], wrong)
    Transporter(wan, vlms["phi4"], CouplingNetwork(config)) # fresh from a training
    pair = parse_contrast("red -> blue")
    narrow = Concept(pair, torch.zeros(1, 7), ConceptConfig(placement="word"))
    refused("vectors of width 7.*width 96", wan, vlms["phi4"], None, ConceptBank([narrow]))


def test_an_old_coupling_is_taken_with_a_warning(wan, vlms, tmp_path):
    tensors, config = load_checkpoint(checkpoint_path("coupling_gemma3"))
    config.pop("made_for")
    path = save_checkpoint(tmp_path / "old.safetensors", tensors, config)
    with pytest.warns(UserWarning, match="old.safetensors does not say which generator and VLM"):
        old = CouplingNetwork.from_pretrained(path)
    Transporter(wan, vlms["gemma3"], old)
    refused("VLM tokens, in number 20, and these models have 65", wan, vlms["phi4"], old)


def test_an_old_bank_is_taken_with_a_warning(wan, vlms, tmp_path):
    tensors, config = load_checkpoint(checkpoint_path("concepts_gemma3"))
    for entry in config["concepts"].values():
        entry["meta"].pop("made_for")
    path = save_checkpoint(tmp_path / "old.safetensors", tensors, config)
    with pytest.warns(UserWarning, match="old.safetensors does not say which generator"):
        bank = ConceptBank.from_pretrained(path)
    Transporter(wan, vlms["gemma3"], None, bank)
    refused("measured with 'gemma3'", wan, vlms["phi4"], None, bank) # the VLM was always named


def test_round_trip(couplings, banks, tmp_path):
    path = tmp_path / "again.safetensors"
    again = CouplingNetwork.from_pretrained(couplings["phi4"].save_pretrained(path))
    assert again.made_for == couplings["phi4"].made_for
    assert again.config == couplings["phi4"].config
    bank = ConceptBank.from_pretrained(banks["phi4"].save_pretrained(path))
    assert bank.facts == banks["phi4"].facts
    assert all(bank[name].meta == concept.meta for name, concept in banks["phi4"].items())


def test_learning_and_adopting_leave_a_record(wan, vlms, couplings, tmp_path):
    bank, adopted, gemma = ConceptBank(), ConceptBank(), vlms["gemma3"]
    parts = wan, vlms["phi4"], couplings["phi4"]
    learned = bank.learn(Models(*parts), "red -> blue", RED, SMALL, progress=False)
    assert learned.meta["made_for"]["vlm"] == "phi4"
    refused("bank.adopt", wan, gemma, None, bank)
    taken = adopted.adopt(learned, Models(wan, gemma, couplings["gemma3"]))
    assert taken.meta["made_for"]["vlm"] == taken.meta["vlm"] == "gemma3"
    assert torch.equal(taken.vectors, learned.vectors)
    Transporter(wan, gemma, couplings["gemma3"], adopted)
    again = ConceptBank.from_pretrained(adopted.save_pretrained(tmp_path / "bank.safetensors"))
    Transporter(wan, gemma, couplings["gemma3"], again)
    with pytest.raises(ValueError, match="was made for the generator 'wan'"):
        adopted.adopt(learned, Models(WanGenerator.new(wan.config, seed=5).freeze(), gemma))
