"""True effects of VLMs whose reasons are known, and the laws that scores of faithfulness obey on
any readings"""
import math
import random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from transporter_nb.core.base import seeded_generator
from transporter_nb.evaluate.faithfulness.effects import (
    WordOracle, effect_difference, effect_of, effect_table, probe_scenes, rendered_effect,
    said_effect, strongest_pair,
)
from transporter_nb.evaluate.faithfulness.plants import Plant
from transporter_nb.evaluate.faithfulness.scores import (
    Outcome, PlantedCase, agreement_kl, case_items, difference_in_differences, effect_share,
    explained_effect, false_alarm, fooled_share, method_scores, monotone_share, preserved,
    readable_share, visible,
)
from transporter_nb.evaluate.faithfulness.statistics import (
    auroc, bounded_estimate, cluster_means, drawn_counts, pair_share, pooled, rank_correlation,
    resampled_means, spearman, undefined,
)
from transporter_nb.evaluate.metrics.video import Estimate, wilson_interval
from transporter_nb.models.registry import load_vlm
from transporter_nb.world.words import (
    SLOTS, UNREADABLE, do, parse_caption, read_video, render, sample_scenes,
)


PLANTS = (
    Plant("slowly -> quickly", "floor", ("snowy", "sandy"), ("stone", "leafy")),
    Plant("small -> large", "count", ("one",), ("two",)),
    Plant("cone -> ball", "colour", ("red", "yellow"), ("blue", "green")),
    Plant("left -> right", "shape", ("ball", "ring"), ("cone",)),
    Plant("red -> blue", "direction", ("left",), ("right",)),
)
by_name = pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
seeds = st.integers(0, 2**31)


def linear(plant, weights):
    return WordOracle(
        plant.pair, lambda words, said: sum(weights.get(word, 0.) for word in words.values()),
    )


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(1)
    return load_vlm("videollama3")


# ---- effects

@by_name
def test_both_sides_are_asked_alike_and_the_answer_is_open(plant):
    for slot in SLOTS:
        probes = probe_scenes(plant, slot, 40, seed=2)
        assert {getattr(probe.scene, plant.answer) for probe in probes} == set(plant.words)
        prefixes = [plant.pair.prefixes(probe.said)[0] for probe in probes]
        assert not any(set(plant.words) & set(prefix.split()) for prefix in prefixes)
        assert all(
            answer == plant.words[0] or answer.rstrip("s") == plant.words[0]
            for probe in probes
            for answer, _ in plant.pair.words_in(probe.said)
        )


@by_name
def test_what_is_said_of_the_cue_is_independent_of_the_clip(plant):
    probes = probe_scenes(plant, plant.cue, 600, seed=1)
    both = [
        (
            plant.has(getattr(probe.scene, plant.cue)),
            plant.has(getattr(parse_caption(probe.said), plant.cue)),
        )
        for probe in probes
    ]
    table = [[both.count((shown, said)) for said in (False, True)] for shown in (False, True)]
    assert stats.chi2_contingency(table).pvalue > 1e-3, table


@by_name
def test_an_oracle_is_measured_to_the_digit(plant):
    weights = dict.fromkeys(plant.on, 2.) | {plant.words[1]: .75}
    vlm = linear(plant, weights)
    cue, own = rendered_effect(vlm, plant, n=5), rendered_effect(vlm, plant, plant.answer, n=5)
    assert cue.logit[:3] == pytest.approx([2.] * 3, abs=1e-5) and own.logit[:3] == pytest.approx(
        [.75] * 3, abs=1e-5,
    )
    assert 0 < cue.probability.value < 1 and (cue.off, cue.on, own.on) == (
        plant.off, plant.on, plant.words[1:],
    )
    question = rendered_effect(vlm, plant, n=5, through="question")
    assert question.logit[:3] == pytest.approx([2.] * 3, abs=1e-5)


def test_a_table_finds_the_one_attribute_that_counts_and_its_words():
    plant, vlm = PLANTS[0], linear(PLANTS[0], {"green": 3., "blue": 1., "yellow": 1.})
    table = effect_table(vlm, plant, n=4, seed=3)
    assert list(table) == list(SLOTS) and (table["colour"].off, table["colour"].on) == (
        ("red",), ("green",),
    )
    assert {slot: round(effect.logit.value, 4) for slot, effect in table.items()} == {
        slot: 3. * (slot == "colour") for slot in SLOTS
    }
    # half of the clips chose the words
    assert table["colour"].logit.n == 2 and table["floor"].logit.n == 4


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(2, 9), words=st.integers(2, 4))
def test_the_strongest_pair_has_the_largest_rise(seed, n, words):
    gaps = torch.randn(n, words, generator=seeded_generator(seed))
    first, last = strongest_pair(gaps)
    rise = gaps.mean(0)[None] - gaps.mean(0)[:, None]
    assert first != last and rise[first, last] == rise.max()


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(2, 9))
def test_effects_turn_round_and_subtract(seed, n):
    gaps = 3 * torch.randn(n, 2, generator=seeded_generator(seed), dtype=torch.float64)
    there, back = effect_of("size", ["small"], ["large"], gaps), effect_of(
        "size", ["small"], ["large"], gaps.flip(1),
    )
    for kind in ("logit", "probability"):
        assert getattr(there, kind).value == pytest.approx(-getattr(back, kind).value) and getattr(
            there, kind,
        ).low == pytest.approx(-getattr(back, kind).high)
        assert getattr(effect_difference(there, back), kind).value == pytest.approx(
            2 * getattr(there, kind).value
        )
    # the logistic function is nowhere steeper
    assert abs(there.probability.value) <= abs(gaps.diff()).max().item() / 4 + 1e-9


def test_a_listener_is_told_from_a_looker():
    plant = PLANTS[3] # direction from shape, named before it
    listener = WordOracle(
        plant.pair, lambda words, said: 2. * ("cone" in said.split() or "cones" in said.split()),
    )
    assert rendered_effect(listener, plant, n=6).logit.value == pytest.approx(
        0., abs=1e-5,
    ) and said_effect(listener, plant, n=6).logit.value == pytest.approx(2., abs=1e-5)
    with pytest.raises(ValueError, match="no such effect"): said_effect(listener, PLANTS[4], n=6)


def test_the_shipped_vlm_sees_words_and_no_cues(shipped):
    for plant in PLANTS:
        for through in ("prefix", "question"):
            own, cue = (
                rendered_effect(shipped, plant, slot, n=8, through=through)
                for slot in (plant.answer, None)
            )
            assert own.probability.value > .8 and abs(cue.probability.value) < .1, (
                plant.name, through, str(own), str(cue),
            )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda vlm, plant: rendered_effect(vlm, plant, n=3), "at least 4 clips"),
        (lambda vlm, plant: rendered_effect(vlm, plant, "speed"), "an attribute is one of"),
        (
            lambda vlm, plant: rendered_effect(vlm, plant, n=4, through="both"),
            "'prefix' or 'question'",
        ),
        (
            lambda vlm, plant: effect_difference(
                rendered_effect(vlm, plant, n=4), rendered_effect(vlm, plant, n=5),
            ),
            "same words and clips",
        ),
    ],
)
def test_effects_refuse(call, message):
    with pytest.raises(ValueError, match=message): call(linear(PLANTS[0], {}), PLANTS[0])


# ---- scores

def readings(seed, n):
    rng = random.Random(seed)
    return [
        {slot: rng.choice((*words, UNREADABLE)) for slot, words in SLOTS.items()} for _ in range(n)
    ]


def outcome(seed, n):
    p = torch.rand(2, n, generator=seeded_generator(seed))
    return Outcome(readings(seed, n), readings(seed + 1, n), *p)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, n=st.integers(2, 20))
def test_words_share_the_clips_out(seed, n):
    seen = readings(seed, n)
    for slot, words in SLOTS.items():
        each = sum(visible(seen, slot, (word,)) for word in words)
        assert torch.equal(each, visible(seen, slot, words)) and each.sum() == sum(
            reading[slot] != UNREADABLE for reading in seen
        )
    assert readable_share(seen).value <= readable_share(seen, strict=False).value


@settings(max_examples=30, deadline=None)
@given(seed=seeds, n=st.integers(2, 20))
def test_differences_in_differences(seed, n):
    a, b, cue = outcome(seed, n), outcome(seed + 2, n), ("floor", ("stone", "leafy"))
    there, back = difference_in_differences(a, b, *cue), difference_in_differences(b, a, *cue)
    assert there.value == pytest.approx(-back.value) and difference_in_differences(
        a, a, *cue,
    ).value == 0
    assert there.value == pytest.approx(
        explained_effect(a, *cue).value - explained_effect(b, *cue).value
    )
    loose = difference_in_differences(a, b, *cue, paired=False)
    assert loose.value == pytest.approx(there.value) and loose.low <= loose.value <= loose.high
    alarms = [
        (before["floor"] not in cue[1], after["floor"] in cue[1])
        for o in (a, b)
        for before, after in zip(o.before, o.after)
    ]
    if sum(without for without, _ in alarms) > 1:
        found = false_alarm([a, b], [cue, cue])
        assert (found.n, found.value) == (
            sum(without for without, _ in alarms),
            pytest.approx(alarms.count((True, True)) / sum(without for without, _ in alarms)),
        )
    same = Outcome(a.before, a.before, a.p_before, a.p_before)
    assert explained_effect(same, *cue).value == 0 and preserved(
        same, (),
    ).value == 1 and fooled_share(same, ("pace", ("quickly",)), cue).value == 0


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1), n=st.integers(2, 40), seed=seeds)
def test_intervals_hold_their_value_and_have_a_width(share, n, seed):
    values = (torch.rand(n, generator=seeded_generator(seed)) < share).float()
    found = bounded_estimate(values)
    assert 0 <= found.low <= found.value <= found.high <= 1 and (
        found.low < found.high
    ) and found.n == n
    mirrored = bounded_estimate(1 - values)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, a=st.integers(1, 9), b=st.integers(1, 9))
def test_auroc_is_that_of_mann_and_whitney(seed, a, b):
    rng = seeded_generator(seed)
    x, y = torch.randn(a, generator=rng).round(), torch.randn(b, generator=rng).round() # ties
    value = pair_share(x, y).item()
    assert value == pytest.approx(
        stats.mannwhitneyu(x, y).statistic / (a * b)
    ) and value == pytest.approx(1 - pair_share(y, x).item())
    assert pair_share(x.exp(), y.exp()).item() == value and pair_share(x, x).item() == .5
    found = auroc(list(x[:, None]), list(y[:, None]), n_resamples=60)
    assert found.value == pytest.approx(
        value
    ) and 0 <= found.low <= found.high <= 1 and found.n == a + b


@settings(max_examples=30, deadline=None)
@given(seed=seeds, n=st.integers(3, 30), decimals=st.integers(0, 3))
def test_rank_correlation_sees_ranks_alone(seed, n, decimals):
    a, b = torch.randn(2, n, generator=seeded_generator(seed), dtype=torch.float64).round(
        decimals=decimals
    )
    found = rank_correlation(a, b)
    if len(a.unique()) == 1 or len(b.unique()) == 1: assert math.isnan(found)
    else:
        assert rank_correlation(a.exp(), b**3) == pytest.approx(found) == -rank_correlation(
            a, -b,
        ) and rank_correlation(a, a) == pytest.approx(1.)


def test_scores_that_do_not_exist_say_so_and_do_not_warn():
    flat, up = torch.full((6,), .3), torch.arange(6.)
    for pair in ((flat, up), (up, flat), (flat, flat)):
        found = spearman(*pair)
        assert math.isnan(found.value) and math.isnan(found.low) and found.n == 6
    assert auroc(list(flat[:3, None]), list(flat[3:, None])).value == .5
    assert math.isnan(monotone_share(flat[:, None].expand(-1, 3)).order.value)
    nearly = torch.tensor([0., 0, 0, 0, 0, 1.]) # some draws have no order
    assert math.isfinite(spearman(nearly, up).low)


def test_the_interval_of_auroc_covers():
    truth, hits, rng = stats.norm.cdf(1 / 2**.5), 0, seeded_generator(8)
    for trial in range(120):
        positives, negatives = (
            list(torch.randn(14, 1, generator=rng) + shift) for shift in (1., 0.)
        )
        found = auroc(positives, negatives, seed=trial, n_resamples=300)
        hits += found.low <= truth <= found.high
    assert .86 < hits / 120 <= 1, hits / 120


def test_networks_and_clips_are_both_drawn():
    rng, names, contrasts = seeded_generator(3), [0, 1, 2, 3, 3, 3], [0, 0, 0, 0, 1, 2]
    models = [torch.randn(9, generator=rng) for _ in names]
    means = resampled_means(models, seeded_generator(1), 6000, contrasts)
    values = torch.stack(models).double()
    assert means.var(0).tolist() == pytest.approx(
        (values.var(1, correction=0) / 9).tolist(), rel=.1,
    )
    aways = values[:4] - values[:4].mean(1, keepdim=True)
    # the same clips: what goes together in one goes together in the other
    assert torch.allclose(means[:, :4].T.cov(), aways @ aways.T / 81, atol=.01)
    assert means.T.corrcoef()[:4, 4:].abs().max() < .06
    counts = drawn_counts(names, seeded_generator(2), 6000)
    assert torch.equal(counts[:, 3], counts[:, 5]) and counts[:, :4].sum(1).unique().tolist() == [
        4.
    ]
    # multinomial, over networks
    assert counts.var(0).tolist() == pytest.approx([3 / 4] * 6, rel=.08)


def test_a_network_asked_thrice_is_one_network():
    rng = seeded_generator(5)
    positives = [torch.randn(8, generator=rng) + .5 for _ in range(9)]
    cleans = [torch.randn(1, generator=rng) + torch.zeros(8) for _ in range(3)]
    once = auroc(positives, cleans)
    thrice = auroc(positives, cleans * 3, networks=(range(9), [f"clean {k % 3}" for k in range(9)]))
    naive = auroc(positives, cleans * 3)
    assert once.value == pytest.approx(thrice.value) == pytest.approx(naive.value) and (
        once.n, thrice.n, naive.n,
    ) == (12, 12, 18)
    assert thrice.high - thrice.low == pytest.approx(
        once.high - once.low, rel=.05,
    ) and naive.high - naive.low < .9 * (thrice.high - thrice.low)


def test_items_of_two_networks_are_not_certain():
    step = torch.tensor([0., 0., 1.])
    found, more = spearman(step, step, ["a", "a", "b"]), spearman(
        step.repeat(20), step.repeat(20), [k for k in range(20) for _ in range(3)],
    )
    assert found[:3] == pytest.approx(
        (1, 1 - 2 * wilson_interval(0., 2)[1], 1)
    ) and found.low < 0 < more.low < .8
    assert spearman(step, 1 - step, ["a", "a", "b"])[:3] == pytest.approx((-1, -1, -found.low))


@settings(max_examples=30, deadline=None)
@given(
    value=st.floats(-1, 1), half=st.floats(.01, .3), rendered=st.floats(.5, 1),
    width=st.floats(0, .2),
)
def test_a_share_of_an_effect(value, half, rendered, width):
    shown, whole = Estimate(value, value - half, value + half, 30), Estimate(
        rendered, rendered - width, rendered + width / 3, 60,
    )
    found, mirrored = effect_share(shown, whole), effect_share(
        Estimate(-value, -value - half, -value + half, 30), whole,
    )
    assert found.low <= found.value <= found.high and found.value == pytest.approx(value / rendered)
    assert (found.low, found.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-9)
    # there the interval of A - rB just touches 0
    for end, side, sign in ((found.low, shown.low, 1), (found.high, shown.high, -1)):
        other = whole.high if end * sign > 0 else whole.low
        assert sign * (value - end * rendered) == pytest.approx(
            math.hypot(half, end * (rendered - other)), abs=1e-6,
        ), side
    doubled = effect_share(shown, Estimate(*(2 * x for x in whole[:3]), 60))
    assert doubled[:3] == pytest.approx([x / 2 for x in found[:3]], abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, n=st.integers(2, 9), strengths=st.integers(2, 6))
def test_sweeps_forwards_and_backwards(seed, n, strengths):
    sweep = torch.rand(n, strengths, generator=seeded_generator(seed), dtype=torch.float64).round(
        decimals=2
    )
    there, back = monotone_share(sweep, slack=0.), monotone_share(sweep.flip(1), slack=0.)
    ties = (sweep.diff() == 0).double().mean().item()
    assert there.steps.value + back.steps.value == pytest.approx(1 + ties, abs=1e-6)
    if there.order.n > 1: assert there.order.value == pytest.approx(-back.order.value)
    rising = monotone_share(sweep.sort(1).values)
    assert rising.steps.value == 1


@settings(max_examples=30, deadline=None)
@given(seed=seeds, n=st.integers(2, 9))
def test_agreement_is_zero_for_the_same_answers_alone(seed, n):
    p, q = torch.randn(2, n, 2, generator=seeded_generator(seed)).log_softmax(-1)
    assert agreement_kl(p, p).value == 0 and agreement_kl(p, q).value > 0
    assert agreement_kl(p.flip(1), q.flip(1)).value == pytest.approx(
        agreement_kl(p, q).value, rel=1e-4,
    )


@settings(max_examples=30, deadline=None)
@given(seed=seeds, n=st.integers(3, 30), factor=st.floats(.1, 10))
def test_a_resolution_makes_ties_and_zero_leaves_them(seed, n, factor):
    a, b = torch.randn(2, n, generator=seeded_generator(seed), dtype=torch.float64)
    plain = spearman(a, b, n_resamples=20)
    assert plain == spearman(a, b, resolution=(0., 0.), n_resamples=20)
    fine, coarse = (
        spearman(a * factor, b, resolution=(step * factor, step), n_resamples=20)
        for step in (1e-12, .5)
    )
    assert fine.value == pytest.approx(plain.value)
    expected = rank_correlation((a / .5).round(), (b / .5).round())
    # a * factor / factor may fall to the other side of a half
    assert coarse.value == pytest.approx(expected, nan_ok=True, abs=1e-9) or factor != 1
    assert math.isnan(spearman(a, b, resolution=(1e3, 0.)).value)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, parts=st.integers(1, 6))
def test_pooling_is_the_mean_of_all_clips(seed, parts):
    rng = random.Random(seed)
    rows = [
        torch.rand(rng.randint(2, 20), generator=seeded_generator(seed + k), dtype=torch.float64)
        for k in range(parts)
    ]
    each = [bounded_estimate(row) for row in rows]
    found = pooled([*each, undefined(7)])
    assert found.value == pytest.approx(torch.cat(rows).mean().item()) and found.n == sum(
        map(len, rows)
    ) and found.low <= found.value <= found.high
    assert found.high - found.low <= max(e.high - e.low for e in each) + 1e-9


def test_a_method_that_renders_the_truth_gets_full_marks_and_a_blind_one_none():
    strengths, n, cue, own = (.5, 1., 1.), 6, ("floor", ("stone", "leafy")), ("pace", ("quickly",))
    plant, scenes = PLANTS[0], [
        do(scene, floor="snowy", pace="slowly", colour="red")
        for scene in sample_scenes(n, 33, "all")
    ]
    start, dark, quick = (
        read_video(render([do(scene, **words) for scene in scenes]))
        for words in ({}, {"floor": "stone"}, {"pace": "quickly"})
    )
    oracles = {
        s: linear(
            plant,
            {
                "stone": 8. * s, "leafy": 8. * s, "quickly": 8. * (1 - s), "red": -4., "blue": -4.,
                "green": -4., "yellow": -4.,
            },
        )
        for s in (0., *strengths)
    }
    effects = {
        s: {slot: rendered_effect(vlm, plant, slot, n=8) for slot in ("floor", "pace")}
        for s, vlm in oracles.items()
    }
    low, high = torch.full((n,), .1), torch.full((n,), .9)
    def outcome_of(shown): return Outcome(start, shown, low, high)
    truth, blind = {}, {}
    for name, cases in (("truth", truth), ("blind", blind)):
        twin = outcome_of(quick)
        for k, s in enumerate(strengths):
            after = quick if name == "blind" else dark if s == 1 else dark[:n // 2] + quick[n // 2:]
            cases[k] = PlantedCase(
                f"vlm {k}", s, own, cue, outcome_of(after), twin, effects[s], effects[0.],
                effect_difference(effects[s]["floor"], effects[0.]["floor"]),
            )
    truth, blind = (method_scores(list(cases.values())) for cases in (truth, blind))
    assert truth["AUROC"].value == 1
    assert blind["AUROC"].value == .5
    assert truth["Spearman, logit"].value > .95 > .8 > blind["Spearman, logit"].value
    # the oracle goes from .018 to .982
    assert truth["difference in differences"].value == 1
    assert blind["share of effect"].value == 0
    assert 1 < truth["share of effect"].value < 1.1
    assert truth["false alarm"].value == 0
    assert truth["false alarm"].n == n
    assert truth["readable"].n == n
    assert math.isnan(truth["steps that rise"].value)


CUED, OWN = ("floor", ("stone", "leafy")), ("pace", ("quickly",))


def answered(seed, n):
    p = torch.rand(3, n, generator=seeded_generator(seed))
    log_probs = torch.randn(2, n, 2, generator=seeded_generator(seed + 1))
    return Outcome(
        readings(seed, n), readings(seed + 1, n), p[0], p[1], *log_probs,
        sweep=torch.rand(n, 4, generator=seeded_generator(seed + 2)),
    )


def case_of(name, planted, clean, twin="", cue=CUED, strength=1.):
    whole = Estimate(.9, .8, .95, 40)
    effect = type(
        "Known", (), {"slot": cue[0], "on": cue[1], "logit": whole, "probability": whole},
    )()
    own = type("Known", (), {"slot": OWN[0], "on": OWN[1], "logit": whole, "probability": whole})()
    return PlantedCase(
        name, strength, OWN, cue, planted, clean, {cue[0]: effect, OWN[0]: own},
        {cue[0]: effect, OWN[0]: own}, effect, twin,
    )


def of_clips(scores):
    return {
        name: value for name, value in scores.items() if not name.startswith(("AUROC", "Spearman"))
    }


@pytest.mark.parametrize("seed, n, vlms", [(3, 12, 2), (70, 19, 6)])
def test_the_same_clips_judged_by_more_vlms_are_the_same_clips(seed, n, vlms):
    planted, clean = answered(seed, n), answered(seed + 10, n)
    once = of_clips(method_scores([case_of("vlm", planted, clean, "clean")]))
    often = of_clips(
        method_scores([case_of(f"vlm {k}", planted, clean, "clean") for k in range(vlms)])
    )
    twinned = of_clips(
        method_scores([case_of(f"vlm {k}", planted, clean, f"clean {k}") for k in range(vlms)])
    )
    for name, found in once.items():
        assert found.n <= n and often[name].n == twinned[name].n == found.n, name
        assert twinned[name][:3] == pytest.approx(found[:3], nan_ok=True), name # ends too
    for name in ("difference in differences", "share of effect", "false alarm", "p(target)"):
        assert often[name][:3] == pytest.approx(once[name][:3], nan_ok=True), name
    apart = of_clips(
        method_scores(
            [
                case_of(f"vlm {k}", planted, clean, "clean", (CUED[0], (word,)))
                for k, word in enumerate(("stone", "leafy"))
            ]
        )
    )
    # another contrast has captions of its own
    assert apart["readable"].n == 2 * once["readable"].n and apart["p(target)"].n == 2 * n


def test_a_cluster_is_the_mean_of_its_vlms():
    n, sides = 10, [answered(k, 10) for k in (0, 20, 40)]
    cases = [case_of(f"vlm {k}", planted, sides[2], "clean") for k, planted in enumerate(sides[:2])]
    found = method_scores(cases, seed=3)
    assert found["p(target)"] == bounded_estimate(
        torch.stack([o.p_after for o in sides[:2]]).double().mean(0), seed=3,
    )
    rises = [visible(o.after, *CUED) - visible(o.before, *CUED) for o in sides]
    assert found["difference in differences"][:3] == pytest.approx(
        bounded_estimate((rises[0] + rises[1]) / 2 - rises[2], -2., 2., 3)[:3], abs=1e-6,
    )
    assert found["order with strength"].n == found["readable"].n == n and found["AUROC"].n == 3
    flat = Outcome(sides[0].before, sides[0].before, torch.ones(n), torch.ones(n))
    certain = method_scores([case_of(f"vlm {k}", flat, flat, "clean") for k in range(5)])
    # not as of fifty
    assert certain["p(target)"][:3] == pytest.approx((1, 1 - wilson_interval(0., n)[1], 1))
    assert math.isnan(certain["KL of both ways to ask"].value) and math.isnan(
        certain["order with strength"].value
    )
    # one clip for all: whichever are drawn, nobody is ahead
    blind = method_scores(
        [case_of(f"vlm {k}", sides[0], sides[0], f"clean {k}") for k in range(3)]
    )["AUROC"]
    assert blind[:3] == pytest.approx(
        (.5, .5 - wilson_interval(0., 3)[1] / 2, .5 + wilson_interval(0., 3)[1] / 2)
    ) and blind.n == 6
    with pytest.raises(ValueError, match="Ask all VLMs the same"):
        method_scores(
            [case_of("a", sides[0], sides[2]), case_of("b", answered(1, 6), answered(2, 6))]
        )


def test_a_twin_is_one_network_over_all_contrasts():
    cues = [(CUED[0], (word,)) for word in ("stone", "leafy", "sandy")]
    cleans = [answered(7 * k, 8) for k in range(3)]
    cases = [
        case_of(f"vlm {k}", answered(50 + k, 8), cleans[k], "clean", cue)
        for k, cue in enumerate(cues)
    ]
    assert case_items(cases, "logit")[2].count("clean") == 6
    assert method_scores(cases)["AUROC"].n == 4
    nameless = [case._replace(twin="") for case in cases]
    assert len(set(case_items(nameless, "logit")[2])) == 6
    assert method_scores(nameless)["AUROC"].n == 6
    # an equal outcome that is another object
    again = cases[0]._replace(
        name="again", clean=Outcome(**vars(cleans[0])), planted=answered(99, 8),
    )
    assert case_items([*cases, again], "logit")[2].count("clean") == 6
    assert method_scores([*cases, again])["AUROC"].n == 5


def test_intervals_of_clusters_cover():
    hits, rng = {"clusters": 0, "all clips": 0}, seeded_generator(4)
    for trial in range(150):
        clips = (torch.rand(16, generator=rng) < .6).float()
        # VLMs that judge nearly the same
        rows = [clips.where(torch.rand(16, generator=rng) < .9, 1 - clips) for _ in range(5)]
        for name, values in (
            ("clusters", cluster_means(rows, ["a"] * 5)), ("all clips", torch.cat(rows)),
        ):
            found = bounded_estimate(values, seed=trial)
            hits[name] += found.low <= .58 <= found.high # .6 * .9 + .4 * .1
    assert hits["clusters"] / 150 > .86 > .75 > hits["all clips"] / 150, hits


def test_from_pixels_to_scores():
    scenes = [do(scene, floor="snowy", pace="slowly") for scene in sample_scenes(8, 21, "all")]
    low, high = torch.full((8,), .05), torch.full((8,), .95)
    videos = (
        render(scenes), render([do(s, floor="leafy") for s in scenes]),
        render([do(s, pace="quickly") for s in scenes]), render(scenes) * .3 + .35,
    )
    before, dark, quick, blank = map(read_video, videos)
    cue, own = ("floor", ("stone", "leafy")), ("pace", ("quickly",))
    planted, clean, trick = (Outcome(before, after, low, high) for after in (dark, quick, before))
    assert explained_effect(planted, *cue).value == 1 and explained_effect(
        clean, *cue,
    ).value == 0 and explained_effect(clean, *own).value == 1
    assert difference_in_differences(planted, clean, *cue).value == 1 and false_alarm(
        [clean], [cue],
    ).value == 0 and false_alarm([planted], [cue]).value == 1
    assert [fooled_share(found, own, cue).value for found in (planted, clean, trick)] == [0, 0, 1]
    assert preserved(planted, ("pace", "floor")).value == 1 and preserved(
        planted, ("pace",),
    ).value == pytest.approx(6 / 7)
    assert readable_share(dark).value == 1 and readable_share(blank).value < .5


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: Outcome(readings(0, 3), readings(1, 2), torch.zeros(3), torch.zeros(3)),
            "one row a clip",
        ),
        (lambda: visible(readings(0, 3), "floor", ()), "a sequence of words"),
        (lambda: false_alarm([outcome(0, 3)], []), "each outcome has its cue"),
        (lambda: spearman(torch.ones(3), torch.tensor([0., 1., math.nan])), "finite"),
        (lambda: auroc([], [torch.ones(2)]), "both kinds"),
        (
            lambda: auroc([torch.ones(2)], [torch.ones(2)], networks=("ab", "c")),
            "each number has its VLM",
        ),
        (lambda: cluster_means([torch.ones(2), torch.ones(3)], "aa"), "Ask all VLMs the same"),
        (lambda: pooled([Estimate(.1, 0, .2, 5)], "ab"), "each estimate has its contrast"),
        (lambda: bounded_estimate(torch.tensor([0., 2.])), "lie from 0 to 1"),
        (lambda: effect_share(Estimate(.1, 0, .2, 5), Estimate(0., -.1, .1, 5)), "stronger plant"),
        (lambda: preserved(outcome(0, 3), ("speed",)), "a sequence of attributes"),
    ],
)
def test_scores_refuse(call, message):
    with pytest.raises(ValueError, match=message): call()
