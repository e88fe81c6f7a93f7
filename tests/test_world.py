"""The world of degrees under the shape checker: drawn, read back, named, and half way"""
import pytest
import torch

from transporter_nb.world.drawing import FRAMES, SIZE, render
from transporter_nb.world.reading import read_video
from transporter_nb.world.scenes import SLOTS, best_words, between, do, naming, sample_scenes


@pytest.fixture(scope="module")
def scenes(): return sample_scenes(6, 401, "validation")


def test_every_kind_of_scene_is_drawn(scenes):
    kinds = [*scenes, do(scenes[0], shape="person", motion="waves"), do(scenes[0], count="three")]
    video = render(kinds)
    assert video.shape == (8, FRAMES, 3, SIZE, SIZE)
    assert 0 <= video.min() and video.max() <= 1
    assert (video[:, 1:] - video[:, :-1]).abs().amax((1, 2, 3, 4)).gt(.01).all() # all move


def test_a_drawn_clip_is_read_back(scenes):
    readings = read_video(render(scenes[:3]))
    for scene, reading, words in zip(scenes, readings, best_words(scenes)):
        assert reading.readable and reading.words["colour"] == words["colour"]
        assert abs(reading.scene.radius - scene.radius) < .4 # px


def test_noise_is_unreadable():
    noise = torch.rand(1, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    assert not read_video(noise)[0].readable


def test_words_pass_into_each_other_half_way(scenes):
    red, orange = (do(scenes[0], colour=word) for word in ("red", "orange"))
    p = torch.stack([naming([between(red, orange, k / 8)])["colour"][0] for k in range(9)])
    at = [SLOTS["colour"].index(word) for word in ("red", "orange")]
    assert p[0, at[0]] > .9 and p[-1, at[1]] > .9
    assert torch.allclose(p[4, at[0]], p[4, at[1]], atol=1e-4)
    assert p[:, at[1]].diff().gt(0).all()
