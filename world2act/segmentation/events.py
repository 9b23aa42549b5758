"""Gripper width -> contact events (METHOD: paper section 3, vision stream; supplement E).

Closure signal d_t = w_0 - w_t, w_0 the calibrated fully-open width. The paper calls frame t contact when d_t >= Delta = 0.05 m.
A Panda opens 0.08 m, so one Delta cannot serve every hand: thresholds are per embodiment and have hysteresis (contact starts
at d >= delta_on and lasts until d < delta_off), short gaps are closed, short events dropped. The gap between commanded and
actual width is an optional second cue, for objects so wide that d never reaches delta_on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

WidthArray = npt.NDArray[np.float64]
EventKind = Literal["grasp", "touch"]

MAX_WIDTH_M = 0.5
"""No gripper of this project opens wider; a larger value is in another unit."""

MAX_FRAMES = 1_000_000
"""Longest series accepted; at 20 Hz this is 14 hours."""


@dataclass(frozen=True)
class GripperCalibration:
    """What contact means for one gripper; widths in metres, lengths in frames.

    gap_m and settle_m serve the commanded-versus-actual cue only: fingers that stay gap_m wider than commanded while
    moving less than settle_m a frame are held apart by an object.
    min_object_width_m: fingers that get closer than this hold nothing: a missed grasp, or the object slipped.
    start_frames: a closure before this frame is no grasp: the hand is still getting into its start pose.
    Raises ValueError naming the field when a value is out of range.
    """

    open_width_m: float
    delta_on_m: float
    delta_off_m: float
    min_frames: int = 3
    min_gap_frames: int = 3
    gap_m: float = 0.015
    settle_m: float = 0.001
    min_object_width_m: float = 0.0
    start_frames: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.open_width_m <= MAX_WIDTH_M:
            raise ValueError(f"open_width_m: {self.open_width_m} must be in (0, {MAX_WIDTH_M}] metres")
        if not 0 < self.delta_off_m <= self.delta_on_m <= self.open_width_m:
            raise ValueError(
                f"delta_off_m, delta_on_m: 0 < delta_off_m <= delta_on_m <= open_width_m must hold, got {self.delta_off_m}, "
                f"{self.delta_on_m} with open_width_m {self.open_width_m}"
            )
        for name, least in (("min_frames", 1), ("min_gap_frames", 1), ("start_frames", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least {least}")
        if not 0 <= self.min_object_width_m < self.open_width_m:
            raise ValueError(f"min_object_width_m: {self.min_object_width_m} must be in [0, open_width_m = {self.open_width_m})")
        for name in ("gap_m", "settle_m"):
            if not 0 < getattr(self, name) <= MAX_WIDTH_M:
                raise ValueError(f"{name}: {getattr(self, name)} must be in (0, {MAX_WIDTH_M}] metres")


@dataclass(frozen=True)
class ContactEvent:
    """One contact: frames onset .. offset-1; offset is None while the contact still lasts at the last frame.

    width_m is the median width while in contact: what is between the fingers; low_m the least (dropouts of the sensor
    left out): did it stay there. kind: grasp (between the fingers) or touch (something was pushed; see `touch_events`).
    """

    onset: int
    offset: int | None
    width_m: float
    low_m: float
    kind: EventKind = "grasp"


def check_widths(widths: npt.ArrayLike, frames: int | None = None, field: str = "gripper_width_m") -> WidthArray:
    """`widths` as float64 (F,) in metres. Raises ValueError naming `field` and the limit for every kind of bad series.

    frames: how many frames the episode has, where known; the series must have as many.
    """
    try:
        w = np.asarray(widths, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{field}: must be a list of numbers, metres") from None
    if w.ndim != 1:
        raise ValueError(f"{field}: must have one dimension (one width per frame), got shape {w.shape}")
    if w.size == 0:
        raise ValueError(f"{field}: is empty; at least one width is needed")
    if w.size > MAX_FRAMES:
        raise ValueError(f"{field}: has {w.size} values, the limit is {MAX_FRAMES}")
    if frames is not None and w.size != frames:
        raise ValueError(f"{field}: has {w.size} values, but the episode has {frames} frames; one width per frame is needed")
    finite = np.isfinite(w)
    if not finite.all():
        raise ValueError(f"{field}: value {int(np.argmin(finite))} is NaN or infinite")
    low, high = float(w.min()), float(w.max())
    if low < 0:
        raise ValueError(f"{field}: value {int(w.argmin())} is {low:g}; a width is at least 0 m")
    if high > MAX_WIDTH_M:
        raise ValueError(
            f"{field}: value {int(w.argmax())} is {high:g}, more than {MAX_WIDTH_M} m: this looks like millimetres; give metres"
        )
    return w


def contact_mask(w: WidthArray, calibration: GripperCalibration, commanded: WidthArray | None = None) -> npt.NDArray[np.bool_]:
    """Contact by hysteresis, before lengths are looked at: bool (F,). `commanded`: (F,) commanded widths in metres, or None."""
    closure = calibration.open_width_m - w
    on = closure >= calibration.delta_on_m
    off = closure < calibration.delta_off_m
    if commanded is not None:
        still = np.abs(np.diff(w, prepend=np.inf)) <= calibration.settle_m
        on = on | ((w - commanded >= calibration.gap_m) & still & ~off)
    return hysteresis(on, off)


def hysteresis(on: npt.NDArray[np.bool_], off: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """State (F,) that starts where `on` and lasts until `off`; off before any decision. No frame may be both."""
    # State at t = that of the last decided frame: carry its index forward.
    last = np.maximum.accumulate(np.where(on | off, np.arange(on.size), -1))
    mask: npt.NDArray[np.bool_] = on[last] & (last >= 0)
    return mask


def spans(mask: npt.NDArray[np.bool_], min_frames: int, min_gap: int) -> list[tuple[int, int]]:
    """Runs [start, end) of `mask` (F,) after gaps shorter than min_gap are closed, less those with fewer true frames than
    min_frames; frames of closed gaps do not count."""
    padded = np.zeros(mask.size + 2, np.bool_)
    padded[1:-1] = mask
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    starts, ends = edges[0::2], edges[1::2]
    if starts.size > 1:
        wide = starts[1:] - ends[:-1] >= min_gap
        starts, ends = starts[np.r_[True, wide]], ends[np.r_[wide, True]]
    return [(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True) if np.count_nonzero(mask[a:b]) >= min_frames]


def contact_events(
    widths: npt.ArrayLike, calibration: GripperCalibration, *, commanded: npt.ArrayLike | None = None, frames: int | None = None
) -> tuple[ContactEvent, ...]:
    """The contacts of a width series (F,) in metres, in time order.

    Gaps shorter than min_gap_frames are closed first (a bounce is one contact), then events with fewer than min_frames frames
    of contact dropped; closed gaps do not count, so two spikes side by side are no event.
    commanded: optional commanded widths (F,), the second cue. Raises ValueError as `check_widths`.
    """
    w = check_widths(widths, frames)
    command = None if commanded is None else check_widths(commanded, w.size, "commanded_width_m")
    mask = contact_mask(w, calibration, command)
    if not mask.any():
        return ()
    found, real = [], _real(w, calibration)
    for a, b in spans(mask, calibration.min_frames, calibration.min_gap_frames):
        held = np.sort(w[a:b])
        median = (held[(b - a) // 2] + held[(b - a - 1) // 2]) / 2
        low = float(w[a:b][real[a:b]].min(initial=median))
        found.append(ContactEvent(a, b if b < w.size else None, float(median), low))
    return tuple(found)


def _real(w: WidthArray, calibration: GripperCalibration) -> npt.NDArray[np.bool_]:
    """Frames (F,) that are no dropouts of the sensor: dips of more than gap_m that end within min_frames.

    (Fingers that slip off an object close and open again less steeply than that.)
    """
    n = calibration.min_frames
    filled = _slide(np.minimum, _slide(np.maximum, np.pad(w, n - 1, mode="edge"), n), n)
    real: npt.NDArray[np.bool_] = filled - w <= calibration.gap_m
    return real


def _slide(pick: np.ufunc, x: WidthArray, frames: int) -> WidthArray:
    """`pick` (minimum or maximum) over each window of `frames` in x (F,): (F - frames + 1,)."""
    result: WidthArray = pick.reduce([x[i : x.size - frames + 1 + i] for i in range(frames)], axis=0)
    return result


def calibrated(base: GripperCalibration, episodes: Iterable[npt.ArrayLike]) -> GripperCalibration:
    """`base` with the fully-open width that the width series (F,) of one hand's episodes show, metres: the widest that each
    keeps for min_frames, the median over episodes, so that neither a spike nor an episode that never opens decides. `base` as it
    is where that is no contact's worth of closing: fingers that never open do not show how wide they would.

    Raises ValueError as `check_widths`, and without episodes.
    """
    series = [check_widths(w) for w in episodes]
    widest = [_slide(np.minimum, w, min(base.min_frames, w.size)).max() for w in series]
    if not widest:
        raise ValueError("episodes: at least one is needed to calibrate a hand")
    shown = float(np.median(widest))
    return base if shown < base.delta_on_m else replace(base, open_width_m=shown)


def commanded_widths(commands: npt.ArrayLike, calibration: GripperCalibration) -> WidthArray:
    """Gripper commands (F,), -1 open to +1 close (LIBERO, RoboCasa, Meta-World), as the widths they ask for, in metres.

    For `contact_events(commanded=...)`. One command per frame: that of the action which led to the frame (so the first frame's
    is the opening command). Raises ValueError naming the field for a command outside [-1, 1].
    """
    c = np.asarray(commands, dtype=np.float64)
    if c.ndim != 1 or not np.isfinite(c).all() or (np.abs(c) > 1).any():
        raise ValueError("gripper command: must be one number in [-1 (open), 1 (close)] per frame")
    widths: WidthArray = calibration.open_width_m * (1 - c) / 2
    return widths


def as_json(events: Sequence[ContactEvent]) -> list[dict[str, float | int | str | None]]:
    """Events as JSON objects."""
    return [
        {"onset": e.onset, "offset": e.offset, "width_m": round(e.width_m, 6), "low_m": round(e.low_m, 6), "kind": e.kind}
        for e in events
    ]
