"""The world of degrees under the shape checker: drawn, read back, named, and half way"""
import pytest
import torch

from transporter_nb.world.drawing import FRAMES, SIZE, draw, mixed_ground, pixel_grid, render
from transporter_nb.world.painting import paint
from transporter_nb.world.reading import read_video
from transporter_nb.world.scenes import (
    SLOTS, Scene, best_words, between, do, naming, sample_scenes, to_numbers)


@pytest.fixture(scope="module")
def scenes(): return sample_scenes(6, 401, "validation")


def test_every_kind_of_scene_is_drawn(scenes):
    kinds = [*scenes, do(scenes[0], shape="person", motion="waves"), do(scenes[0], count="three")]
    video = render(kinds)
    assert video.shape == (8, FRAMES, 3, SIZE, SIZE)
    assert 0 <= video.min() and video.max() <= 1
    assert (video[:, 1:] - video[:, :-1]).abs().amax((1, 2, 3, 4)).gt(.01).all() # all move


@pytest.mark.parametrize("person", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_compiled_loops_paint_what_is_drawn(count, person):
    one = Scene(count, person, hue=.3, roundness=.4, hole=.7, hop=3., run=.6, wave=.2, travel=9.)
    numbers = to_numbers([one, do(one, radius=8.8, travel=-17.)])
    x, y = (axis.expand(2, FRAMES, -1) for axis in pixel_grid())
    ground = mixed_ground(numbers).expand(-1, FRAMES, -1, -1)
    drawn = draw(numbers, count, person, ground, x, y)
    assert (drawn - ground).abs().amax() > .2 # there is something to compare
    painted = paint(numbers, count, person, ground, x, y)
    torch.testing.assert_close(painted, drawn, atol=2e-6, rtol=0)


def test_a_drawn_clip_is_read_back(scenes):
    readings = read_video(render(scenes[:3]))
    for scene, reading, words in zip(scenes, readings, best_words(scenes)):
        assert reading.readable and reading.words["colour"] == words["colour"]
        assert abs(reading.scene.radius - scene.radius) < .4 # px


def test_clips_of_no_scene_are_unreadable(scenes):
    noise = torch.rand(1, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    line = torch.arange(SIZE) // 6
    board = ((line[:, None] + line) % 2).float().expand(1, FRAMES, 3, SIZE, SIZE)
    ground = mixed_ground(to_numbers(scenes[:1])).view(1, 1, 3, SIZE, SIZE)
    faint = .3 * render(scenes[:1]) + .7 * ground
    assert not any(reading.readable for reading in read_video(torch.cat([noise, board, faint])))


def test_a_clip_is_read_alike_alone_and_among_others(scenes):
    video = render(scenes[:2])
    together = read_video(video)
    for clip, reading in zip(video, together):
        alone = read_video(clip[None])[0]
        assert alone.words == reading.words
        assert abs(alone.explained - reading.explained) < 1e-3


def test_words_pass_into_each_other_half_way(scenes):
    red, orange = (do(scenes[0], colour=word) for word in ("red", "orange"))
    p = torch.stack([naming([between(red, orange, k / 8)])["colour"][0] for k in range(9)])
    at = [SLOTS["colour"].index(word) for word in ("red", "orange")]
    assert p[0, at[0]] > .9 and p[-1, at[1]] > .9
    assert torch.allclose(p[4, at[0]], p[4, at[1]], atol=1e-4)
    assert p[:, at[1]].diff().gt(0).all()
