"""What a client sent, checked once: protobuf observations -> arrays. Every error names the field and the limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.runtime.generated import policy_pb2
from services.runtime.tensors import from_tensor
from services.vla.policies.base import PolicySpec
from world2act.data.grid import stitch
from world2act.types import FloatArray, ImageArray

MAX_INSTRUCTION = 500
NAMESPACE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
DEFAULT_NAMESPACE = "default"


@dataclass(frozen=True)
class Observations:
    """B rows. grids: uint8 (B, H, W, 3), all cameras in one image; states: float32 (B, S); one instruction a row."""

    grids: ImageArray
    states: FloatArray
    instructions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    def take(self, where: npt.NDArray[np.int64]) -> Observations:
        """The rows numbered `where`."""
        return Observations(self.grids[where], self.states[where], tuple(self.instructions[i] for i in where))

    @staticmethod
    def join(parts: Sequence[Observations]) -> Observations:
        """The rows of all `parts`, in order."""
        if len(parts) == 1:
            return parts[0]
        return Observations(
            np.concatenate([p.grids for p in parts]),
            np.concatenate([p.states for p in parts]),
            tuple(text for p in parts for text in p.instructions),
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
    rows = [_read_row(o, spec, f"observations[{i}]") for i, o in enumerate(observations)]
    images = {camera: np.stack([images[camera] for images, _, _ in rows]) for camera in spec.cameras}
    return Observations(
        stitch(images, spec.cameras), np.stack([state for _, state, _ in rows]), tuple(text for _, _, text in rows)
    )


def _read_row(observation: policy_pb2.Observation, spec: PolicySpec, field: str) -> tuple[dict[str, ImageArray], FloatArray, str]:
    for camera in spec.cameras:
        if camera not in observation.images:
            raise ValueError(f"{field}.images: camera {camera!r} is missing; needed are {', '.join(spec.cameras)}")
    images = {}
    for camera in sorted(observation.images):
        if camera not in spec.cameras:
            raise ValueError(f"{field}.images: camera {camera[:80]!r} is unknown; needed are {', '.join(spec.cameras)}")
        name = f"{field}.images[{camera!r}]"
        image = from_tensor(observation.images[camera], name)
        if image.dtype != np.uint8:
            raise ValueError(f"{name}: dtype must be uint8, got {image.dtype}")
        if image.shape != (spec.height, spec.width, 3):
            raise ValueError(f"{name}: shape must be ({spec.height}, {spec.width}, 3), got {image.shape}")
        images[camera] = image
    return images, _read_state(observation, spec, f"{field}.state"), _read_instruction(observation, f"{field}.instruction")


def _read_state(observation: policy_pb2.Observation, spec: PolicySpec, name: str) -> FloatArray:
    state = from_tensor(observation.state, name)
    if state.dtype != np.float32:
        raise ValueError(f"{name}: dtype must be float32, got {state.dtype}")
    if state.shape != (spec.state_size,):
        raise ValueError(f"{name}: shape must be ({spec.state_size},), got {state.shape}")
    if not np.isfinite(state).all():
        raise ValueError(f"{name}: must be finite, got NaN or infinity at index {int(np.argmin(np.isfinite(state)))}")
    return state


def _read_instruction(observation: policy_pb2.Observation, name: str) -> str:
    text = observation.instruction
    if not text.strip():
        raise ValueError(f"{name}: must not be empty")
    if len(text) > MAX_INSTRUCTION:
        raise ValueError(f"{name}: must have at most {MAX_INSTRUCTION} characters, got {len(text)}")
    return text
