"""Laws of the metrics on random inputs, the readers on every contrast of the world, and the planted errors that must show"""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.linalg import sqrtm

from transporter_nb.world.contrasts import MINI_CONTRASTS, ContrastPair
from transporter_nb.core.base import seeded_generator
from transporter_nb.evaluate.metrics.alignment import aesthetic_score, alignment_gain, clip_score, embedding_similarity, load_alignment
from transporter_nb.evaluate.metrics.readers import progress, read_change, slot_of, smoothness
from transporter_nb.evaluate.metrics.video import (GaussianStatistics, bootstrap, bootstrap_statistic, frechet_at, frechet_distance, frechet_video_distance, gaussian_statistics,
                                          i3d_features, in_chunks, nearest_perceptual_distance, perceptual_distance, world_features)
from transporter_nb.world.words import SLOTS, caption, do, render, sample_scenes

seeds = st.integers(0, 2**31)


def draw(seed, *shape):
    return torch.randn(*shape, generator=seeded_generator(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(20, seed=11, split="all")


@pytest.fixture(scope="module")
def clips(scenes):
    return render(scenes)


# ---- intervals

@settings(max_examples=30, deadline=None)
@given(seed=seeds, n=st.integers(2, 30), scale=st.floats(.1, 10), shift=st.floats(-5, 5))
def test_an_interval_moves_with_its_values(seed, n, scale, shift):
    values = draw(seed, n)
    plain, moved = bootstrap(values, n_resamples=50), bootstrap(values * scale + shift, n_resamples=50)
    assert plain.low <= plain.value <= plain.high or n < 6
    assert moved[:3] == pytest.approx([x * scale + shift for x in plain[:3]], abs=1e-9) and moved.n == n


@settings(max_examples=20, deadline=None)
@given(seed=seeds, n=st.integers(4, 40))
def test_a_statistic_is_of_all_rows_and_its_interval_repeats(seed, n):
    values = draw(seed, n)
    first, again = (bootstrap_statistic(lambda rows: values[rows].std().item(), n, seed=5, n_resamples=30) for _ in range(2))
    assert first == again and first.value == pytest.approx(values.std().item()) and first.low <= first.high


# ---- Frechet

@settings(max_examples=40, deadline=None)
@given(seed=seeds, dim=st.integers(1, 9), n=st.integers(2, 14), m=st.integers(2, 14))
def test_frechet_is_symmetric_zero_on_itself_and_knows_no_origin(seed, dim, n, m):
    x, y = draw(seed, n, dim), draw(seed + 1, m, dim) * 2 + 1
    a, b = gaussian_statistics(x), gaussian_statistics(y)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9, abs=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(gaussian_statistics(x - 3), gaussian_statistics(y - 3)) == pytest.approx(frechet_distance(a, b), rel=1e-7, abs=1e-7)
    turn = torch.linalg.qr(draw(seed + 2, dim, dim)).Q
    assert frechet_distance(gaussian_statistics(x @ turn), gaussian_statistics(y @ turn)) == pytest.approx(frechet_distance(a, b), rel=1e-7, abs=1e-7)
    assert frechet_distance(a, b) >= (a.mean - b.mean).square().sum().item() - 1e-9  # the covariances cannot bring them nearer


@settings(max_examples=20, deadline=None)
@given(seed=seeds, dim=st.integers(2, 8))
def test_frechet_agrees_with_the_general_matrix_root(seed, dim):
    a, b = gaussian_statistics(draw(seed, 4 * dim, dim)), gaussian_statistics(draw(seed + 1, 5 * dim, dim) * .5)
    general = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * sqrtm((a.covariance @ b.covariance).numpy()).real.trace()
    assert frechet_distance(a, b) == pytest.approx(general.item(), rel=1e-7)


def test_frechet_of_one_dimension_by_hand():
    a, b = (GaussianStatistics(torch.tensor([mean], dtype=torch.float64), torch.tensor([[sd**2]], dtype=torch.float64), 9) for mean, sd in ((1., 2.), (4., .5)))
    assert frechet_distance(a, b) == pytest.approx(3**2 + 1.5**2)


def test_fewer_clips_are_farther_away():
    features, reference = draw(0, 80, 6), gaussian_statistics(draw(1, 500, 6))
    values = [frechet_at(features, reference, n).value for n in (5, 15, 40, 80)]
    assert values == sorted(values, reverse=True)


def test_swapping_two_methods_swaps_their_frechet_distances(clips):
    class Colours:
        name, metric = "mean colours", "Frechet distance of mean colours"
        def __call__(self, video): return video.mean(dim=(1, 3, 4))

    bad = torch.rand(clips.shape, generator=seeded_generator(0))
    good_row, bad_row = (frechet_video_distance(videos, clips.flip(-1), Colours(), n_resamples=20) for videos in (clips, bad))
    assert good_row.estimate.high < bad_row.estimate.low and good_row.metric != "FVD"
    assert str(bad_row).endswith(f"n = {len(bad)} against {len(clips)} real clips")


def test_only_i3d_may_be_called_fvd(tmp_path):
    assert world_features().metric == "FVD-mini"
    with pytest.raises(FileNotFoundError, match="i3d_torchscript.pt.*Download it and give its path"):
        i3d_features(tmp_path / "none.pt")


# ---- perceptual distance

def test_perceptual_laws(clips):
    a, b, real = clips[:3], clips[3:6], clips[3:9]
    pairs = perceptual_distance(a, b)
    assert perceptual_distance(a, a).abs().max() < 1e-6
    torch.testing.assert_close(perceptual_distance(b, a, chunk=2), pairs)
    few, more = (nearest_perceptual_distance(a, reference) for reference in (b, real))
    assert (few <= pairs + 1e-5).all() and (more <= few + 1e-5).all()  # more real clips, never farther
    assert 0 <= more.min() and pairs.max() <= 4


def test_chunks_do_not_matter(clips):
    network = world_features()
    torch.testing.assert_close(in_chunks(network, clips, chunk=3), in_chunks(network, clips, chunk=100), rtol=1e-3, atol=1e-3)


# ---- alignment

def test_shuffled_captions_and_swapped_videos_lower_alignment(scenes, clips):
    captions = [caption(scene) for scene in scenes]
    assert bootstrap(clip_score(clips, captions) - clip_score(clips, captions[1:] + captions[:1])).low > 0
    wanted = [do(scene, floor="snowy" if scene.floor == "leafy" else "leafy") for scene in scenes]
    gain = alignment_gain(render(wanted), clips, [caption(scene) for scene in wanted])
    torch.testing.assert_close(alignment_gain(clips, render(wanted), [caption(scene) for scene in wanted]), -gain)  # two methods swapped
    assert bootstrap(gain).low > 0


def test_what_is_missing_says_so(clips):
    with pytest.raises(ValueError, match="huggingface.co/openai/clip-vit-base-patch32"): load_alignment("paper")
    with pytest.raises(ValueError, match="AVA ratings on CLIP ViT-L/14.*comes from"): aesthetic_score(clips)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, dim=st.integers(2, 7), scale=st.floats(.5, 3))
def test_embedding_similarity_laws(seed, dim, scale):
    made, real = draw(seed, 5, 3, dim), draw(seed + 1, 6, 2, dim)
    found, scaled = (embedding_similarity(made * c, real * c, n_resamples=3) for c in (1, scale))
    assert scaled.cos.value == pytest.approx(found.cos.value) and scaled.l1.value == pytest.approx(found.l1.value * scale) and scaled.l2.value == pytest.approx(found.l2.value * scale)
    assert found.l1.value <= found.l2.value + 1e-12 <= found.l1.value * math.sqrt(dim) + 2e-12  # of means over dimensions
    assert found.kl.value >= 0 and found.centred_cos is None


# ---- readers

@pytest.mark.parametrize("name", MINI_CONTRASTS)
def test_rendered_interventions_reach_and_keep(name):
    pair = MINI_CONTRASTS[name].pair
    slots = [(slot_of(source), slot_of(target)) for source, target in pair.words]
    before = [do(scene, **{slot: old for (slot, old), _ in slots}) for scene in sample_scenes(3, seed=2, split="all")]
    after = [do(scene, **{slot: new for _, (slot, new) in slots}) for scene in before]
    texts = [caption(scene) for scene in before]
    found = read_change(render(after), texts, pair, render(before))
    assert found.target.tolist() == found.kept.tolist() == found.readable.tolist() == found.unchanged.tolist() == [1.] * 3
    back = read_change(render(before), [caption(scene) for scene in after], ContrastPair(pair.target, pair.source))
    assert back.target.mean() == 1


def test_every_word_has_its_slot():
    for slot, words in SLOTS.items():
        for word in words: assert slot_of(word) == (slot, word)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(2, 9), strength=st.floats(.01, 100))
def test_smoothness_and_progress_are_bounded_and_have_no_unit(seed, n, strength):
    steps = draw(seed, 3, n).abs()
    assert (-1e-9 <= smoothness(steps)).all() and (smoothness(steps) <= 1 + 1e-9).all()
    torch.testing.assert_close(smoothness(steps * strength), smoothness(steps))
    torch.testing.assert_close(smoothness(steps.flip(-1)), smoothness(steps))
    gaps = draw(seed + 1, n).abs() + .1
    torch.testing.assert_close(smoothness(gaps, [0., *gaps.cumsum(0).tolist()]), torch.tensor(1., dtype=torch.float64))  # steps as long as their gaps
    assert progress(torch.cat([torch.zeros(3, 1, dtype=torch.float64), steps.cumsum(-1)], -1)).tolist() == pytest.approx([1.] * 3)
    assert progress(draw(seed + 2, 3, n)).abs().max() <= 1 + 1e-9
