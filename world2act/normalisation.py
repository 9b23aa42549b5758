"""Action statistics: adapters and residual work on (action - mean) / std, and the statistics travel with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_STD = 1e-2
"""Floor of a standard deviation, in the action's own unit: a component that never moves must not divide by zero."""


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation per component; float32 (n,) each."""

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise ValueError(
                f"statistics: mean and std must be equal (n,), got {tuple(self.mean.shape)}, {tuple(self.std.shape)}"
            )
        if not bool(torch.isfinite(self.mean).all() and torch.isfinite(self.std).all() and (self.std > 0).all()):
            raise ValueError("statistics: mean must be finite and std finite and > 0")

    @classmethod
    def fit(cls, values: Tensor, mask: Tensor) -> Statistics:
        """Of `values` (..., n) where bool `mask` (any leading part of ...) holds."""
        kept = values[mask].reshape(-1, values.shape[-1]).double()
        if len(kept) < 2:
            raise ValueError(f"statistics: need at least 2 unmasked values, got {len(kept)}")
        return cls(kept.mean(0).float(), kept.std(0).clamp_min(MIN_STD).float())

    def normalise(self, values: Tensor) -> Tensor:
        """(..., n) in the component's unit -> (..., n) in standard deviations."""
        return (values - self.mean.to(values.device)) / self.std.to(values.device)

    def denormalise(self, values: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return values * self.std.to(values.device) + self.mean.to(values.device)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """For a weights file: `<prefix>.mean`, `<prefix>.std`."""
        return {f"{prefix}.mean": self.mean, f"{prefix}.std": self.std}

    @classmethod
    def take(cls, tensors: Mapping[str, Tensor], prefix: str) -> Statistics:
        """Inverse of `tensors`. Raises ValueError naming what is missing."""
        missing = [f"{prefix}.{part}" for part in ("mean", "std") if f"{prefix}.{part}" not in tensors]
        if missing:
            raise ValueError(f"missing statistics: {', '.join(missing)}; without them actions would have the wrong scale")
        return cls(tensors[f"{prefix}.mean"], tensors[f"{prefix}.std"])
