"""The embedded backbone: world2act.models.worldmodel from zoo/worldmodel.safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from services.worldmodel.backbones import BackboneInfo, Frames, Latents
from world2act.models import store
from world2act.types import M

if TYPE_CHECKING:
    from world2act.models.worldmodel import WorldModel

WEIGHTS = "worldmodel.safetensors"
FPS = 10.0
"""Frames per second of the embedded simulator's demonstrations: one frame an action."""


class SmallBackbone:
    """The contract `Backbone` around a loaded WorldModel."""

    def __init__(self, model: WorldModel, device: str = "cpu") -> None:
        self.model = model.to(device)
        self.device = device
        vae = model.config.vae
        self.info = BackboneInfo(
            name="small",
            hash=model.hash,
            frame_shape=(vae.height, vae.width, 3),
            active_rows=vae.active_rows,
            latent_shape=vae.latent_shape,
            temporal_compression=M,
            max_horizon=model.config.max_horizon,
            fps=FPS,
        )

    def imagine(
        self, start: Frames, prompts: Sequence[str], seeds: Sequence[int], horizon: int, steps: int, guidance: float
    ) -> Latents:
        frames = torch.tensor(start, device=self.device)
        latents: Latents = self.model.imagine(frames, list(prompts), horizon, list(seeds), steps, guidance).cpu().numpy()
        return latents

    def decode(self, latents: Latents) -> Frames:
        frames: Frames = self.model.decode(torch.tensor(latents, device=self.device)).cpu().numpy()
        return frames

    def last_frame(self, latents: Latents) -> Frames:
        return self.decode(latents[:, -1:])[:, -1]  # latents are decoded one by one: the last one suffices


def load(zoo: Path, device: str) -> SmallBackbone:
    """From `zoo/worldmodel.safetensors`. Raises store.WeightsError when the file is damaged or of another kind."""
    from world2act.models.worldmodel import WorldModel  # here: importing diffusers costs `weights_hash` nothing

    return SmallBackbone(WorldModel.load(zoo / WEIGHTS), device)


def weights_hash(zoo: Path) -> str:
    """sha256 of the weights file, as WorldModel.hash."""
    return store.read(zoo / WEIGHTS, "worldmodel")[2]
