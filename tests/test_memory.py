"""Memory by construction: batches change no result, plans are what is measured, and a wrong number,
size or parameter is refused before work begins"""
import re
from dataclasses import replace

import nbformat
import numpy as np
import pytest
import torch
from test_papermill import EXPERIMENTS, parameter_cells

from transporter_nb.concepts.bank import ConceptBank
from transporter_nb.concepts.concept import Concept, ConceptConfig
from transporter_nb.core.hub import LoadOptions
from transporter_nb.core.memory import AliveBytes, rows_at_once
from transporter_nb.core.parameters import check_parameters, read_options
from transporter_nb.coupling.testing import tiny_coupling
from transporter_nb.explain.budget import explanation_cost, explanation_stage
from transporter_nb.explain.plan import plan
from transporter_nb.explain.stages import measured_workspace
from transporter_nb.explain.transporter import Transporter
from transporter_nb.models import testing
from transporter_nb.models.generators.wan import WanConfig, WanTransformerConfig
from transporter_nb.world.contrasts import parse_contrast

RED = "one large red ball slides left slowly over a stone floor"


@pytest.fixture(scope="module")
def l2v():
    wan, vlm = testing.tiny_generator(steps=3), testing.tiny_vlm()
    vectors = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    concept = Concept(parse_contrast("red -> blue"), vectors, ConceptConfig(placement="word"))
    return Transporter(wan, vlm, tiny_coupling(vlm_tokens=vlm.n_tokens), ConceptBank([concept]))


def test_results_do_not_depend_on_the_batch_size(l2v):
    whole = l2v.explain(RED, "red -> blue", strengths=4)
    for size in (1, 3, 50):
        cut = l2v.explain(RED, "red -> blue", strengths=4, batch_size=size)
        torch.testing.assert_close(cut.videos, whole.videos, atol=1e-5, rtol=0)
        torch.testing.assert_close(cut.phi.target, whole.phi.target, atol=1e-5, rtol=0)
        torch.testing.assert_close(cut.reencoded.target, whole.reencoded.target, atol=1e-5, rtol=0)
        torch.testing.assert_close(cut.distance, whole.distance, atol=1e-5, rtol=0)
        assert cut.phi.captions == whole.phi.captions


def test_the_network_sees_no_more_rows_than_asked(l2v, monkeypatch):
    seen, wan, vlm = [], l2v.generator, l2v.vlm
    for owner, name in ((wan, "velocity"), (wan, "decode"), (vlm, "embed"), (vlm, "text_logits")):
        def counted(given, *rest, of=getattr(owner, name)):
            seen.append(len(given))
            return of(given, *rest)
        monkeypatch.setattr(owner, name, counted)
    l2v.explain(RED, "red -> blue", strengths=5, batch_size=2)
    assert max(seen) == 2


def test_little_free_memory_makes_small_batches(l2v, monkeypatch):
    whole = l2v.explain(RED, "red -> blue", strengths=4)
    seen, velocity = [], l2v.generator.velocity
    def counted(latents, *rest):
        seen.append(len(latents))
        return velocity(latents, *rest)
    monkeypatch.setattr(l2v.generator, "velocity", counted)
    monkeypatch.setattr("transporter_nb.core.memory.free_memory", lambda device: 1)
    scarce = l2v.explain(RED, "red -> blue", strengths=4)
    assert max(seen) == 1
    torch.testing.assert_close(scarce.videos, whole.videos, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [0, -1, True])
def test_a_batch_size_that_holds_no_row_is_refused(l2v, size):
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        l2v.explain(RED, "red -> blue", batch_size=size)


def test_bytes_alive_are_counted_on_numbers():
    given = torch.ones(500)
    with AliveBytes() as alive: (given + 1) * 2
    assert alive.peak == 4 * 1000
    assert [rows_at_once(10, free, 99) for free in (None, 250, 0)] == [64, 20, 1]


@pytest.mark.parametrize("guidance", [np.float32(2), np.int64(2), torch.tensor(2.), 2])
def test_one_number_of_any_kind_is_one_guidance(l2v, guidance):
    made = l2v.explain(RED, "red -> blue", strengths=[1.], guidance=guidance)
    assert made.settings["guidance"] == 2. and type(made.settings["guidance"]) is float


@pytest.mark.parametrize(
    "guidance", [float("nan"), float("inf"), -1., True, "2", [2.], torch.ones(3), (1., np.nan)],
)
def test_a_guidance_that_makes_no_velocity_is_named(l2v, monkeypatch, guidance):
    monkeypatch.setattr(l2v.generator, "velocity", lambda *given: pytest.fail("work began"))
    with pytest.raises(ValueError, match="guidance must be one finite number"):
        l2v.explain(RED, "red -> blue", guidance=guidance)


@pytest.mark.parametrize("wrong", [
    dict(frames=8), dict(frames=7), dict(frames=10), dict(frames=0), dict(height=36),
    dict(width=36), dict(height=0), dict(width=-32),
    dict(height=40, transformer=WanTransformerConfig(patch_size=(1, 2, 2))),
])
def test_sizes_that_wan_cannot_hold_are_refused_when_they_are_named(wrong):
    with pytest.raises(ValueError, match="nearest"): WanConfig(**wrong)


def test_latents_of_odd_size_are_refused():
    wan = testing.tiny_generator()
    bad = torch.zeros(wan.latent_shape(1))[:, 1:]
    with pytest.raises(ValueError, match="latents must be"):
        wan.velocity(bad, wan.encode_prompt([RED]), .5)


def test_concepts_at_paper_scale_are_learned_with_the_paper_s_settings():
    generator = testing.tiny_generator()
    assert ConceptConfig.of(generator) == ConceptConfig.mini()
    generator.config = replace(generator.config, words=()) # its tokenizer is the hub's
    assert ConceptConfig.of(generator) == ConceptConfig.paper()


@pytest.mark.parametrize("clips, rows", [(3, 1), (5, 20)])
def test_the_predicted_memory_of_an_explanation_is_measured(clips, rows):
    torch.set_num_threads(1)
    cost = explanation_cost(clips, rows, "phi4", target="cpu")
    measured, _ = measured_workspace(explanation_stage(clips, rows, "phi4", device="cpu").call)
    assert abs(cost.workspace / measured - 1) < .1


def test_a_plan_counts_the_sweep():
    short, long = plan("fig7", "phi4", "mini", "cpu"), plan("fig3", "phi4", "mini", "cpu")
    grown = long.peak("decode") - short.peak("decode")
    assert grown == (12 - 8) * long.kept["seen"] > 0
    assert "options by default" in repr(long) and "rows at once" in repr(long)


def test_options_are_words_anywhere():
    assert read_options("offload=parts, vae_tiling").loading.offload == "parts"
    with pytest.raises(ValueError, match="Did you mean 'offload'"):
        Transporter.load("phi4", options="ofload=parts")


def test_a_parameter_that_a_notebook_does_not_take_is_refused():
    cells = ["", "seed = 0\nscale = 'mini'", "# Parameters\nnonsense = 3\nscal = 'paper'\n"]
    with pytest.raises(ValueError, match="'nonsense', 'scal'. Did you mean 'scale'"):
        check_parameters({"In": cells})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_notebook_checks_the_names_of_its_parameters(name):
    source = "\n".join(
        cell.source for cell in nbformat.read(EXPERIMENTS[name], 4).cells
        if cell.cell_type == "code"
    )
    assert re.search(r"check_parameters\(globals\(\)\)|figure_stem\([^)]*globals\(\)", source), name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_notebook_that_explains_takes_scale_and_options(name):
    notebook = nbformat.read(EXPERIMENTS[name], 4)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    if "Transporter.load(" not in source: return
    tagged, = parameter_cells(notebook)
    for parameter in ("scale", "options"):
        assert f"{parameter} = " in tagged.source and f"{parameter}={parameter}" in source, name


def test_options_of_loading_reach_the_device_by_default(monkeypatch):
    from transporter_nb.explain.budget import fitted_options
    assert fitted_options([1, 2], None) == LoadOptions()
    assert fitted_options([60, 60], 100).offload == "parts"
    assert fitted_options([90], 100).offload == "layers"
