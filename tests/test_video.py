"""Files of videos: what is written can be read, and a failed write loses nothing"""
import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from jaxtyping import TypeCheckError

from transporter_nb.world import video as v


def test_shapes_are_checked_at_run_time():
    with pytest.raises(TypeCheckError):
        v.contact_sheet(torch.rand(2, 3, 5, 8, 12))  # channels before frames


@pytest.mark.parametrize("frames,height,width", [(3, 16, 20), (5, 18, 12)])
def test_mp4_round_trip(tmp_path, frames, height, width):
    clip = v.demo_video(frames, height, width)[0]
    path = v.save_mp4(tmp_path / "clip.mp4", clip, enlarge=4)
    back = v.load_video(path, frames, min(height, width))
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    assert back.shape == (1, frames, 3, side, side)
    assert (back[0] - clip[:, :, top:top + side, left:left + side]).abs().mean() < .03


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    old = v.save_png(tmp_path / "x.png", np.zeros((4, 5, 3), np.uint8)).read_bytes()
    monkeypatch.setattr(
        v.Image.Image, "save",
        lambda self, file, **options: (_ for _ in ()).throw(OSError("No space left on device")),
    )
    with pytest.raises(OSError, match="No space left"):
        v.save_png(tmp_path / "x.png", np.ones((4, 5, 3), np.uint8))
    assert (tmp_path / "x.png").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("height,width,enlarge", [(17, 33, 1), (17, 33, 3), (2, 2, 1), (1, 5, 4)])
def test_odd_sizes_are_saved(tmp_path, height, width, enlarge):
    clip = torch.linspace(.2, .8, 3)[:, None, None, None] * torch.linspace(.7, 1, width).expand(
        3, 3, height, width,
    )
    # H.264 stores half as many colours each way: an odd last row or column is cut
    kept = [length * enlarge // 2 * 2 for length in (height, width)]
    back = v.load_video(v.save_mp4(tmp_path / "clip.mp4", clip, enlarge=enlarge), 3)
    assert back.shape == (1, 3, 3, *kept)
    big = clip.repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2)
    big = big[..., :kept[0], :kept[1]]
    assert (back[0] - big).mean((0, 2, 3)).abs().max() < .04 and (back[0] - big).abs().mean() < .06
    gif = v.load_video(v.save_gif(tmp_path / "clip.gif", clip, fps=10., enlarge=enlarge), 3)
    assert gif.shape == (1, 3, 3, height * enlarge, width * enlarge)
    assert (
        gif[0] - clip.repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2)
    ).abs().mean() < .02


@pytest.mark.parametrize("fps", [.5, 2.5, 24000 / 1001, 60])
def test_any_rate_is_saved(tmp_path, fps):
    times = v.scan_video(v.save_mp4(tmp_path / "clip.mp4", v.demo_video()[0], fps=fps)).times
    assert times == pytest.approx([k / fps for k in range(5)], rel=1e-3)


@pytest.mark.parametrize("fps", [0, -3, 2000, float("nan")])
def test_a_rate_that_is_none(tmp_path, fps):
    with pytest.raises(ValueError, match="fps must be from 0.1 to 1000"):
        v.save_mp4(tmp_path / "clip.mp4", v.demo_video()[0], fps=fps)
    assert not list(tmp_path.iterdir())


def test_sizes_of_numpy(tmp_path):
    path, clip = v.save_mp4(tmp_path / "clip.mp4", v.demo_video()[0]), v.demo_video()
    assert v.load_video(path, 2, np.int64(8)).equal(v.load_video(path, 2, 8))
    assert v.resize_video(clip, (np.int32(5), 7)).shape[-2:] == (5, 7)
    for wrong in (8.5, (3, 4, 5), "8"):
        with pytest.raises((TypeCheckError, ValueError)): v.load_video(path, 2, wrong)


def test_a_still_too_large_is_never_decoded(tmp_path, monkeypatch):
    v.Image.new("1", (96, 80)).save(tmp_path / "still.png")
    monkeypatch.setattr(v, "MAX_PIXELS", 96 * 80 - 1)
    monkeypatch.setattr(v, "frame_picture", lambda *_: pytest.fail("it was converted"))
    with pytest.raises(
        ValueError, match="at most 7679 pixels, those of still.png have 96 x 80. Make it smaller",
    ):
        v.load_video(tmp_path / "still.png", 1)


def test_a_missing_file_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=f"there is no video holiday.mp4 in the current folder, {tmp_path}. Check its name",
    ):
        v.load_video("holiday.mp4", 1)


def test_too_small_for_h264(tmp_path):
    with pytest.raises(ValueError, match="at least 2 x 2 pixels, got 1 x 5 with enlarge=1"):
        v.save_mp4(tmp_path / "clip.mp4", torch.rand(2, 3, 1, 5), enlarge=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(.01, 3), min_size=1, max_size=20),
    st.lists(st.floats(0, 40), min_size=1, max_size=9),
)
def test_one_pass_takes_what_looking_up_would(gaps, moments):
    times, moments = [0., *np.cumsum(gaps).tolist()], sorted(moments)
    early, read = v.early_share(times), []
    frames = ((time, read.append(k) or k) for k, time in enumerate(times))
    taken = [k for _, k in v.pick_frames(frames, moments, early)]
    assert taken == [v.frame_at(times, moment, early) for moment in moments]
    # one frame further than the last taken, to know that its turn is over
    assert len(read) <= min(taken[-1] + 2, len(times))


def test_few_frames_are_alive_at_a_time(tmp_path, monkeypatch):
    path = v.save_mp4(tmp_path / "clip.mp4", v.demo_video(60, 16, 24)[0], enlarge=2)
    alive, most, real = set(), [0], v.decode_frames

    class Held:
        def __init__(self, frame):
            self.frame = frame
            alive.add(id(self))
            most[0] = max(most[0], len(alive))
        def __getattr__(self, name): return getattr(self.frame, name)
        def __del__(self): alive.discard(id(self))

    monkeypatch.setattr(
        v, "decode_frames", lambda *words: ((time, Held(frame)) for time, frame in real(*words)),
    )
    monkeypatch.setattr(
        v, "frame_picture",
        lambda frame, background, aspect: v.torch.from_numpy(
            frame.to_ndarray(format="rgb24")
        ).movedim(-1, 0) / 255,
    )
    assert v.load_video(path, 20, 8).shape == (1, 20, 3, 8, 8)
    # the one shown, the one arriving, the one converted last, and one on its way
    assert most[0] <= 4


def test_a_hole_is_a_warning(tmp_path):
    path = v.save_mp4(
        tmp_path / "clip.mp4",
        torch.rand(40, 3, 24, 32, generator=torch.Generator().manual_seed(0)), fps=10,
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 3:len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="clip.mp4 is damaged: .* packets did not decode"):
        assert v.load_video(path, 9, 16).shape == (1, 9, 3, 16, 16)


def test_times_are_those_of_the_file(tmp_path):
    path = tmp_path / "slides.mkv"
    with av.open(str(path), "w") as container:
        track = container.add_stream("ffv1", rate=10)
        track.height, track.width, track.pix_fmt = 4, 6, "bgr0"
        for stamp, grey in ((0, 0), (30, 100), (31, 200)):
            frame = av.VideoFrame.from_ndarray(
                np.full((4, 6, 3), grey, np.uint8), format="rgb24",
            ).reformat(format="bgr0")
            frame.pts = stamp
            container.mux(track.encode(frame))
        container.mux(track.encode())
    sampled = v.sample_video(path, frames_per_second=1)
    assert (sampled.video[0, :, 0, 0, 0] * 255).round().tolist() == [0, 0, 0, 100]
    assert sampled.times.tolist() == pytest.approx([0, 0, 0, 3])
