"""Frames -> mp4."""

from __future__ import annotations

import io

import av

from services.worldmodel.backbones import Frames


def encode_mp4(frames: Frames, fps: int) -> bytes:
    """uint8 (T, H, W, 3) RGB -> an H.264 mp4; an odd last row or column is cut off (4:2:0 needs even sizes).

    One encoder thread: equal frames give equal bytes, so equal artifact names.
    """
    height, width = (n - n % 2 for n in frames.shape[1:3])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = width, height, "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame[:height, :width].copy(), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
