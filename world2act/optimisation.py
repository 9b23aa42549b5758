"""What the trainings of the embedded models share: mixed precision on a CPU, learning-rate schedule."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def autocast(precision: Precision) -> AbstractContextManager[Any]:
    """bfloat16 where the CPU has AMX (`auto`): twice as fast there, half as fast elsewhere; weights and loss stay float32."""
    fast = precision == "bfloat16" or (precision == "auto" and torch.cpu._is_amx_tile_supported())
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def warm_cosine(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over the first 5 % of `steps`, then a half cosine to zero."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
