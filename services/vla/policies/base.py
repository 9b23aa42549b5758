"""The base policy interface: small, and ours. A new policy is one file here plus one line in `REGISTRY`.

Subclasses implement `spec` and `_act`; `act` checks every output once, so that a policy that misbehaves is caught here and not
in a simulator. tests/conformance/test_policies.py holds what any policy must satisfy.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from services.vla.settings import VlaSettings
from world2act.types import FloatArray, ImageArray

REGISTRY: dict[str, str] = {
    "tiny": "services.vla.policies.tiny:build",
}
"""Policy name -> 'module:function' that takes the settings. Imported on use: a process pays only for the policy it runs."""


@dataclass(frozen=True)
class PolicySpec:
    """What a policy reads and returns.

    cameras: name -> cell of the 2x2 grid (0 top-left, 1 top-right, 2, 3), each `height` x `width` pixels; state_size S;
    low, high: limits of the A action components in the simulator's units; chunk: M; hash: sha256 of the weights;
    block: rows per call, always exactly that many (0: any number), see `in_blocks`.
    """

    name: str
    hash: str
    cameras: dict[str, int]
    height: int
    width: int
    state_size: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    chunk: int
    block: int = 0

    @property
    def action_size(self) -> int:
        return len(self.low)


class BasePolicy(ABC):
    """A frozen policy without memory: a row's action depends on that row alone."""

    @property
    @abstractmethod
    def spec(self) -> PolicySpec:
        """The same for the whole life of the object."""

    def act(self, grids: ImageArray, states: FloatArray, instructions: Sequence[str]) -> FloatArray:
        """Camera grids uint8 (B, 2 height, 2 width, 3), states (B, S), an instruction a row -> chunks float32 (B, M, A).

        Actions are in the simulator's units, within the limits. Raises RuntimeError when the policy breaks that promise.
        """
        spec = self.spec
        chunks = in_blocks(self._act, spec.block, grids, states, instructions)
        if chunks.shape != (len(grids), spec.chunk, spec.action_size) or chunks.dtype != np.float32:
            raise RuntimeError(f"policy {spec.name}: actions are {chunks.dtype} {chunks.shape}")
        if not np.isfinite(chunks).all():
            raise RuntimeError(f"policy {spec.name}: actions are not finite")
        return np.clip(chunks, np.array(spec.low, np.float32), np.array(spec.high, np.float32))

    @abstractmethod
    def _act(self, grids: ImageArray, states: FloatArray, instructions: Sequence[str]) -> FloatArray: ...


def in_blocks(function: Callable[..., FloatArray], block: int, *columns: Any) -> FloatArray:
    """`function` of columns (arrays or lists) of equal length B >= 1, called with exactly `block` rows at a time (0: all).

    Why: matrix kernels round differently for different batch sizes, so a row's action would depend on who else asked at
    that moment. With a constant size it does not, to the bit. The last block is filled with copies of its last row.
    """
    total = len(columns[0])
    if block < 1:
        return function(*columns)
    results = []
    for start in range(0, total, block):
        parts = [column[start : start + block] for column in columns]
        given = len(parts[0])
        results.append(function(*(_fill(part, block - given) for part in parts))[:given])
    return np.concatenate(results)


def _fill(part: Any, copies: int) -> Any:
    if copies == 0:
        return part
    if isinstance(part, np.ndarray):
        return np.concatenate([part, np.repeat(part[-1:], copies, axis=0)])
    return [*part, *[part[-1]] * copies]


def make(settings: VlaSettings) -> BasePolicy:
    """The policy that `settings` name. Raises ValueError for an unknown name or weights that do not fit."""
    name = settings.vla_policy
    if name not in REGISTRY:
        raise ValueError(f"policy: {name[:80]!r} is unknown; choose one of {', '.join(sorted(REGISTRY))}")
    module, function = REGISTRY[name].split(":")
    policy = getattr(importlib.import_module(module), function)(settings)
    assert isinstance(policy, BasePolicy)
    return policy
