"""Contact that the fingers do not show: pushing (METHOD: paper section 3 names it as a reason why segmentation fails).

A door pushed shut by the arm never narrows the gripper. Where the source knows more (a simulator, a force sensor), it tells:
something moves the way the hand moves, or a force acts against the hand's motion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from world2act.segmentation.events import MAX_FRAMES, ContactEvent, check_widths, hysteresis, spans
from world2act.types import Episode

Positions = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TouchCalibration:
    """What pushing means. Speeds in metres a frame, forces in newtons, lengths in frames.

    The hand pushes an object while both move faster than object_on_m and within the angle whose cosine is `alignment` (it lasts
    until the object is slower than object_off_m), or while a force of at least force_on_n acts against the hand's motion (until
    force_off_n). Raises ValueError naming the field when a value is out of range.
    """

    object_on_m: float = 0.002
    object_off_m: float = 0.0005
    alignment: float = 0.5
    force_on_n: float = 3.0
    force_off_n: float = 1.0
    min_frames: int = 3
    min_gap_frames: int = 3

    def __post_init__(self) -> None:
        for off, on in (("object_off_m", "object_on_m"), ("force_off_n", "force_on_n")):
            if not 0 < getattr(self, off) <= getattr(self, on):
                raise ValueError(f"{off}, {on}: 0 < {off} <= {on} must hold, got {getattr(self, off)}, {getattr(self, on)}")
        if not -1 <= self.alignment <= 1:
            raise ValueError(f"alignment: {self.alignment} is a cosine; it must be in [-1, 1]")
        for name in ("min_frames", "min_gap_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")


def _series(values: npt.ArrayLike, field: str, frames: int | None) -> Positions:
    """`values` as finite float64 (F, 3). Raises ValueError naming `field`."""
    try:
        x = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{field}: must be numbers") from None
    if x.ndim != 2 or x.shape[1] != 3 or not 0 < len(x) <= MAX_FRAMES:
        raise ValueError(f"{field}: must have shape (frames, 3) with 1 to {MAX_FRAMES} frames, got {x.shape}")
    if frames is not None and len(x) != frames:
        raise ValueError(f"{field}: has {len(x)} rows, but the episode has {frames} frames")
    if not np.isfinite(x).all():
        raise ValueError(f"{field}: row {int(np.argmin(np.isfinite(x).all(1)))} is NaN or infinite")
    return x


def touch_events(
    hand: npt.ArrayLike,
    widths: npt.ArrayLike,
    *,
    objects: npt.ArrayLike | None = None,
    force: npt.ArrayLike | None = None,
    calibration: TouchCalibration | None = None,
) -> tuple[ContactEvent, ...]:
    """The pushes of an episode, in time order.

    hand: (F, 3) end effector, metres; widths: (F,) gripper opening, metres; objects: (F, 3) what may be pushed, such as a
    drawer's handle, metres; force: (F, 3) force on the hand, newtons, in the same axes. One of the two is needed.
    Raises ValueError naming the field for bad shapes, lengths or values.
    """
    c = calibration or TouchCalibration()
    w = check_widths(widths)
    moving = np.diff(_series(hand, "hand", w.size), axis=0, prepend=np.nan)
    moving[0] = 0.0
    speed = np.linalg.norm(moving, axis=1)
    if objects is None and force is None:
        raise ValueError("objects, force: one of them is needed to see a push")
    pushed = np.zeros(w.size, np.bool_)
    if objects is not None:
        position = _series(objects, "objects", w.size)
        shift = np.diff(position, axis=0, prepend=position[:1])
        size = np.linalg.norm(shift, axis=1)
        along = (shift * moving).sum(1) >= c.alignment * size * speed
        pushed |= hysteresis((size >= c.object_on_m) & (speed >= c.object_on_m) & along, size < c.object_off_m)
    if force is not None:
        f = _series(force, "force", w.size)
        strength = np.linalg.norm(f, axis=1)
        pushed |= hysteresis((strength >= c.force_on_n) & ((f * moving).sum(1) < 0), strength < c.force_off_n)
    return tuple(
        ContactEvent(a, b if b < w.size else None, float(np.median(w[a:b])), float(w[a:b].min()), "touch")
        for a, b in spans(pushed, c.min_frames, c.min_gap_frames)
    )


def episode_touches(episode: Episode) -> tuple[ContactEvent, ...]:
    """The pushes that an episode's cues show (hand with objects or force), in time order; none where it has no such cues.

    Of things that move together only the first counts: one push.
    """
    hand, force = episode.cues.get("hand"), episode.cues.get("force")
    objects = [places for name, places in episode.cues.items() if name.startswith("object/")]
    if hand is None or (force is None and not objects):
        return ()
    found = [] if force is None else [*touch_events(hand, episode.widths, force=force)]
    for places in objects:
        found += touch_events(hand, episode.widths, objects=places)
    kept: list[ContactEvent] = []
    for event in sorted(found, key=lambda e: e.onset):
        if not kept or (kept[-1].offset is not None and event.onset >= kept[-1].offset):
            kept.append(event)
    return tuple(kept)


def merge_events(grasps: Sequence[ContactEvent], touches: Sequence[ContactEvent]) -> tuple[ContactEvent, ...]:
    """Both kinds in time order. A touch that begins while something is held is the held thing's motion: it is dropped."""
    outside = [t for t in touches if not any(g.onset <= t.onset < (np.inf if g.offset is None else g.offset) for g in grasps)]
    return tuple(sorted([*grasps, *outside], key=lambda e: e.onset))
