"""Frames <-> mp4 (H.264 through PyAV): for people and reports. Training reads frames and latents, never a compressed video."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np

from world2act.types import ImageArray


def encode_mp4(frames: ImageArray, fps: int = 10) -> bytes:
    """Frames uint8 (F, H, W, 3), F >= 1 and even sizes -> an mp4 file that browsers play.

    Equal frames give equal bytes (one thread). Raises ValueError naming the field for a wrong shape or dtype.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"frames: must be uint8 (F >= 1, H, W, 3), got {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames: height and width must be even for H.264, got {height} x {width}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_mp4(data: bytes) -> ImageArray:
    """An mp4 file -> frames uint8 (F, H, W, 3). Raises ValueError if it is no video."""
    try:
        opened: Any = av.open(io.BytesIO(data))  # its type depends on a mode that PyAV's stubs do not follow
        with opened as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"video: not a readable mp4 file ({error})") from None
