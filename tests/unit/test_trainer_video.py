"""Frames survive an mp4 file; anything else is refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from world2act.data.video import decode_mp4, encode_mp4


def test_frames_survive_mp4() -> None:
    ramp = np.linspace(0, 250, 64).astype(np.uint8)
    frames = np.stack([np.broadcast_to(np.roll(ramp, 8 * i)[None, :, None], (64, 64, 3)) for i in range(6)]).copy()
    data = encode_mp4(frames, fps=10)
    back = decode_mp4(data)
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 6
    assert encode_mp4(frames, fps=10) == data


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 4, 4), (2, 5, 4, 3), (2, 4, 4, 4)])
def test_wrong_frames_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="frames: "):
        encode_mp4(np.zeros(shape, np.uint8))


def test_no_video_is_refused() -> None:
    with pytest.raises(ValueError, match="video: not a readable mp4"):
        decode_mp4(b"not a video at all")
