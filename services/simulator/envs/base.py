"""The environment interface: small, and ours. A new simulator is one file here plus one line in `REGISTRY`.

Subclasses implement `_describe`, `_reset` and `_step`; the public methods check every input once, so that all simulators
reject the same things with the same words. tests/conformance/ holds what any environment must satisfy.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from world2act.types import FloatArray, ImageArray

Frames = Literal["last", "none", "all"]
"""Which frames a step returns: one after its last action, none, or one after every action."""

REGISTRY: dict[str, str] = {
    "libero": "services.simulator.envs.libero:LiberoEnvironment",
    "metaworld": "services.simulator.envs.metaworld:MetaworldEnvironment",
    "metaworld-more": "services.simulator.envs.metaworld:MoreMetaworldEnvironment",
    "robocasa": "services.simulator.envs.robocasa:RobocasaEnvironment",
    "robocasa365": "services.simulator.envs.robocasa:Robocasa365Environment",
}
"""Simulator name -> 'module:class'. Imported on use: a process pays only for the simulator it runs."""

LIMIT_SLACK = 1e-5
"""Actions may leave their limits by float32 rounding, no more: a simulator must not clip in silence what is recorded."""


class InvalidInputError(ValueError):
    """A caller's mistake; the message starts with the field's name and states the limit."""


@dataclass(frozen=True)
class Camera:
    """A camera of `height` x `width` pixels shown in `cell` of the 2x2 grid: 0 top-left, 1 top-right, 2, 3."""

    name: str
    height: int
    width: int
    cell: int


@dataclass(frozen=True)
class Axis:
    """One component of a vector, with its unit and customary limits."""

    name: str
    unit: str
    low: float
    high: float


@dataclass(frozen=True)
class TaskSpec:
    """A task, the instruction that policies get (an example of it, where scenes differ in their words; see `Observation`), and
    its customary episode limit in chunks."""

    name: str
    instruction: str
    max_chunks: int


@dataclass(frozen=True)
class EnvironmentSpec:
    """What an environment is. `state` has S axes, `action` A; `chunk` is M; widths are metres."""

    simulator: str
    cameras: tuple[Camera, ...]
    state: tuple[Axis, ...]
    action: tuple[Axis, ...]
    chunk: int
    control_hz: float
    gripper_open_width: float
    gripper_width_index: int
    tasks: tuple[TaskSpec, ...]

    def task(self, name: str) -> TaskSpec:
        """The task called `name`. Raises InvalidInputError listing the choices."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise InvalidInputError(f"task: {name[:80]!r} is unknown; choose one of {', '.join(t.name for t in self.tasks)}")

    def env_args(self, task: str, camera_every: int = 1) -> dict[str, object]:
        """The env_args of a file with episodes of `task` (world2act/data/robomimic.py)."""
        return {
            "env_name": task,
            "simulator": self.simulator,
            "control_hz": self.control_hz,
            "chunk": self.chunk,
            "cameras": {camera.name: camera.cell for camera in self.cameras},
            "gripper_open_width": self.gripper_open_width,
            "gripper_width_index": self.gripper_width_index,
            **({"camera_every": camera_every} if camera_every > 1 else {}),
        }


@dataclass(frozen=True)
class Observation:
    """images: camera -> uint8 (height, width, 3), upright; state: float32 (S,); instruction: this episode's."""

    images: dict[str, ImageArray]
    state: FloatArray
    instruction: str = ""


@dataclass(frozen=True)
class StepResult:
    """images: camera -> uint8 (f, height, width, 3), f = 1, 0 or m; states: float32 (m, S) after each action.

    success: the simulator's own success at any step so far; done: the episode limit is reached.
    """

    images: dict[str, ImageArray]
    states: FloatArray
    success: bool
    done: bool


class Environment(ABC):
    """One simulated robot. Not thread-safe: one process owns it (GL contexts belong to threads)."""

    _actions_left: int | None = None

    @cached_property
    def spec(self) -> EnvironmentSpec:
        """The same as `describe()`."""
        return self.describe()

    @abstractmethod
    def describe(self) -> EnvironmentSpec:
        """Cameras, axes, tasks. Cheap, and the same for the whole life of the object."""

    def reset(self, task: str, seed: int) -> Observation:
        """Start an episode of `task` in the scene that `seed` >= 0 determines, bit for bit."""
        spec = self.spec.task(task)
        if not 0 <= seed < 2**31:
            raise InvalidInputError(f"seed: {seed} is outside [0, 2**31)")
        self._actions_left = None
        observation = self._reset(task, seed)
        self._actions_left = spec.max_chunks * self.spec.chunk
        return observation if observation.instruction else replace(observation, instruction=spec.instruction)

    def step(self, actions: FloatArray, frames: Frames = "last") -> StepResult:
        """Run `actions` float32 (m, A), 1 <= m <= M, open loop. Raises InvalidInputError, or RuntimeError from the simulator."""
        if self._actions_left is None:
            raise InvalidInputError("task: no episode is running; reset first")
        if self._actions_left <= 0:
            raise InvalidInputError("actions: the episode limit is reached; reset first")
        if frames not in get_args(Frames):
            raise InvalidInputError(f"frames: {frames!r} is unknown; choose one of {', '.join(get_args(Frames))}")
        actions = check_actions(actions, self.spec)
        self._actions_left -= len(actions)
        images, states, success = self._step(actions, frames)
        return StepResult(images, states, success, self._actions_left <= 0)

    @abstractmethod
    def _reset(self, task: str, seed: int) -> Observation:
        """An observation without an instruction gets the task's."""

    @abstractmethod
    def _step(self, actions: FloatArray, frames: Frames) -> tuple[dict[str, ImageArray], FloatArray, bool]: ...

    @abstractmethod
    def close(self) -> None:
        """Release the simulator and its GL context. Closing twice is harmless."""

    def expert_preview(self, frames: bool = True) -> tuple[FloatArray, dict[str, ImageArray]]:
        """What the expert would do next: a chunk (M, A) and its frames, camera -> uint8 (M or 0, height, width, 3).

        The episode stays as it was, to the bit. Privileged: for oracles in experiments. Raises as `expert_action`.
        """
        raise InvalidInputError(f"task: simulator {self.spec.simulator} has no scripted expert")

    def paint(self, seed: int | None) -> None:
        """From the next reset on, surfaces look as drawn from `seed`; None: as they are. Physics stays. For experiments.

        Raises InvalidInputError where there is one look.
        """
        raise InvalidInputError(f"paint: simulator {self.spec.simulator} has one look")

    def truth(self) -> dict[str, float]:
        """What is so after the last action, whatever cameras and proprioception show; changes nothing. Privileged: for scores.

        "touch/<body>": how many of the two fingers touch a movable body, 2 is a grasp; "height/<body>": metres, of bodies that
        move freely; "joint/<body>": metres or radians, of drawers, doors and knobs. Raises InvalidInputError with no episode.
        """
        raise InvalidInputError(f"truth: simulator {self.spec.simulator} does not tell")

    def expert_action(self) -> FloatArray:
        """The scripted expert's next action, float32 (A,). Raises InvalidInputError where the simulator has no expert."""
        raise InvalidInputError(f"task: simulator {self.spec.simulator} has no scripted expert")


def check_actions(actions: FloatArray, spec: EnvironmentSpec) -> FloatArray:
    """`actions` clipped to the exact limits. Raises InvalidInputError for dtype, shape, length, NaN or range."""
    size = len(spec.action)
    if actions.dtype != np.float32:
        raise InvalidInputError(f"actions: dtype must be float32, got {actions.dtype}")
    if actions.ndim != 2 or actions.shape[1] != size:
        raise InvalidInputError(f"actions: shape must be (m, {size}), got {actions.shape}")
    if not 1 <= len(actions) <= spec.chunk:
        raise InvalidInputError(f"actions: {len(actions)} actions, the limit is 1 to {spec.chunk} in one chunk")
    if not np.isfinite(actions).all():
        raise InvalidInputError("actions: values must be finite")
    low = np.array([axis.low for axis in spec.action], np.float32)
    high = np.array([axis.high for axis in spec.action], np.float32)
    if (actions < low - LIMIT_SLACK).any() or (actions > high + LIMIT_SLACK).any():
        name = spec.action[int(np.argmax(((actions < low - LIMIT_SLACK) | (actions > high + LIMIT_SLACK)).any(axis=0)))]
        raise InvalidInputError(f"actions: {name.name} is outside [{name.low:g}, {name.high:g}]; clip before sending")
    return np.clip(actions, low, high)


def stack_frames(frames: Sequence[Mapping[str, ImageArray]], cameras: tuple[Camera, ...]) -> dict[str, ImageArray]:
    """Frames in time order -> camera -> uint8 (f, height, width, 3); f may be 0."""
    return {
        camera.name: np.stack([frame[camera.name] for frame in frames])
        if frames
        else np.zeros((0, camera.height, camera.width, 3), np.uint8)
        for camera in cameras
    }


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """NumPy's global generator, which robosuite draws from, seeded inside and as it was after."""
    kept = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(kept)


def scene_draw(task: str, seed: int) -> int:
    """A 32-bit seed for `seeded`: every task draws its own scenes."""
    return int(np.random.default_rng([seed, *task.encode()]).integers(2**32))


def matching_tasks(spec: EnvironmentSpec, patterns: Sequence[str]) -> list[str]:
    """Names of the tasks that `patterns` ('*' and '?' are wild) match; none: all. InvalidInputError for one that matches none."""
    names = [task.name for task in spec.tasks]
    found = {pattern: fnmatch.filter(names, pattern) or [spec.task(pattern).name] for pattern in patterns or ["*"]}
    return list(dict.fromkeys(name for matches in found.values() for name in matches))


def make(simulator: str) -> Environment:
    """A new environment of `simulator`. Raises InvalidInputError for an unknown name."""
    if simulator not in REGISTRY:
        raise InvalidInputError(f"simulator: {simulator[:80]!r} is unknown; choose one of {', '.join(sorted(REGISTRY))}")
    module, name = REGISTRY[simulator].split(":")
    environment = getattr(importlib.import_module(module), name)()
    assert isinstance(environment, Environment)
    return environment
