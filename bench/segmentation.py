"""Skill segmentation on one core: episodes/s of 81 frames, against a frame-by-frame loop; the online skill; whole files and
build-skills, MB/s.

`python -m bench.segmentation` prints the rows.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
from rich.console import Console

from services.cli import skills
from services.segmenter.episodes import open_episodes
from world2act.segmentation import (
    OnlineSkill,
    RuleBasedPlanner,
    commanded_widths,
    contact_events,
    default_planner,
    load_schemas,
    segment_episode,
    segment_series,
)
from world2act.skillset import hand_of_source
from world2act.splits import Split

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


def demonstration_file(path: Path, series: list[npt.NDArray[np.float64]], size: int = 64, instruction: str = LIBERO) -> None:
    """LIBERO's layout: two uncompressed cameras of size x size pixels, one demonstration for each series."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
        data.attrs["bddl_file_name"] = f"LIVING_ROOM_SCENE2_{instruction.replace(' ', '_')}.bddl"
        noise = np.random.default_rng(0).integers(0, 256, (FRAMES, size, size, 3), np.uint8)
        for i, w in enumerate(series):
            demo = data.create_group(f"demo_{i}")
            actions = np.zeros((len(w), 7))
            actions[:, 6] = np.where(np.gradient(w) < 0, 1.0, -1.0)
            demo["actions"], demo["obs/ee_states"] = actions, np.zeros((len(w), 6))
            demo["obs/gripper_states"] = np.stack([w / 2, -w / 2], axis=1)
            demo["obs/agentview_rgb"] = demo["obs/eye_in_hand_rgb"] = noise


def files(series: list[npt.NDArray[np.float64]]) -> list[dict[str, object]]:
    """Read and cut a file of demonstrations, with and without its images, against reading its bytes. MB of the file a second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "libero_demo.hdf5"
        demonstration_file(path, series)
        megabytes = path.stat().st_size / 1e6
        source = open_episodes(path)
        _, hand = hand_of_source(source) or (None, None)

        def cut(images: bool) -> int:
            for key in source.keys():  # noqa: SIM118
                episode = source.read(key, images=images)
                segment_episode(episode, calibration=hand)
            return 1

        def build() -> int:
            with tempfile.TemporaryDirectory() as out:
                settings = skills.BuildSettings(path, Path(out) / "skills", split=Split.WORLDMODEL, workers=1)
                skills.build(settings, Console(quiet=True))
            return 1

        alone = megabytes * rate(lambda: len(path.read_bytes()) and 1)
        rows = [("read and cut a file, images too", True), ("read and cut a file, without images", False)]
        done = {name: rate(lambda images=images: cut(images)) for name, images in rows}  # type: ignore[misc]
        done["build-skills: read, cut, write the clips"] = rate(build)
        return [
            {
                "name": "read a file's bytes",
                "value": alone,
                "unit": "MB/s",
                "ratio": f"{megabytes:.0f} MB, {len(series)} demonstrations",
            },
            *(
                {
                    "name": name,
                    "value": megabytes * value,
                    "unit": "MB/s",
                    "ratio": f"{megabytes * value / alone:.2f} of reading its bytes; {len(series) * value:,.0f} episodes/s",
                }
                for name, value in done.items()
            ),
        ]


def run() -> list[dict[str, object]]:
    """Rows {name, value, unit, ratio}."""
    series = widths(200)
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
        *files([np.minimum(w, panda.open_width_m) for w in series[:50]]),
    ]


if __name__ == "__main__":
    for row in run():
        print(f"{row['name']:<42} {row['value']:>12,.0f} {row['unit']:<12} {row['ratio']}")
