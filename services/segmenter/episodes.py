"""Gripper widths out of a demonstration file (layout: world2act/data/robomimic.py) without touching its images.

The file is an upload, so it is not trusted: links that leave it, virtual and external storage are refused (they would read
other files of this machine), sizes are checked before anything is read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from world2act.segmentation.events import MAX_FRAMES, MAX_WIDTH_M, WidthArray


@dataclass(frozen=True)
class WidthSeries:
    """One demonstration: widths (frames,) in metres; frames = T + 1, or T for a file without final observations.

    open_width_m: the gripper's fully-open width if the file says it.
    """

    demo: str
    task: str
    instruction: str
    widths: WidthArray
    frames: int
    open_width_m: float | None


def read_widths(data: bytes, demo: str | None, max_demos: int) -> Iterator[WidthSeries]:
    """The demonstrations of a file, one in memory at a time, in the order of their numbers; `demo`: that one only.

    Raises ValueError naming field and item: not HDF5, truncated, a demonstration or dataset missing, not in this file or of
    the wrong kind, more demonstrations than `max_demos`.
    """
    if not data.startswith(b"\x89HDF\r\n\x1a\n"):
        raise ValueError("episode: is not an HDF5 file")
    where = "the file"
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            group = _hard(file, "data", h5py.Group)
            names = sorted((n for n in group if _number(n) is not None), key=lambda n: _number(n) or 0)
            if not names:
                raise ValueError("episode: holds no demonstration (group /data with members demo_<number>)")
            if demo is not None and demo not in names:
                raise ValueError(f"demo: {demo[:40]!r} is not in the file; it has {names[0]} to {names[-1]}")
            names = names if demo is None else [demo]
            if len(names) > max_demos:
                raise ValueError(f"episode: holds {len(names)} demonstrations, the limit is {max_demos}")
            open_width = _open_width(group)
            for name in names:
                where = f"/data/{name}"
                yield _read(group, name, open_width)
    except (OSError, RuntimeError, KeyError) as e:
        raise ValueError(f"episode: {where} cannot be read; the file is truncated or damaged") from e


def _number(name: str) -> int | None:
    digits = name.removeprefix("demo_")
    return int(digits) if name.startswith("demo_") and digits.isascii() and digits.isdigit() and len(digits) <= 12 else None


def _hard(parent: h5py.Group, name: str, kind: type) -> Any:
    """Member `name` of `parent`, if it lies in this file and is of `kind`."""
    where = f"episode: {parent.name.rstrip('/')}/{name}"
    for i, part in enumerate(parts := name.split("/")):
        link = parent.get(part, getlink=True)
        if link is None:
            raise ValueError(f"{where}: is missing")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{where}: is a link; links are not followed")
        item = parent[part]
        if not isinstance(item, kind if i == len(parts) - 1 else h5py.Group):
            raise ValueError(f"{where}: is not a {kind.__name__.lower()}")
        parent = item
    return parent


def _values(group: h5py.Group, name: str, ndim: int) -> WidthArray:
    """A numeric dataset of at most MAX_FRAMES values, float64."""
    dataset = _hard(group, name, h5py.Dataset)
    where = f"episode: {dataset.name}"
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"{where}: its values lie in another file; they are not read")
    if dataset.ndim != ndim or dataset.dtype.kind not in "fiu":
        raise ValueError(f"{where}: must be numbers of {ndim} dimension(s), got {dataset.dtype} {dataset.shape}")
    if dataset.size > MAX_FRAMES:
        raise ValueError(f"{where}: has {dataset.size} values, the limit is {MAX_FRAMES}")
    return np.asarray(dataset[()], dtype=np.float64)


def _text(group: h5py.Group, name: str) -> str:
    value = group.attrs.get(name)
    value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if not isinstance(value, str):
        raise ValueError(f"episode: {group.name}: attribute {name} (text) is missing")
    return value


def _open_width(group: h5py.Group) -> float | None:
    """gripper_open_width of the file's env_args; None if the file has none."""
    try:
        value = json.loads(_text(group, "env_args"))["gripper_open_width"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(value, int | float) or not 0 < value <= MAX_WIDTH_M:
        raise ValueError(f"episode: env_args.gripper_open_width: {value!r} must be in (0, {MAX_WIDTH_M}] metres")
    return float(value)


def _read(group: h5py.Group, name: str, open_width: float | None) -> WidthSeries:
    demo = _hard(group, name, h5py.Group)
    widths = _values(demo, "obs/gripper_width", 1)
    final = "final_obs" in demo
    if final:
        widths = np.append(widths, _values(demo, "final_obs/gripper_width", 0))
    actions = _hard(demo, "actions", h5py.Dataset).shape
    if not actions:
        raise ValueError(f"episode: {demo.name}/actions: must have one row per action")
    return WidthSeries(name, _text(demo, "task"), _text(demo, "instruction"), widths, actions[0] + final, open_width)
