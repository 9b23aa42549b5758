"""The residual bundle: what Stage 2 ships and the policy server loads. One safetensors file with its JSON inside.

It holds the residual's weights, action and state statistics, the bound, the action layout, and the hashes of the base policy,
world model and adapters that it was trained beside. `load` refuses, with a sentence that says what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from world2act.models import store
from world2act.models.adapters import ActionAdapter, ActionDecoder, AdapterSettings
from world2act.models.residual import ResidualPolicy, ResidualSettings
from world2act.normalisation import Statistics

KIND = "residual"


@dataclass(frozen=True)
class ActionLayout:
    """The simulator's action: a name and the limits of each of A components, in the simulator's units."""

    names: tuple[str, ...] = ("dx", "dy", "dz", "gripper")
    low: tuple[float, ...] = (-1.0, -1.0, -1.0, -1.0)
    high: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.low) == len(self.high):
            raise ValueError(f"action layout: {len(self.names)} names, {len(self.low)} low, {len(self.high)} high limits")
        if any(low >= high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError("action layout: every low limit must be below its high limit")


@dataclass(frozen=True)
class Origin:
    """sha256 of the weights that a residual was trained beside; it is worthless with others."""

    base: str
    worldmodel: str
    adapters: str


@dataclass
class Bundle:
    """A residual policy with everything needed to run it. version: the policy version it is (0 is the base alone)."""

    policy: ResidualPolicy
    adapters: AdapterSettings
    actions: Statistics
    layout: ActionLayout
    origin: Origin
    version: int
    card: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def combine(self, visual: Tensor, states: Tensor, base: Tensor, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Residual and combined = clip(base + residual), both (N, M, A) in the simulator's units.

        visual: latents (N, C, h, w) or uint8 frames (N, H, W, 3), see `policy.settings.vision`; states (N, S); base (N, M, A).
        """
        normalised = self.policy(visual, states, self.actions.normalise(base), instructions)
        residual = normalised * self.actions.std
        combined = torch.minimum(
            torch.maximum(base + residual, base.new_tensor(self.layout.low)), base.new_tensor(self.layout.high)
        )
        return residual, combined

    def act(
        self, frames: Tensor, states: Tensor, base: Tensor, instructions: Sequence[str], encode: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`combine` from camera grids uint8 (N, H, W, 3); encode: the world model's, (N, 1, H, W, 3) -> (N, 1, C, h, w)."""
        visual = encode(frames[:, None])[:, 0] if self.policy.settings.vision == "latent" else frames
        return self.combine(visual, states, base, instructions)

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        config = {
            "residual": asdict(self.policy.settings),
            "adapters": asdict(self.adapters),
            "layout": asdict(self.layout),
            "origin": asdict(self.origin),
            "version": self.version,
        }
        tensors = {**self.policy.state_dict(), **self.actions.tensors("actions")}
        return tensors, {"kind": KIND, "config": config, "card": self.card}

    def to_bytes(self) -> bytes:
        """The file's content."""
        return store.to_bytes(*self._contents())

    def save(self, path: Path | str) -> str:
        """Write the file whole or not at all; returns its sha256."""
        return store.write(path, *self._contents())

    @classmethod
    def load(cls, path: Path | str, expected: Origin | None = None, layout: ActionLayout | None = None) -> Bundle:
        """Read and check. Raises WeightsError naming what is damaged, missing, or differs from `expected` and `layout`."""
        return cls.from_bytes(Path(path).read_bytes(), str(path), expected, layout)

    @classmethod
    def from_bytes(
        cls, content: bytes, name: str = "bundle", expected: Origin | None = None, layout: ActionLayout | None = None
    ) -> Bundle:
        """`load` of bytes in memory; `name` stands in the error."""
        tensors, metadata, _ = store.parse(content, KIND, name)
        try:
            bundle = cls._build(tensors, metadata)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise store.WeightsError(f"{name}: does not hold a residual policy that can run ({error})") from None
        bundle._check(name, expected, layout)
        return bundle

    @classmethod
    def _build(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Bundle:
        config = metadata["config"]
        adapters = AdapterSettings(**{**config["adapters"], "pool_grid": tuple(config["adapters"]["pool_grid"])})
        settings = ResidualSettings(**{**config["residual"], "latent_shape": tuple(config["residual"]["latent_shape"])})
        layout = ActionLayout(**{key: tuple(value) for key, value in config["layout"].items()})
        missing = [key for key in ("state_mean", "state_std") if key not in tensors]
        if missing:
            raise ValueError(f"missing statistics: {', '.join(missing)}")
        actions = Statistics.take(tensors, "actions")
        not_finite = [key for key, value in tensors.items() if not bool(torch.isfinite(value.float()).all())]
        if not_finite:
            raise ValueError(f"values that are not finite in {', '.join(not_finite[:3])}")
        policy = ResidualPolicy(settings, ActionAdapter(adapters), ActionDecoder(adapters), adapters.size)
        policy.load_state_dict({key: value for key, value in tensors.items() if not key.startswith("actions.")})
        policy.eval().requires_grad_(False)
        return cls(policy, adapters, actions, layout, Origin(**config["origin"]), int(config["version"]), metadata["card"])

    def _check(self, name: str, expected: Origin | None, layout: ActionLayout | None) -> None:
        for part, called in (("base", "base policy"), ("worldmodel", "world model"), ("adapters", "adapters")):
            mine = getattr(self.origin, part)
            if expected is not None and mine != getattr(expected, part):
                raise store.WeightsError(
                    f"{name}: the residual was trained beside {called} {mine[:12]}, "
                    f"but the one in use is {getattr(expected, part)[:12]}"
                )
        if layout is not None and self.layout != layout:
            raise store.WeightsError(f"{name}: the residual acts in {self.layout}, but the simulator's is {layout}")
