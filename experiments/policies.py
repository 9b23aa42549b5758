"""Policies that act in the arena: a base alone, at play, and with a residual on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from world2act.bundle import Bundle
from world2act.models.tiny_policy import TinyPolicy

PLAY_SHARE = 0.5
LONGEST_SPAN = 3  # chunks


@dataclass
class Frozen:
    """A base policy alone. blind: it is shown zeros for its proprioception."""

    base: TinyPolicy
    version: int = 0
    blind: bool = False

    def act(self, frames: Tensor, states: Tensor, instructions: Sequence[str], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        chunk = self.base.act(frames, torch.zeros_like(states) if self.blind else states, instructions)
        return chunk, chunk


class Playing:
    """A base policy, half of the time interrupted by random motion with the hand open or closed, in spans of one to three chunks.

    One lane per instruction, as the arena has.
    """

    version = 0

    def __init__(self, base: TinyPolicy, seed: int) -> None:
        self.base, self._random = base, np.random.default_rng(seed)
        self._spans: dict[str, tuple[int, Tensor | None]] = {}  # instruction -> chunks left, motion (A,) or the base's

    def act(self, frames: Tensor, states: Tensor, instructions: Sequence[str], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        chunk = self.base.act(frames, states, instructions)
        moved = chunk.clone()
        for row, instruction in enumerate(instructions):
            left, motion = self._spans.get(instruction, (0, None))
            if left == 0:
                left, motion = int(self._random.integers(1, LONGEST_SPAN + 1)), None
                if self._random.random() < PLAY_SHARE:
                    motion = torch.from_numpy(self._random.normal(size=chunk.shape[2])).to(chunk)
                    motion[3:] = 2.0 * float(self._random.integers(2)) - 1.0  # what follows the arm's three is the hand
            self._spans[instruction] = left - 1, motion
            if motion is not None:
                moved[row] = motion
        return chunk, moved


@dataclass
class WithResidual:
    """A base policy and a residual bundle on top of it."""

    base: TinyPolicy
    bundle: Bundle
    encode: Callable[[Tensor], Tensor]

    @property
    def version(self) -> int:
        return self.bundle.version

    @torch.no_grad()
    def act(self, frames: Tensor, states: Tensor, instructions: Sequence[str], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        chunk = self.base.act(frames, states, instructions)
        return chunk, self.bundle.act(frames, states, chunk, instructions, self.encode)[1]
