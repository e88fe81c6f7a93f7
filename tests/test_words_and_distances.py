"""Contrasts on every kind of caption of the world, and the laws a distance obeys"""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from transporter_nb.world.contrasts import MINI_CONTRASTS, PAPER_CONTRASTS, ContrastPair, changed_words
from transporter_nb.world.distances import answer_distance, hellinger_distance, pair_log_probs
from transporter_nb.world.words import SLOTS

BOUNDED = ("hellinger", "jensen-shannon", "jaccard")


@st.composite
def captions(draw, fixed):
    words = {slot: draw(st.sampled_from(choices)) for slot, choices in SLOTS.items()} | fixed
    caption = f"one {words['size']} {words['colour']} {words['shape']} {words['motion']} {words['direction']} {words['pace']} over a {words['floor']} floor"
    return ContrastPair("one", "two").apply(caption) if words["count"] == "two" else caption


@pytest.mark.parametrize("name", MINI_CONTRASTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_contrast_and_its_reverse(name, data):
    pair = MINI_CONTRASTS[name].pair
    slots = {slot: source for source, _ in pair.words for slot, choices in SLOTS.items() if source in choices}
    source = data.draw(captions(slots))
    target = pair.apply(source)
    assert target != source and ContrastPair(pair.target, pair.source).apply(target) == source
    for prefix, (word, _) in zip(pair.prefixes(source), pair.words_in(source), strict=True):
        assert (source + " ").startswith(f"{prefix} {word} ".lstrip())


@pytest.mark.parametrize("name", MINI_CONTRASTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_changed_spans_rebuild_the_target(name, data):
    pair = MINI_CONTRASTS[name].pair
    source = data.draw(captions({slot: word for word, _ in pair.words for slot, choices in SLOTS.items() if word in choices}))
    target = rebuilt = pair.apply(source)
    rebuilt = source
    for span in reversed(changed_words(source, target)):
        rebuilt = rebuilt[:span.source_start] + target[span.target_start:span.target_end] + rebuilt[span.source_end:]
    assert rebuilt == target


@pytest.mark.parametrize("name", PAPER_CONTRASTS)
def test_paper_captions_hold_their_words(name):
    entry = PAPER_CONTRASTS[name]
    target = entry.pair.apply(entry.caption)
    assert all(word in target for _, word in entry.pair.words)


def test_every_word_of_the_world_is_in_a_contrast_or_known_to_be_left_out():
    assert {kind for entry in MINI_CONTRASTS.values() for kind in entry.kind.split("+")} == set(SLOTS)


log_dists = st.lists(st.floats(-30, 30), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=torch.float64).log_softmax(-1))


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=60, deadline=None)
@given(p=log_dists, q=log_dists, r=log_dists)
def test_a_distance_is_a_metric(name, p, q, r):
    distance = answer_distance(name)
    assert 0 <= distance(p, q) <= 1 + 1e-12
    assert distance(p, p) == 0
    assert math.isclose(distance(p, q), distance(q, p), abs_tol=1e-12)
    assert distance(p, r) <= distance(p, q) + distance(q, r) + 1e-7


@pytest.mark.parametrize("name", [*BOUNDED, "kl"])
def test_gradients_reach_the_logits(name):
    logits = torch.tensor([[.3, -1., .7], [2., 0., -.5]], dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor([[.1, .2, -.4], [.5, .5, 1.]], dtype=torch.float64).log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: answer_distance(name)(x.log_softmax(-1), fixed), logits)


def test_low_precision_is_refused():
    with pytest.raises(ValueError, match="in float32"):
        hellinger_distance(*torch.randn(2, 5, 3000, generator=torch.Generator().manual_seed(0)).bfloat16().log_softmax(-1))


def test_a_pair_ignores_the_rest_of_the_vocabulary():
    log_probs = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    pair = pair_log_probs(log_probs, (4, 7))
    assert torch.allclose(pair.exp().sum(-1), torch.ones(2, 3))
    assert torch.allclose(pair[..., 0] - pair[..., 1], log_probs[..., 4] - log_probs[..., 7], atol=1e-5)
