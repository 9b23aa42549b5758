"""The base policy interface: small, and ours. A new policy is one file here plus one line in `REGISTRY`.

Subclasses implement `spec` and `_act`; `plan` checks every input and output once, so that a policy that misbehaves is caught here
and not in a simulator. tests/conformance/test_policies.py holds what any policy must satisfy.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from services.vla.policies.plans import NOWHERE, Plans, Turn
from services.vla.settings import VlaSettings
from world2act.types import FloatArray, ImageArray

REGISTRY: dict[str, str] = {
    "cosmos_policy": "services.vla.policies.cosmos_policy:build",
    "gr00t": "services.vla.policies.gr00t:build",
    "lerobot": "services.vla.policies.lerobot:build",
    "openpi": "services.vla.policies.openpi:build",
    "openvla_oft": "services.vla.policies.openvla_oft:build",
    "remote": "services.vla.policies.remote:build",
    "tiny": "services.vla.policies.tiny:build",
}
"""Policy name -> 'module:function' that takes the settings. Imported on use: a process pays only for the policy it runs."""


@dataclass(frozen=True)
class PolicySpec:
    """What a policy reads and returns.

    cameras: name -> cell of the 2x2 grid (0 top-left, 1 top-right, 2, 3), each `height` x `width` pixels; state_size S;
    low, high: limits of the A action components in the simulator's units; chunk: M; hash: sha256 of the weights;
    block: rows per call, always exactly that many (0: any number), see `in_blocks`; horizon: actions that one call plans (0: M);
    table: what says cameras and sizes, and the setting that names it, where that is no weights file.
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
    horizon: int = 0
    table: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "horizon", self.horizon or self.chunk)
        if self.horizon < self.chunk:
            raise ValueError(f"horizon: {self.horizon} actions are shorter than a chunk of M = {self.chunk}")

    @property
    def action_size(self) -> int:
        return len(self.low)


class BasePolicy(ABC):
    """A frozen policy: what it plans for a row depends on that row alone.

    The one memory is what a policy with a long horizon has planned but not yet done, kept per episode (plans.py).
    """

    plans_kept = 1024
    """Episodes whose plans are remembered."""

    @property
    @abstractmethod
    def spec(self) -> PolicySpec:
        """The same for the whole life of the object."""

    def act(self, grids: ImageArray, states: FloatArray, instructions: Sequence[str], turns: Sequence[Turn] = ()) -> FloatArray:
        """The first M actions of `plan`, float32 (B, M, A)."""
        return np.stack([rest[: self.spec.chunk] for rest in self.plan(grids, states, instructions, turns)])

    def plan(
        self, grids: ImageArray, states: FloatArray, instructions: Sequence[str], turns: Sequence[Turn] = ()
    ) -> list[FloatArray]:
        """What each row will do: camera grids uint8 (B, 2 height, 2 width, 3), states (B, S), an instruction a row -> B arrays
        float32 (>= M, A), in the simulator's units, within the limits. `turns` may continue earlier plans; none: all are new.

        Raises ValueError for inputs of a wrong size, RuntimeError when the policy breaks its promise.
        """
        spec, rows = self.spec, len(instructions)
        for name, array, shape, dtype in (
            ("grids", grids, (rows, 2 * spec.height, 2 * spec.width, 3), np.uint8),
            ("states", states, (rows, spec.state_size), np.float32),
        ):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name}: must be {np.dtype(dtype)} {shape}, got {array.dtype} {array.shape}")
        low, high = np.array(spec.low, np.float32), np.array(spec.high, np.float32)
        return [np.clip(rest, low, high) for rest in self._continue(grids, states, instructions, turns or [NOWHERE] * rows)]

    def _continue(
        self, grids: ImageArray, states: FloatArray, instructions: Sequence[str], turns: Sequence[Turn]
    ) -> list[FloatArray]:
        """What is left of kept plans; new ones for the rows that have none."""
        rests = [self._plans.rest(turn, text, self.spec.chunk) for turn, text in zip(turns, instructions, strict=True)]
        new = [i for i, rest in enumerate(rests) if rest is None]
        if new:
            texts = [instructions[i] for i in new]
            made = self._checked(in_blocks(self._act, self.spec.block, grids[new], states[new], texts), len(new))
            for i, plan in zip(new, made, strict=True):
                rests[i] = plan
                self._plans.keep(turns[i], instructions[i], plan)
        return [rest for rest in rests if rest is not None]

    @cached_property
    def _plans(self) -> Plans:
        return Plans(self.plans_kept)

    def _checked(self, plans: FloatArray, rows: int) -> FloatArray:
        spec = self.spec
        if plans.shape != (rows, spec.horizon, spec.action_size) or plans.dtype != np.float32:
            raise RuntimeError(f"policy {spec.name}: actions are {plans.dtype} {plans.shape}")
        if not np.isfinite(plans).all():
            raise RuntimeError(f"policy {spec.name}: actions are not finite")
        return plans

    def away(self) -> str:
        """Why a server that it needs cannot be reached now; empty where nothing is missing."""
        return ""

    @abstractmethod
    def _act(self, grids: ImageArray, states: FloatArray, instructions: Sequence[str]) -> FloatArray:
        """New plans float32 (B, horizon, A), in the simulator's units."""


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
    try:
        build = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ValueError(f"policy: {name} needs {error.name}, which is missing; install the extra `policies`") from None
    policy = build(settings)
    assert isinstance(policy, BasePolicy)
    return policy
