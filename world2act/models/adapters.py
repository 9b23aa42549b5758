"""Stage 1's three small networks (METHOD section 3): video adapter E_v, action adapter E_a, action decoder D_a.

Latents (B, K, C, h, w) and action chunks (B, K, M, A) meet in one space of D numbers per chunk. Actions are normalised
(`Statistics`); the statistics and the hash of the world model whose latents E_v reads travel in the same file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from world2act import types
from world2act.models import store
from world2act.normalisation import Statistics

KIND = "adapters"


@dataclass(frozen=True)
class AdapterSettings:
    """Shapes and the two places where `default` leaves the paper.

    pool: "average" is the paper's AdaptiveAvgPool(1, 1); "flatten" keeps a coarse grid, so that *where* something moves
    survives; pool_grid (2, 4) is 2x2 for each of two cameras side by side. unit: embeddings have length sqrt(D), so that D_a
    sees E_v's and E_a's at one scale.
    """

    channels: int = 16
    action_size: int = 4
    chunk: int = types.M
    size: int = types.D
    pool: Literal["average", "flatten"] = "flatten"
    pool_grid: tuple[int, int] = (2, 4)
    unit: bool = True

    def __post_init__(self) -> None:
        for name in ("channels", "action_size", "chunk", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be >= 1, got {getattr(self, name)}")
        if self.pool not in ("average", "flatten"):
            raise ValueError(f"pool: must be 'average' or 'flatten', got {self.pool!r}")
        if len(self.pool_grid) != 2 or min(self.pool_grid) < 1:
            raise ValueError(f"pool_grid: must be two numbers >= 1, got {self.pool_grid}")


def to_sphere(embedding: Tensor) -> Tensor:
    """(..., D) -> the same direction at length sqrt(D): each component has unit mean square."""
    direction: Tensor = F.normalize(embedding, dim=-1)
    return direction * math.sqrt(embedding.shape[-1])


class VideoAdapter(nn.Module):
    """E_v: each latent frame alone -> embedding. (B, K, C, h, w) -> (B, K, D)."""

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__()
        grid = (1, 1) if settings.pool == "average" else settings.pool_grid
        self.unit = settings.unit
        self.net = nn.Sequential(
            nn.Conv2d(settings.channels, 64, 3, 2, 1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, 128, 3, 2, 1),
            nn.GroupNorm(16, 128),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(grid),
            nn.Flatten(),
            nn.Linear(128 * grid[0] * grid[1], settings.size),
        )

    def forward(self, latents: Tensor) -> Tensor:
        embedding: Tensor = self.net(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        return to_sphere(embedding) if self.unit else embedding


class ActionAdapter(nn.Module):
    """E_a: a normalised action chunk -> embedding. (B, K, M, A) -> (B, K, D)."""

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__()
        self.unit = settings.unit
        inputs = settings.chunk * settings.action_size
        self.net = nn.Sequential(nn.Linear(inputs, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, settings.size))

    def forward(self, actions: Tensor) -> Tensor:
        embedding: Tensor = self.net(actions.flatten(-2))
        return to_sphere(embedding) if self.unit else embedding


class ActionDecoder(nn.Module):
    """D_a: an embedding -> a normalised action chunk. (B, K, D) -> (B, K, M, A)."""

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__()
        self.shape = (settings.chunk, settings.action_size)
        outputs = settings.chunk * settings.action_size
        self.net = nn.Sequential(nn.Linear(settings.size, 64), nn.GELU(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, outputs))

    def forward(self, embedding: Tensor) -> Tensor:
        chunk: Tensor = self.net(embedding)
        return chunk.view(*chunk.shape[:-1], *self.shape)


class Adapters(nn.Module):
    """E_v, E_a, D_a with what they are worthless without: action statistics and the world model's hash.

    card: what, data, command, seed, metrics; saved in the file. hash: sha256 of the file that `save` writes.
    """

    def __init__(
        self, settings: AdapterSettings, actions: Statistics, worldmodel_hash: str, card: Mapping[str, Any] | None = None
    ):
        super().__init__()
        if len(actions.mean) != settings.action_size:
            raise ValueError(f"action statistics: must have {settings.action_size} components, got {len(actions.mean)}")
        self.settings = settings
        self.actions = actions
        self.worldmodel_hash = worldmodel_hash
        self.card = dict(card or {})
        self.video = VideoAdapter(settings)
        self.action = ActionAdapter(settings)
        self.decoder = ActionDecoder(settings)

    def check_worldmodel(self, found: str) -> None:
        """Raise store.WeightsError unless `found` is the hash of the world model these adapters were trained on."""
        if found != self.worldmodel_hash:
            raise store.WeightsError(
                f"adapters: trained on world model {self.worldmodel_hash[:12]}, but the one in use is {found[:12]}; "
                "their latents differ: train Stage 1 again (python -m world2act.stage1) or load the matching weights"
            )

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        metadata = {
            "kind": KIND,
            "config": {"settings": asdict(self.settings), "worldmodel_hash": self.worldmodel_hash},
            "card": self.card,
        }
        return {**self.state_dict(), **self.actions.tensors("actions")}, metadata

    @property
    def hash(self) -> str:
        """sha256 of what `save` writes."""
        return store.content_hash(store.to_bytes(*self._contents()))

    def save(self, path: Path | str, card: Mapping[str, Any] | None = None) -> str:
        """Write weights, settings, statistics, world-model hash and `card`; returns the file's hash."""
        if card is not None:
            self.card = dict(card)
        return store.write(path, *self._contents())

    @classmethod
    def load(cls, path: Path | str) -> Adapters:
        """Raises WeightsError for a damaged file, missing statistics, or tensors that do not fit the settings."""
        tensors, metadata, _ = store.read(path, KIND)
        try:
            values = metadata["config"]["settings"]
            settings = AdapterSettings(**{**values, "pool_grid": tuple(values["pool_grid"])})
            statistics = Statistics.take(tensors, "actions")
            adapters = cls(settings, statistics, metadata["config"]["worldmodel_hash"], metadata["card"])
            adapters.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("actions.")})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise store.WeightsError(f"{path}: does not hold adapters that fit their settings ({error})") from None
        return adapters.eval().requires_grad_(False)
