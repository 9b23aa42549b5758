"""AdamW, clipped, with a learning rate that is a function of the step alone: resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

WARM_UP, START = 0.3, 1 / 25
"""One cycle: the share of steps that go up, and the first rate as a part of the largest."""


@dataclass(frozen=True)
class Optimiser:
    """schedule "one-cycle": up over the first 30 % of the steps, then down to 0, by cosines; "constant": the paper's."""

    rate: float = 1e-3
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    schedule: Literal["one-cycle", "constant"] = "one-cycle"

    def __post_init__(self) -> None:
        for name in ("rate", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: must be >= 0, got {getattr(self, name)}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """The optimiser over those `parameters` that are trained."""
        trained = [p for p in parameters if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.rate, betas=self.betas, weight_decay=self.weight_decay)

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` of `steps` (0-based)."""
        if self.schedule == "constant":
            return self.rate
        top = max(1.0, WARM_UP * steps - 1)
        if step <= top:
            return self.rate * (START + (1 - START) * 0.5 * (1 - math.cos(math.pi * step / top)))
        return self.rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - top) / max(1.0, steps - 1 - top))))

    def update(self, optimiser: torch.optim.AdamW, loss: Tensor, step: int, steps: int) -> None:
        """One update: gradients of `loss`, clipped, at the rate of `step`."""
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimiser.param_groups:
            group["lr"] = self.rate_at(step, steps)
            nn.utils.clip_grad_norm_(group["params"], self.clip)
        optimiser.step()
