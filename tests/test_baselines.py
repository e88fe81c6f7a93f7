"""The recipes of feature visualisation: refusals, both modes, independence of clips, and the
settings that tables use."""
import pytest
import torch

from transporter_nb.evaluate.baselines.canvas import PhaseCanvas, PixelCanvas, mean_magnitude
from transporter_nb.evaluate.baselines.recipes import (
    BASELINES, COUNTS_FROM, LOGIT, MINI, PUBLISHED, RECIPES, BaselineSettings, Late, Question, ask,
    invert_baseline,
)
from transporter_nb.evaluate.baselines.objectives import VisionReader
from transporter_nb.world.contrasts import parse_contrast
from transporter_nb.models.encoders.networks import FrameEncoder
from transporter_nb.models.registry import VLMS, shipped_vlm_names
from transporter_nb.models.testing import tiny_vlm
from transporter_nb.world.words import caption, do, render, sample_scenes

SCENES = [do(scene, colour="blue", count="one") for scene in sample_scenes(2, seed=62_000)]
CAPTIONS = [caption(scene) for scene in SCENES]


@pytest.fixture(scope="module")
def real(): return render(sample_scenes(5, seed=62_001))


@pytest.fixture(scope="module")
def guide():
    torch.manual_seed(0)
    return FrameEncoder().eval()


def small(name): return tiny_vlm(name, hidden_size=24, vision_size=16, vision_layers=2)


def run(name, vlm, real, guide, mode="max", **changes):
    given = dict(
        settings=BaselineSettings(4, .01), stimulus=render(SCENES), guide=guide, progress=False,
    )
    if mode == "divergence": given |= dict(base_videos=render(SCENES), wanted=[.3, .6])
    return invert_baseline(
        name, vlm, CAPTIONS, ["blue -> green"] * 2, [4, 9], real, mode=mode, **given | changes,
    )


def recipe(name, real, guide, settings, vlm="phi4"):
    reader = VisionReader(small(vlm))
    objective = Late(
        ask(reader, CAPTIONS, [parse_contrast("blue -> green")] * 2, "max", "log_prob"), 3,
    )
    return RECIPES[name](Question(reader, objective, [4, 9], real, render(SCENES), guide), settings)


@pytest.mark.parametrize("vlm", ["gemma3", "videollama3"])
# the two that look inside the tower or at its patches; phi4 is in the notebook
@pytest.mark.parametrize("name", ["GradViT", "LEAPS"])
def test_every_vlm(vlm, name, real, guide):
    for mode in ("max", "divergence"):
        found = run(name, small(vlm), real, guide, mode)
        assert found.videos.shape == (2, 9, 3, 32, 32) and found.videos.isfinite().all()
        assert (found.best_step >= COUNTS_FROM * 4).all()


def test_vlm_is_left_alone(real, guide):
    vlm = small("phi4")
    vlm.embed(real[:1])  # transformers installs hooks of its own on the first pass
    def hooks():
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in (*vlm.modules(), *guide.modules())
        )
    before, hooked = [parameter.clone() for parameter in vlm.parameters()], hooks()
    for name in ("LEAPS", "GradViT"): run(name, vlm, real, guide)
    assert all(parameter.grad is None for parameter in vlm.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, vlm.parameters()))
    assert hooks() == hooked


def test_maco_keeps_the_magnitude(real, guide):
    found = run(
        "MACO", small("phi4"), real, guide,
        settings=BaselineSettings(6, .3, crop=(.5, 1.), noise=.05),
    )
    spectrum = torch.fft.rfftn(
        found.videos.double().logit().transpose(1, 2), dim=(-3, -2, -1), norm="ortho",
    ).abs()
    assert torch.allclose(
        spectrum.float(), mean_magnitude(real).abs().expand_as(spectrum), atol=2e-2, rtol=2e-2,
    )


def test_recipes_differ_as_published(real, guide):
    made = {
        name: recipe(
            name, real, guide,
            PUBLISHED[name] if name not in ("AM, jittered", "LEAPS", "GradViT")
            else BaselineSettings(100, .3, jitter=2),
        )
        for name in BASELINES
    }
    assert isinstance(made["MACO"].canvas, PhaseCanvas)
    assert made["MACO"].config.optimiser == "nadam"
    assert set(made["MACO"].terms) == {"target"}
    assert isinstance(made["AM"].canvas, PixelCanvas)
    assert made["AM"].augment is None
    assert made["AM, jittered"].augment is not None
    assert made["GradViT"].config.stages == {"image": (.5, 1.)}
    assert made["GradViT"].terms["image"].weight == .004
    assert made["GradViT"].terms["target"].weight == .005
    assert tuple(made["GradViT"].config.betas) == tuple(made["LEAPS"].config.betas) == (.5, .9)
    assert recipe("LEAPS", real, guide, BaselineSettings(1500, .6)).config.warmup == 100
    assert set(LOGIT) == set(BASELINES) - {"GradViT", "LEAPS"}


def test_prior_scales_all_but_the_target(real, guide):
    for name in ("AM", "GradViT", "LEAPS"):
        one, ten = (
            recipe(name, real, guide, BaselineSettings(10, .1, prior=factor)).terms
            for factor in (1., 10.)
        )
        for term in one:
            assert ten[term].weight == pytest.approx(
                one[term].weight * (1 if term == "target" else 10)
            ), (name, term)


def test_refusals(real, guide):
    vlm = small("phi4")
    with pytest.raises(ValueError, match="'GradViT', 'MACO', 'LEAPS', got 'DIP'"):
        run("DIP", vlm, real, guide)
    with pytest.raises(ValueError, match="base_videos and wanted is None"):
        invert_baseline("AM", vlm, CAPTIONS, ["blue -> green"] * 2, [0, 1], real, mode="divergence")
    with pytest.raises(ValueError, match=r"a Hellinger distance is in \[0, 1\]"):
        run("AM", vlm, real, guide, "divergence", wanted=[.5, 1.5])
    with pytest.raises(ValueError, match="got 0, 0 and 0"):
        invert_baseline("AM", vlm, [], [], [], real)
    with pytest.raises(ValueError, match="Call vlm.freeze"):
        run("AM", small("phi4").requires_grad_(True), real, guide)


def test_settings_of_the_tables():
    for name in BASELINES:
        assert BaselineSettings.published(name).steps >= 1000
        for vlm in shipped_vlm_names():
            settings = BaselineSettings.mini(name, vlm)
            assert settings.flip == 0, "left and right are words of the world"
            assert settings.steps <= 300
        assert BaselineSettings.mini(name) == MINI[name]
