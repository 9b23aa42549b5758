"""What the trainings of the embedded models share: where they run, mixed precision, learning-rate schedule."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from world2act.types import Device

Precision = Literal["auto", "float32", "bfloat16"]


def device_of(device: Device) -> torch.device:
    """auto: the GPU where there is one. Raises ValueError for cuda where torch sees none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no GPU (torch.cuda.is_available() is False)")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(precision: Precision, device: torch.device | None = None) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU, and where the CPU has AMX (`auto`): twice as fast there, half as fast elsewhere; weights and loss stay
    float32. device: None is the CPU."""
    kind = device.type if device else "cpu"
    fast = precision == "bfloat16" or (precision == "auto" and (kind == "cuda" or torch.cpu._is_amx_tile_supported()))
    return torch.autocast(kind, torch.bfloat16, enabled=fast)


def warm_cosine(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over the first 5 % of `steps`, then a half cosine to zero."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
