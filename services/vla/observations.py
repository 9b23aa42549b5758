"""What a client sent, checked once: protobuf observations -> arrays. Every error names the field and the limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from services.runtime.generated import policy_pb2
from services.runtime.tensors import from_tensor
from services.vla.policies.base import PolicySpec
from services.vla.policies.plans import NOWHERE, Turn
from world2act.data.grid import stitch
from world2act.types import FloatArray, ImageArray

MAX_INSTRUCTION = 500
NAMESPACE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
EPISODE = re.compile(r"^[A-Za-z0-9._-]{0,80}$")
DEFAULT_NAMESPACE = "default"


@dataclass(frozen=True)
class Observations:
    """B rows. grids: uint8 (B, H, W, 3), all cameras in one image; states: float32 (B, S); one instruction a row.

    turns: where each row stands in its episode; none: every row is on its own.
    """

    grids: ImageArray
    states: FloatArray
    instructions: tuple[str, ...]
    turns: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", self.turns or (NOWHERE,) * len(self.instructions))

    def __len__(self) -> int:
        return len(self.instructions)

    def take(self, where: npt.NDArray[np.int64]) -> Observations:
        """The rows numbered `where`."""
        texts = tuple(self.instructions[i] for i in where)
        return Observations(self.grids[where], self.states[where], texts, tuple(self.turns[i] for i in where))

    @staticmethod
    def join(parts: Sequence[Observations]) -> Observations:
        """The rows of all `parts`, in order."""
        if len(parts) == 1:
            return parts[0]
        return Observations(
            np.concatenate([p.grids for p in parts]),
            np.concatenate([p.states for p in parts]),
            tuple(text for p in parts for text in p.instructions),
            tuple(turn for p in parts for turn in p.turns),
        )


def read_namespace(name: str) -> str:
    """The namespace asked for; empty means 'default'. Raises ValueError."""
    name = name or DEFAULT_NAMESPACE
    if not NAMESPACE.match(name):
        raise ValueError(f"namespace: must be 1 to 80 of A-Z a-z 0-9 . _ - and start with a letter or digit, got {name[:80]!r}")
    return name


def read_observations(observations: Sequence[policy_pb2.Observation], spec: PolicySpec, limit: int) -> Observations:
    """Raises ValueError naming row and field: cameras, image size, dtype, state size, NaN, instruction, number of rows."""
    if not 1 <= len(observations) <= limit:
        raise ValueError(f"observations: must be 1 to {limit} in one request, got {len(observations)}")
    names = [f"observations[{i}]" for i in range(len(observations))]
    rows = [_read_images(o, spec, name) for o, name in zip(observations, names, strict=True)]
    images = {camera: np.stack([row[camera] for row in rows]) for camera in spec.cameras}
    return Observations(
        stitch(images, spec.cameras),
        np.stack(
            [
                check_state(from_tensor(o.state, f"{n}.state"), spec, f"{n}.state")
                for o, n in zip(observations, names, strict=True)
            ]
        ),
        tuple(check_instruction(o.instruction, f"{n}.instruction") for o, n in zip(observations, names, strict=True)),
        tuple(_read_turn(o, n) for o, n in zip(observations, names, strict=True)),
    )


def _read_images(observation: policy_pb2.Observation, spec: PolicySpec, field: str) -> dict[str, ImageArray]:
    for camera in spec.cameras:
        if camera not in observation.images:
            raise ValueError(f"{field}.images: camera {camera!r} is missing; needed are {', '.join(spec.cameras)}{_by(spec)}")
    images = {}
    for camera in sorted(observation.images):
        if camera not in spec.cameras:
            known = ", ".join(spec.cameras)
            raise ValueError(f"{field}.images: camera {camera[:80]!r} is unknown; needed are {known}{_by(spec)}")
        name = f"{field}.images[{camera!r}]"
        image = from_tensor(observation.images[camera], name)
        if image.dtype != np.uint8:
            raise ValueError(f"{name}: dtype must be uint8, got {image.dtype}")
        if image.shape != (spec.height, spec.width, 3):
            raise ValueError(f"{name}: shape must be ({spec.height}, {spec.width}, 3), got {image.shape}")
        images[camera] = image
    return images


def _by(spec: PolicySpec) -> str:
    return f" ({spec.table})" if spec.table else ""


def _read_turn(observation: policy_pb2.Observation, field: str) -> Turn:
    if not EPISODE.match(observation.episode):
        raise ValueError(f"{field}.episode: must be at most 80 of A-Z a-z 0-9 . _ -, got {observation.episode[:80]!r}")
    if observation.step < 0:
        raise ValueError(f"{field}.step: must be >= 0, got {observation.step}")
    return Turn(observation.episode, observation.step)


def check_state(state: npt.NDArray[Any], spec: PolicySpec, name: str) -> FloatArray:
    """`state` if it is finite float32 (S,). Raises ValueError."""
    if state.dtype != np.float32:
        raise ValueError(f"{name}: dtype must be float32, got {state.dtype}")
    if state.shape != (spec.state_size,):
        raise ValueError(f"{name}: shape must be ({spec.state_size},){_by(spec)}, got {state.shape}")
    if not np.isfinite(state).all():
        raise ValueError(f"{name}: must be finite, got NaN or infinity at index {int(np.argmin(np.isfinite(state)))}")
    return state


def check_instruction(text: str, name: str) -> str:
    """`text` if it is a usable instruction. Raises ValueError."""
    if not text.strip():
        raise ValueError(f"{name}: must not be empty")
    if len(text) > MAX_INSTRUCTION:
        raise ValueError(f"{name}: must have at most {MAX_INSTRUCTION} characters, got {len(text)}")
    return text
