"""Records teleoperated demonstrations as <out>/<split>/<task>.hdf5, the layout that every training reads (robomimic's).

Without --arm it is a dry run: noise images, a made-up pick and place. With --arm module:Class it records your arm through the
methods of `Arm`. Not run here on a real arm. A demonstration that you reject is not written; Ctrl-C keeps those before.
"""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import tyro

from world2act.data.robomimic import EpisodeWriter
from world2act.splits import Split
from world2act.types import Episode, FloatArray, ImageArray, M


class Arm(Protocol):
    """cameras: name -> cell of the 2x2 grid; open_width: of the gripper, metres; width_index: its place in the state."""

    cameras: dict[str, int]
    open_width: float
    width_index: int

    def observe(self) -> tuple[dict[str, ImageArray], FloatArray]:
        """Camera -> uint8 (height, width, 3), upright, and the state float32 (S,), of now."""

    def teleoperated(self) -> FloatArray | None:
        """The action float32 (A,) that the operator just gave and the arm began; None: the demonstration ends."""

    def keep(self) -> bool:
        """Whether the operator keeps the demonstration. Waits until the scene is set up again."""


class DryArm:
    """Closes over an object after 8 actions, lets go after 24, ends after 32."""

    cameras, open_width, width_index, at = {"primary": 0, "wrist": 1}, 0.08, 3, 0

    def observe(self) -> tuple[dict[str, ImageArray], FloatArray]:
        random, width = np.random.default_rng(self.at), 0.03 if 8 <= self.at < 24 else self.open_width
        images = {name: random.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in self.cameras}
        return images, np.array([0.01 * self.at, 0.0, 0.1, width], np.float32)

    def teleoperated(self) -> FloatArray | None:
        self.at += 1
        return np.array([0.5, 0.0, 0.0, 1.0 if 8 <= self.at < 24 else -1.0], np.float32) if self.at <= 32 else None

    def keep(self) -> bool:
        self.at = 0
        return True


@dataclass(frozen=True)
class Settings:
    """split: base for the base policy, worldmodel for world model and adapters, validation for their metrics; episodes: to be
    kept in this session; resume: add to the file of earlier ones."""

    task: str
    instruction: str
    out: Path = Path("data/robot")
    split: tyro.conf.EnumChoicesFromValues[Split] = Split.WORLDMODEL
    episodes: int = 20
    resume: bool = False
    arm: str = ""
    rate_hz: float = 20.0


def record(arm: Arm, settings: Settings, index: int) -> Episode:
    """One demonstration, cut to whole chunks."""
    frames, states, actions = [], [], list[FloatArray]()
    due = time.monotonic()
    while True:
        images, state = arm.observe()
        frames.append(images)
        states.append(state)
        action = arm.teleoperated()
        if action is None:
            break
        actions.append(action)
        due += 1 / settings.rate_hz
        time.sleep(max(0.0, due - time.monotonic()))
    steps = len(actions) - len(actions) % M
    seen = np.array(states[: steps + 1], np.float32)
    return Episode(
        settings.task,
        settings.split.value,
        index,
        settings.instruction,
        {name: np.stack([frame[name] for frame in frames[: steps + 1]]) for name in arm.cameras},
        seen,
        seen[:, arm.width_index].copy(),
        np.array(actions[:steps], np.float32),
        success=True,
    )


def main() -> int:
    settings = tyro.cli(Settings, description=__doc__)
    module, _, kind = settings.arm.partition(":")
    try:
        arm: Arm = getattr(importlib.import_module(module), kind)() if module else DryArm()
        about = {"env_name": settings.task, "simulator": settings.arm or "dry run", "control_hz": settings.rate_hz, "chunk": M}
        about |= {"cameras": arm.cameras, "gripper_open_width": arm.open_width, "gripper_width_index": arm.width_index}
        path, kept = settings.out / settings.split.value / f"{settings.task}.hdf5", 0
        if path.exists() and not settings.resume:
            raise ValueError(f"{path}: is there already; --resume adds to it")
        with EpisodeWriter(path, split=settings.split, env_args=about, resume=settings.resume) as writer:
            first = max(writer.indices, default=-1) + 1
            try:
                while kept < settings.episodes:
                    episode = record(arm, settings, first + kept)
                    if arm.keep():
                        writer.write(episode)
                        kept += 1
                        print(f"demonstration {kept} of {settings.episodes}: {len(episode.actions)} actions")
            except KeyboardInterrupt:
                print("ended by hand")
    except (ValueError, OSError, ImportError, AttributeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {kept} demonstrations added")
    return 0


if __name__ == "__main__":
    sys.exit(main())
