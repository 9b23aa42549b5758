"""Frames <-> mp4 (H.264 through PyAV): for people, reports and data sets of other projects. Our own training data is raw."""

from __future__ import annotations

import io
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np

from world2act.types import ImageArray

MAX_DECODED_BYTES = 2**31
"""Decoded size of one episode of one camera. A small file can declare a huge video."""


class VideoWriter:
    """An mp4 file that browsers play, written as frames come. Equal frames give equal bytes (one thread).

    keyframe_every: frames between two that decode on their own; small for random access, None for small files.
    """

    def __init__(self, target: Path | io.BytesIO, fps: int, size: tuple[int, int], keyframe_every: int | None = None) -> None:
        height, width = size
        if height % 2 or width % 2:
            raise ValueError(f"frames: height and width must be even for H.264, got {height} x {width}")
        options = {"crf": "18", "threads": "1"} | ({"g": str(keyframe_every)} if keyframe_every else {})
        self.size = size
        self.frames = 0
        self._container: Any = av.open(str(target) if isinstance(target, Path) else target, "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=fps, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"

    def write(self, frames: ImageArray) -> None:
        """Append frames uint8 (F, H, W, 3). Raises ValueError naming the field for a wrong shape or dtype."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self.size, 3):
            raise ValueError(f"frames: must be uint8 (F, {self.size[0]}, {self.size[1]}, 3), got {frames.dtype} {frames.shape}")
        for frame in frames:
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        self.frames += len(frames)

    def close(self) -> None:
        """Finish the file."""
        self._container.mux(self._stream.encode())
        self._container.close()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._container.close()


def encode_mp4(frames: ImageArray, fps: int = 10) -> bytes:
    """Frames uint8 (F, H, W, 3), F >= 1 and even sizes -> an mp4 file that browsers play.

    Equal frames give equal bytes (one thread). Raises ValueError naming the field for a wrong shape or dtype.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"frames: must be uint8 (F >= 1, H, W, 3), got {frames.dtype} {frames.shape}")
    buffer = io.BytesIO()
    height, width = frames.shape[1:3]
    with VideoWriter(buffer, fps, (height, width)) as writer:
        writer.write(frames)
    return buffer.getvalue()


def decode_mp4(data: bytes) -> ImageArray:
    """An mp4 file -> frames uint8 (F, H, W, 3). Raises ValueError if it is no video."""
    try:
        opened: Any = av.open(io.BytesIO(data))  # its type depends on a mode that PyAV's stubs do not follow
        with opened as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"video: not a readable mp4 file ({error})") from None


def decode_image(data: bytes) -> ImageArray:
    """A PNG or JPEG file -> uint8 (H, W, 3). Raises ValueError if it is no picture."""
    picture: ImageArray = decode_mp4(data)[0]
    return picture


def video_frames(path: Path) -> tuple[float, int]:
    """(frames a second, how many there are, as the file declares). Raises ValueError naming the file if it is no video."""
    try:
        opened: Any = av.open(str(path))
        with opened as container:
            stream = container.streams.video[0]
            return float(stream.average_rate), int(stream.frames)
    except (av.error.FFmpegError, IndexError, TypeError) as error:
        raise ValueError(f"{path.name}: not a readable video ({_words(error)})") from None


def read_video(path: Path, frames: int, start_s: float = 0.0, fps: float | None = None) -> ImageArray:
    """`frames` frames of a video file from second `start_s` on, uint8 (frames, H, W, 3); only they are decoded, after a seek.

    Raises ValueError naming the file if it is no video, is cut short, has another rate than `fps`, or would decode to more
    than MAX_DECODED_BYTES.
    """
    try:
        opened: Any = av.open(str(path))
        with opened as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate)
            if fps is not None and abs(rate - fps) > 0.01 * fps:
                raise ValueError(f"{path.name}: fps: the video has {rate:g}, the data set {fps:g}")
            size = frames * stream.height * stream.width * 3
            if size > MAX_DECODED_BYTES:
                raise ValueError(f"{path.name}: decodes to {size} bytes, the limit is {MAX_DECODED_BYTES}")
            out = np.empty((frames, stream.height, stream.width, 3), np.uint8)
            if start_s > 0:
                container.seek(int(start_s / stream.time_base), stream=stream)
            filled = 0
            for frame in container.decode(stream):
                if filled == frames:
                    break
                if frame.time is not None and frame.time >= start_s - 0.5 / rate:
                    out[filled] = frame.to_ndarray(format="rgb24")
                    filled += 1
    except (av.error.FFmpegError, IndexError, TypeError) as error:
        raise ValueError(f"{path.name}: not a readable video ({_words(error)})") from None
    if filled < frames:
        raise ValueError(f"{path.name}: has {filled} frames from second {start_s:g} on, {frames} are needed")
    return out


def _words(error: Exception) -> str:
    """FFmpeg's own words, without the path that it puts into them."""
    return getattr(error, "strerror", None) or str(error)
