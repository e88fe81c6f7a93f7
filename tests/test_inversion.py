"""The inversion engine on tiny, untrained VLMs: clips of a batch do not know of each other, runs
continue to the same bits, nothing of the VLM changes."""
from functools import cache, partial

import pytest
import torch

from transporter_nb.evaluate.baselines.canvas import (
    FourierCanvas, PhaseCanvas, PixelCanvas, mean_magnitude,
)
from transporter_nb.evaluate.baselines.inversion import InversionConfig, Term, invert
from transporter_nb.evaluate.baselines.objectives import (
    BatchNormGuide, Coherence, FeatureStatistics, JaccardSimilarity, TargetToken,
    TeacherForcedAnswer, VisionReader, WantedDivergence, vision_layers,
)
from transporter_nb.evaluate.baselines.priors import (
    add_noise, chain, jitter, patch_borders, random_crop, temporal_variation, total_variation,
)
from transporter_nb.models.registry import VLMS
from transporter_nb.models.testing import tiny_vlm
from transporter_nb.models.vlms.base import Turn
from transporter_nb.world.words import render, sample_scenes

SHAPE = (9, 16, 16)
CAPTIONS = {
    3: "one large red ball slides left slowly over a stone floor",
    5: "two small red rings bounce right quickly over a sandy floor",
    8: "one small red cone climbs left quickly over a leafy floor",
}
AUGMENT = chain(
    partial(jitter, pixels=2), partial(random_crop, low=.7, high=.9), partial(add_noise, std=.02),
)


@pytest.fixture(scope="module")
def real():
    clips = render(sample_scenes(6, seed=0))
    return torch.nn.functional.avg_pool2d(clips.flatten(0, 2)[:, None], 2).view(6, 9, 3, 16, 16)


@cache
def tiny(name):
    """An adapter with random weights, and how many hooks its vision blocks have by themselves."""
    torch.manual_seed(1)
    vlm = tiny_vlm(name, hidden_size=24, vision_size=16, vision_layers=2)
    # some classes of transformers hook themselves at the first pass
    vlm.embed(torch.rand(1, *SHAPE[:1], 3, *SHAPE[1:]))
    return vlm, hooks(vlm)


def hooks(vlm):
    return [
        len(block._forward_hooks) + len(block._forward_pre_hooks) for block in vision_layers(vlm)
    ]


CASES = [
    ("gemma3", "pixels", "adam"), ("smolvlm", "pixels", "adam"), ("qwen25vl", "pixels", "adam"),
    ("videollama3", "pixels", "adam"), ("phi4", "fourier", "adamw"), ("phi4", "phase", "nadam"),
]


def full_recipe(vlm, seeds, real):
    """Every kind of term at once, sharing one look at the clips."""
    reader, rows = VisionReader(vlm), [{3: 0, 5: 1, 8: 2}[seed] for seed in seeds]
    objective = TargetToken(reader, "red -> blue", [CAPTIONS[seed] for seed in seeds])
    terms = {
        "target": (1., objective),
        "base": (.01, FeatureStatistics(reader, [real[2 * row:2 * row + 2] for row in rows])),
        "prime": (.1, JaccardSimilarity(reader, real[rows])),
        "coherence": (.01, Coherence(reader, .5)),
        "tv": (lambda share: share, lambda video, step: total_variation(video)),
        "time": Term(.1, lambda video, step: temporal_variation(video), plain=True),
        "patch": (.1, lambda video, step: patch_borders(video, 4)),
    }
    return objective, terms


def canvas_of(kind, seeds, real):
    if kind == "pixels": return PixelCanvas(seeds, SHAPE, std=.5)
    if kind == "fourier": return FourierCanvas(seeds, SHAPE, std=.3)
    return PhaseCanvas(seeds, mean_magnitude(real), SHAPE)


@pytest.mark.parametrize("name, kind, optimiser", CASES)
def test_a_clip_does_not_know_its_neighbours(real, name, kind, optimiser):
    vlm, own_hooks = tiny(name)
    config = InversionConfig(
        steps=5, lr=.02, optimiser=optimiser, check_every=2, stages={"patch": (.4, 1.)},
    )
    def run(seeds):
        objective, terms = full_recipe(vlm, seeds, real)
        return invert(
            canvas_of(kind, seeds, real), terms, config, objective, AUGMENT, progress=False,
        )
    together, alone = run([3, 5, 8]), [run([seed]) for seed in (3, 5, 8)]
    torch.testing.assert_close(
        together.videos, torch.cat([one.videos for one in alone]), atol=2e-3, rtol=0,
    )
    torch.testing.assert_close(
        together.probability, torch.cat([one.probability for one in alone]), atol=1e-4, rtol=1e-3,
    )
    for term in set(together.curves) - {"checked"}:
        for k, one in enumerate(alone):
            assert [row[k] for row in together.curves[term]] == pytest.approx(
                [row[0] for row in one.curves[term]], abs=1e-3, rel=1e-2,
            ), term
    assert len(together.curves["patch"]) == 3 and all(
        parameter.grad is None for parameter in vlm.parameters()
    )
    assert hooks(vlm) == own_hooks


@pytest.mark.parametrize("name, kind, optimiser", CASES[3:])
def test_interrupted_is_uninterrupted(real, name, kind, optimiser, tmp_path):
    vlm, _ = tiny(name)
    config = InversionConfig(steps=9, lr=.05, optimiser=optimiser, warmup=2, check_every=2)
    def run(stop_at=None, **options):
        objective, terms = full_recipe(vlm, [3, 5], real)
        def stop(video, step):
            if step == stop_at: raise KeyboardInterrupt
        return invert(
            canvas_of(kind, [3, 5], real), terms, config, objective, AUGMENT, progress=False,
            polish=stop, **options,
        )
    whole, path = run(), tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt): run(stop_at=8, resume_path=path, save_every=3)
    continued = run(resume_path=path, save_every=3)
    assert torch.equal(
        whole.videos, continued.videos,
    ) and whole.curves == continued.curves and torch.equal(whole.best_step, continued.best_step)


@pytest.mark.parametrize("name", list(VLMS))
def test_each_objective_improves(real, name):
    vlm, _ = tiny(name)
    objectives = {
        "token": TargetToken(vlm, "red -> blue", [CAPTIONS[3], CAPTIONS[5]]),
        "logit": TargetToken(vlm, "red -> blue", [CAPTIONS[3], CAPTIONS[5]], form="logit"),
        "answer": TeacherForcedAnswer(
            vlm,
            [
                Turn("what colour is it?", "", "blue"),
                Turn("describe the video", "one", "small red ball"),
            ],
        ),
    }
    source = objectives["token"].answers(real[:2])
    objectives["divergence"] = WantedDivergence(
        vlm, "red -> blue", [CAPTIONS[3], CAPTIONS[5]], source.detach(), .3,
    )
    for term, objective in objectives.items():
        found = invert(
            PixelCanvas([3, 5], SHAPE, std=.5), {term: (1., objective)},
            InversionConfig(steps=8, lr=.1, check_every=4), objective, progress=False,
        )
        assert all(
            last < first for first, last in zip(found.curves[term][0], found.curves[term][-1])
        ), term
        assert (found.reached >= torch.tensor(found.curves["reached"][0]) - 1e-3).all(), term
        torch.testing.assert_close(
            objective.reached(found.videos), found.reached, atol=1e-5, rtol=1e-4,
        )


def test_still_images_and_given_starts(real):
    vlm, _ = tiny("gemma3")
    objective = TargetToken(vlm, "red -> blue", [CAPTIONS[3]])
    for canvas in (
        PixelCanvas([3], SHAPE, limits="clamp", std=.2, still=True),
        FourierCanvas([3], SHAPE, still=True),
        PhaseCanvas([3], mean_magnitude(real, 2), SHAPE, 2, still=True),
    ):
        canvas.set_video(real[:1, :1])
        start = objective.target_probability(canvas().detach())
        found = invert(
            canvas, {"target": (1., objective)}, InversionConfig(steps=8, lr=.05, check_every=1),
            objective, progress=False,
        )
        assert torch.equal(
            found.videos[:, 0], found.videos[:, 8],
        ) and 0 <= found.videos.min() and found.videos.max() <= 1
        assert found.probability > start


def test_a_guide_with_batch_norm(real):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    for _ in range(50): net(real.flatten(0, 1))
    guide = BatchNormGuide(net)
    class Everything:
        def reached(self, video): return torch.zeros(len(video))
        target_probability = reached
    canvas = PixelCanvas([3, 5], SHAPE)
    start = guide(canvas()).detach()
    found = invert(
        canvas, {"guide": (1., guide)}, InversionConfig(steps=40, lr=.1, check_every=5),
        Everything(), progress=False,
    )
    assert (guide(found.videos) < .5 * start).all()  # equal reach: the lower loss is kept


def test_a_caption_of_another_vlm_is_refused():
    vlm, _ = tiny("gemma3")
    with pytest.raises(ValueError, match="has no token for 'violet'"):
        TargetToken(vlm, "red -> violet", [CAPTIONS[3]])
    with pytest.raises(ValueError, match="does not hold 'green'"):
        TargetToken(vlm, "green -> blue", [CAPTIONS[3]])
    with pytest.raises(ValueError, match="the objective has 1 captions and got 2 clips"):
        objective = TargetToken(vlm, "red -> blue", [CAPTIONS[3]])
        invert(
            PixelCanvas([3, 5], SHAPE), {"target": (1., objective)}, InversionConfig(), objective,
            progress=False,
        )
