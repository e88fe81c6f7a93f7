"""Files of videos: what is written can be read, and a failed write loses nothing"""
import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from transporter_nb import video as v


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
    monkeypatch.setattr(v.Image.Image, "save", lambda self, file, **options: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        v.save_png(tmp_path / "x.png", np.ones((4, 5, 3), np.uint8))
    assert (tmp_path / "x.png").read_bytes() == old and len(list(tmp_path.iterdir())) == 1
