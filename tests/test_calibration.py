"""Asking for an answer: the search meets its budget on curves it has not seen, loses nothing, and
drives whatever steering drives."""
import math

import numpy as np
import pytest
import torch

from transporter_nb.explain.calibration import (
    AnswerScale, calibrate, find_bracket, perceptual_traversal,
)
from transporter_nb.concepts.bank import ConceptBank
from transporter_nb.concepts.concept import Concept, ConceptConfig
from transporter_nb.world.contrasts import parse_contrast
from transporter_nb.coupling.testing import tiny_coupling
from transporter_nb.concepts.directions import TargetCaption, VelocitySlider
from transporter_nb.models.generators.wan import WanGenerator
from transporter_nb.explain.transporter import Transporter, check_groups, check_request
from transporter_nb.concepts.shaping import WORD_GROUPS
from transporter_nb.explain.steering import MAX_STRENGTH, steer
from transporter_nb.models.testing import tiny_generator, tiny_vlm

RED, TO_BLUE = "one large red ball slides left slowly over a stone floor", parse_contrast(
    "red -> blue"
)


def random_curve(seed):
    """A rising sigmoid of logits between random ends, with a dip or a bump on one side in half of
    the cases."""
    low, high, centre, slope, bump, at = torch.rand(
        6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64,
    ).tolist()
    low, high, centre, slope, bump, at = (
        -6 - 7 * low, 4 + 5 * high, .1 + 1.2 * centre, 6 + 30 * slope, (bump - .5) * 2 * (seed % 2),
        1.5 * at
    )
    return lambda s: 1 / (
        1
        + math.exp(
            -(
                low + (high - low) / (1 + math.exp(-slope * (s - centre)))
                + bump * math.exp(-((s - at) / .1) ** 2)
            )
        )
    )


def test_random_curves_within_the_budget():
    errors = []
    for seed in range(120):
        curve, calls = random_curve(seed), []
        for wanted in (.1, .3, .5, .7, .9):
            calls.clear()
            found, = calibrate(
                lambda strengths: [calls.append(s) or curve(s) for s in strengths], wanted,
                MAX_STRENGTH,
            ).found
            assert len(calls) == len(set(calls)) == found.evaluations <= 8 and 0 <= min(
                calls
            ) <= max(calls) <= MAX_STRENGTH
            assert found.answer == curve(found.strength) and found.reached == (
                abs(found.answer - wanted) <= .02
            ) == (not found.note)
            errors.append(abs(found.answer - wanted))
    errors = torch.tensor(errors)
    assert errors.median() <= .02 and (errors <= .05).double().mean() >= .9


def test_more_evaluations_are_never_worse():
    for seed in range(40):
        curve = random_curve(seed)
        errors = [
            abs(
                calibrate(
                    lambda strengths: [curve(s) for s in strengths], .4, MAX_STRENGTH,
                    evaluations=n,
                ).found[0].answer - .4
            )
            for n in range(3, 14)
        ]
        assert errors == sorted(errors, reverse=True)


def test_better_than_bisection():
    def middle(tried, bracket, wanted): return sum(bracket) / 2
    def error(inside):
        return sum(
            abs(
                calibrate(
                    lambda strengths: [random_curve(seed)(s) for s in strengths], .3, MAX_STRENGTH,
                    inside=inside,
                ).found[0].answer - .3
            )
            for seed in range(0, 80, 2)
        )
    from transporter_nb.explain.calibration import between
    assert error(between) < error(middle) / 3


def test_several_answers_share_clips_and_batches():
    curve, batches = random_curve(2), []
    result = calibrate(
        lambda strengths: [batches.append(len(strengths)) or curve(s) for s in strengths][
            :len(strengths)
        ],
        [.9, .1, .5], MAX_STRENGTH,
    )
    assert [found.wanted for found in result.found] == [.9, .1, .5] and len(result.tried) == len(
        batches
    ) < sum(found.evaluations for found in result.found)
    strengths = [found.strength for found in result.found]
    assert strengths[1] < strengths[2] < strengths[0]


def test_flat_curves_and_ties():
    for level in (0., .2, 1.):
        found, = calibrate(lambda strengths: [level] * len(strengths), .5, MAX_STRENGTH).found
        assert (
            not found.reached and found.answer == level and found.strength == 0.
            and "out of reach" in found.note
        )
    flat = calibrate(lambda strengths: [.5] * len(strengths), .5, MAX_STRENGTH)
    assert flat.found[0].evaluations == 3
    assert find_bracket({0.: .5, 1.: .5}, .5) == (0., 1.)


def test_scale_of_a_search_predicts_the_curve():
    for seed in range(0, 20, 2):
        curve = random_curve(seed)
        result = calibrate(
            lambda strengths: [curve(s) for s in strengths], [.1, .5, .9], MAX_STRENGTH,
        )
        scale = AnswerScale.fit(result.tried)
        assert scale.departure == 0 and list(scale.answers) == sorted(scale.answers)
        for found in result.found: assert abs(scale.answer(found.strength) - found.answer) < 1e-6
        assert abs(curve(scale.strength(.5)) - .5) < .2


def test_traversal_spaces_distances_evenly():
    strengths = torch.linspace(0, 1.5, 61).tolist()
    walk = perceptual_traversal(strengths, strengths, [s**3 for s in strengths])
    steps = torch.tensor([walk.strength(p) ** 3 for p in (0., .25, .5, .75, 1.)]).diff()
    assert (steps - steps.mean()).abs().max() < .02 * steps.mean()


@pytest.fixture(scope="module")
def l2v():
    wan, vlm = tiny_generator(steps=3), tiny_vlm()
    coupling = tiny_coupling(vlm_tokens=vlm.n_tokens)
    concept = Concept(
        TO_BLUE, torch.randn(1, 8, generator=torch.Generator().manual_seed(1)),
        ConceptConfig(placement="word"),
    )
    return Transporter(wan, vlm, coupling, ConceptBank([concept]))


def test_explain_keeps_the_nearest_and_says_so(l2v):
    with pytest.warns(UserWarning, match="out of reach"):
        e = l2v.explain(RED, "red -> blue", target_probability=.99, seed=2)
    found, = e.settings["calibration"]["found"]
    assert found["strength"] == pytest.approx(e.strengths.item()) and found["answer"] == max(
        p for _, p in e.settings["calibration"]["tried"]
    ) and e.settings["calibration"]["evaluations"] == 8
    assert e.settings["calibration"]["through"] == "reencoded" and float(
        e.reencoded.target
    ) == pytest.approx(found["answer"], abs=1e-6)


def test_explain_counts_its_clips(l2v, monkeypatch):
    import transporter_nb.explain.transporter as module
    made = []
    monkeypatch.setattr(
        module, "steer",
        lambda *args, **kwargs: made.append(len(args[4])) or steer(*args, **kwargs),
    )
    with pytest.warns(UserWarning):
        e = l2v.explain(RED, "red -> blue", target_probability=[.98, .99], evaluations=5, seed=2)
    assert sum(made) == e.settings["calibration"]["evaluations"] and made[0] == 3 and [
        found["evaluations"] for found in e.settings["calibration"]["found"]
    ] == [5, 5]


@pytest.mark.parametrize(
    "direction",
    [
        TargetCaption(TO_BLUE), VelocitySlider(TO_BLUE),
        Concept(TO_BLUE, torch.ones(1, 8), ConceptConfig(placement="word")),
    ],
)
@pytest.mark.parametrize("through", ["reencoded", "phi"])
def test_any_direction(l2v, direction, through):
    noise = l2v.generator.noise([4])
    def steered(strengths): return steer(l2v.generator, RED, noise, direction, strengths)
    _, first = l2v.answered(steered, .5, TO_BLUE, RED, through, 3)
    run, calibration = l2v.answered(steered, list(first.tried.values()), TO_BLUE, RED, through)
    assert run.latents.shape[:2] == (1, 4) and all(found.reached for found in calibration.found)
    again = steer(
        l2v.generator, RED, noise, direction,
        [0., *(found.strength for found in calibration.found)],
    )
    assert torch.allclose(run.latents, again.latents, atol=1e-4) and torch.equal(
        run.strengths, again.strengths,
    )


def test_what_is_refused(l2v):
    for wrong, words in (
        ({"target_probability": 0.}, "above 0 and below 1"),
        ({"target_probability": []}, "above 0 and below 1"),
        ({"target_probability": .5, "strengths": 3}, "give strengths or target_probability"),
        ({"target_probability": .5, "evaluations": 2}, "first batch of 3"),
        ({"target_probability": .5, "through": "both"}, "through must be"),
        ({"target_probability": .5, "strengths": 9}, "give strengths or target_probability"),
        ({"evaluations": 2}, "first batch of 3"), ({"through": "nonsense"}, "through must be"),
        ({"vlm_weight": 1.5}, "vlm_weight is a number"),
    ):
        with pytest.raises(ValueError, match=words): l2v.explain(RED, "red -> blue", **wrong)
    for wrong, words in (
        (("1", None), "vlm_weight"), ((None, None), "vlm_weight"), ((True, None), "vlm_weight"),
        ((0., "8"), "evaluations"), ((0., 4.5), "evaluations"), ((0., None), "evaluations"),
    ):
        with pytest.raises(ValueError, match=words):
            check_request(None, .5, wrong[1] if words == "evaluations" else 8, wrong[0])
    blind = Transporter(l2v.generator, l2v.vlm, None, l2v.bank)
    with pytest.raises(ValueError, match="through='phi' needs a coupling"):
        blind.explain(RED, "red -> blue", through="phi")


def test_refused_before_anything_is_learned(l2v, monkeypatch):
    def never(*args, **kwargs): raise AssertionError("something was generated or learned")
    monkeypatch.setattr(l2v, "bank", ConceptBank())
    monkeypatch.setattr(ConceptBank, "learn", never), monkeypatch.setattr(
        WanGenerator, "sample", never,
    )
    for wrong in (
        {"target_probability": .5, "evaluations": 2}, {"through": "nonsense"}, {"vlm_weight": -1.},
    ):
        with pytest.raises(ValueError): l2v.explain(RED, "red -> blue", **wrong)
    for groups, words in (
        ([["stone", "leafy"]], "no group of words in l2v.word_groups holds 'red'"),
        ([[["red", "blue"]]], "l2v.word_groups must be"),
        (("red", "blue"), "l2v.word_groups must be"), ([("red",)], "l2v.word_groups must be"),
    ):
        monkeypatch.setattr(l2v, "word_groups", groups)
        for weight in (.5, 1):
            with pytest.raises(ValueError, match=words):
                l2v.explain(RED, "red -> blue", vlm_weight=weight)
    assert check_groups([["red", "blue"]], [TO_BLUE]) == (("red", "blue"),)


def test_numbers_of_every_kind_are_numbers(l2v):
    with pytest.warns(UserWarning):
        e = l2v.explain(
            RED, "red -> blue", target_probability=np.float32(.75), evaluations=3,
            vlm_weight=np.float32(0), seed=2,
        )
    assert e.settings["calibration"]["found"][0]["wanted"] == .75 and type(
        e.settings["vlm_weight"]
    ) is float
    assert l2v.explain(RED, "red -> blue", seed=2).videos.shape[0] == 9  # the default


def test_a_short_caption_first_spoils_nothing(l2v):
    short, long = (
        "a small red ball slides left",
        "two large blue rings bounce right quickly over a leafy floor"
    )
    pair, found = parse_contrast("left -> right"), []
    def fresh(): return Transporter(l2v.generator, l2v.vlm, l2v.coupling, l2v.bank)
    for order in ((short, long), (long, short)):
        here = fresh()
        models = {text: here.shaped(text, pair).model for text in order}
        assert len(here.measured) == 2 and here.shaped(
            "one small green cone climbs left quickly over a snowy floor", pair,
        ).model is models[long]
        found.append(models)
    for text in (short, long):
        alone = fresh().shaped(text, pair).model
        for models in found:
            assert (models[text].base, models[text].explained, models[text].effects) == (
                alone.base, alone.explained, alone.effects,
            )
    assert found[0][short].base != found[0][long].base and WORD_GROUPS == here.word_groups
    here.word_groups, here.vlm = [list(group) for group in WORD_GROUPS], type(l2v.vlm).new(
        l2v.vlm.settings
    ).freeze()
    # another VLM answers for itself
    assert here.shaped(long, pair).model is not models[long] and len(here.measured) == 3
