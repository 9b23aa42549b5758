"""Policies that act in the arena: a base alone, and a base with a residual on top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from world2act.bundle import Bundle
from world2act.models.tiny_policy import TinyPolicy


@dataclass
class Frozen:
    """A base policy alone."""

    base: TinyPolicy
    version: int = 0

    def act(self, frames: Tensor, states: Tensor, instructions: Sequence[str], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        chunk = self.base.act(frames, states, instructions)
        return chunk, chunk


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
