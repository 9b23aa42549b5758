"""Skill segmentation on one core: episodes/s of 81 frames, against a frame-by-frame loop; the online skill; a demonstration file.

`python -m bench.segmentation` prints the rows.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable

import h5py
import numpy as np
import numpy.typing as npt

from services.segmenter.episodes import read_widths
from world2act.segmentation import (
    OnlineSkill,
    RuleBasedPlanner,
    commanded_widths,
    contact_events,
    default_planner,
    load_schemas,
    segment_series,
)

INSTRUCTION = "pick up the puck and place it at the goal"
LIBERO = "put both the alphabet soup and the tomato sauce in the basket"
LIBERO_NAME = f"LIVING_ROOM_SCENE2_{LIBERO.replace(' ', '_')}"
FRAMES = 81
HAND = load_schemas().calibration("metaworld")


def widths(episodes: int) -> list[npt.NDArray[np.float64]]:
    """Noisy pick-and-place series (FRAMES,) in metres."""
    rng = np.random.default_rng(0)
    made = []
    for onset in rng.integers(12, 50, episodes):
        clean = np.interp(np.arange(FRAMES), [0, onset, onset + 6, FRAMES], [0.0883, 0.0883, 0.035, 0.035])
        made.append(np.clip(clean + rng.normal(0, 0.001, FRAMES), 0, None))
    return made


def loop_events(w: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    """Hysteresis frame by frame, the obvious way: what the vectorised events are compared with."""
    found, start, contact = [], 0, False
    for t, value in enumerate(w):
        closure = HAND.open_width_m - value
        if not contact and closure >= HAND.delta_on_m:
            contact, start = True, t
        elif contact and closure < HAND.delta_off_m:
            contact = False
            found.append((start, t))
    return found + ([(start, len(w))] if contact else [])


def rate(work: Callable[[], int], seconds: float = 0.5) -> float:
    """Best of three runs: items/s of `work`, which returns how many it did, repeated for about `seconds` in all."""
    best = 0.0
    for _ in range(3):
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds / 3:
            done += work()
        best = max(best, done / (time.perf_counter() - start))
    return best


def demonstration_file(series: list[npt.NDArray[np.float64]]) -> bytes:
    """A demonstration file of widths only."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"gripper_open_width": HAND.open_width_m})
        for i, w in enumerate(series):
            demo = data.create_group(f"demo_{i}")
            demo.attrs.update({"task": "pick-place", "instruction": INSTRUCTION})
            demo["actions"] = np.zeros((len(w) - 1, 4), np.float32)
            demo["obs/gripper_width"], demo["final_obs/gripper_width"] = w[:-1], w[-1]
    return buffer.getvalue()


def run() -> list[dict[str, object]]:
    """Rows {name, value, unit, ratio}."""
    series = widths(200)
    file = demonstration_file(series)
    assert all(segment_series(w, INSTRUCTION).discarded is None for w in series)

    def segment() -> int:
        for w in series:
            segment_series(w, INSTRUCTION)
        return len(series)

    def events() -> int:
        for w in series:
            contact_events(w, HAND)
        return len(series)

    def loop() -> int:
        for w in series:
            loop_events(w)
        return len(series)

    def online() -> int:
        skill = OnlineSkill(default_planner().plan(INSTRUCTION))
        for value in series[0]:
            skill.update(float(value))
        return FRAMES

    def plan() -> int:
        RuleBasedPlanner().plan(INSTRUCTION)
        return 1

    panda = load_schemas().calibration("panda")
    commanded = commanded_widths(np.where(np.arange(FRAMES) < 40, -1.0, 1.0), panda)
    libero = [np.minimum(w, panda.open_width_m) for w in series]

    def wide() -> int:
        for w in libero:
            segment_series(w, LIBERO, task=LIBERO_NAME, calibration=panda, commanded=commanded)
        return len(libero)

    def from_file() -> int:
        for found in read_widths(file, None, len(series)):
            segment_series(found.widths, found.instruction, task=found.task, frames=found.frames)
        return len(series)

    whole, vectorised, plain = rate(segment), rate(events), rate(loop)
    return [
        {"name": f"segment an episode of {FRAMES} frames", "value": whole, "unit": "episodes/s", "ratio": ""},
        {
            "name": "of that: contact events",
            "value": vectorised,
            "unit": "episodes/s",
            "ratio": f"{vectorised / plain:.2f} of a bare hysteresis loop without checks",
        },
        {"name": "the same in LIBERO, with commands", "value": rate(wide), "unit": "episodes/s", "ratio": ""},
        {"name": "online skill, one width", "value": rate(online), "unit": "updates/s", "ratio": ""},
        {"name": "plan an instruction not seen before", "value": rate(plan), "unit": "plans/s", "ratio": ""},
        {
            "name": "read widths from HDF5 and segment",
            "value": (from_disk := rate(from_file)),
            "unit": "episodes/s",
            "ratio": f"{from_disk / whole:.2f} of memory",
        },
    ]


if __name__ == "__main__":
    for row in run():
        print(f"{row['name']:<42} {row['value']:>12,.0f} {row['unit']:<12} {row['ratio']}")
