"""The embedded base policy `tiny`: two small camera views, proprioception and hashed words -> one action chunk.

Trained by behaviour cloning on few demonstrations (world2act/behaviour_cloning.py), then frozen: the VLA of METHOD section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from world2act.models import store
from world2act.models.text import WordEmbedding
from world2act.models.vae import check_frames, to_float
from world2act.types import M


@dataclass(frozen=True)
class TinyPolicyConfig:
    """Grid size in pixels and its rows that are read, action and proprioception sizes, network widths."""

    height: int = 128
    width: int = 128
    active_rows: int = 64
    actions: int = 4
    states: int = 4
    channels: tuple[int, int, int] = (24, 32, 48)
    hidden: int = 192
    text_width: int = 32


class TinyPolicy(store.Stored):
    """Deterministic, memoryless policy. `statistics` buffers hold the mean and spread of states and actions it was trained on."""

    kind = "base"
    config: TinyPolicyConfig
    state_mean: torch.Tensor
    state_std: torch.Tensor
    action_mean: torch.Tensor
    action_std: torch.Tensor

    @staticmethod
    def config_from_json(values: dict[str, Any]) -> TinyPolicyConfig:
        return TinyPolicyConfig(**{**values, "channels": tuple(values["channels"])})

    def __init__(self, config: TinyPolicyConfig | None = None) -> None:
        config = config or TinyPolicyConfig()
        super().__init__(config)
        a, b, c = config.channels
        self.vision = nn.Sequential(
            nn.Conv2d(3, a, 5, 2, 2), nn.ReLU(), nn.Conv2d(a, b, 3, 2, 1), nn.ReLU(), nn.Conv2d(b, c, 3, 2, 1), nn.ReLU()
        )
        cells = (config.active_rows // 8) * (config.width // 8)
        self.look = nn.Sequential(nn.Flatten(), nn.Linear(c * cells, config.hidden), nn.LayerNorm(config.hidden))
        self.text = WordEmbedding(config.text_width)
        self.head = nn.Sequential(
            nn.Linear(config.hidden + config.states + config.text_width, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, M * config.actions),
        )
        for name, size in (("state", config.states), ("action", config.actions)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def forward(self, active: torch.Tensor, states: torch.Tensor, instructions: Sequence[str]) -> torch.Tensor:
        """Active rows float (B, 3, rows, W) in [-1, 1], states (B, S), instructions -> normalised chunk (B, M, A)."""
        seen = self.look(self.vision(active))
        vectors, mask = self.text(instructions)
        words = (vectors * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        normal = (states - self.state_mean) / self.state_std
        chunk: torch.Tensor = self.head(torch.cat([seen, normal, words], dim=1))
        return chunk.reshape(len(chunk), M, self.config.actions)

    @torch.no_grad()
    def act(self, images: torch.Tensor, states: torch.Tensor, instructions: Sequence[str]) -> torch.Tensor:
        """Camera grid uint8 (B, H, W, 3), states (B, S), one instruction a row -> chunk (B, M, A) in env units, in [-1, 1].

        Raises ValueError naming the field whose shape or dtype is wrong.
        """
        check_frames(images[:, None], self.config.height, self.config.width)
        if tuple(states.shape) != (len(images), self.config.states):
            raise ValueError(f"states: shape must be ({len(images)}, {self.config.states}), got {tuple(states.shape)}")
        if len(instructions) != len(images):
            raise ValueError(f"instructions: need one per image ({len(images)}), got {len(instructions)}")
        active = to_float(images[:, : self.config.active_rows].to(self.state_mean.device)).permute(0, 3, 1, 2)
        chunk = self.forward(active, states.to(self.state_mean), instructions)
        clipped: torch.Tensor = (chunk * self.action_std + self.action_mean).clamp(-1.0, 1.0)
        return clipped
