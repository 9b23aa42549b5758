"""The embedded backbone: world2act.models.worldmodel from zoo/worldmodel.safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from services.worldmodel.backbones import BackboneInfo, Frames, Latents
from services.worldmodel.settings import WorldModelSettings
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
        steps, guidance = steps or self.info.steps, guidance or self.info.guidance
        latents: Latents = self.model.imagine(frames, list(prompts), horizon, list(seeds), steps, guidance).cpu().numpy()
        return latents

    def denoise_once(self, frames: Frames, prompts: Sequence[str], seeds: Sequence[int]) -> Latents:
        latents: Latents = self.model.denoise_once(torch.tensor(frames, device=self.device), prompts, seeds).cpu().numpy()
        return latents

    def encode(self, frames: Frames) -> Latents:
        with torch.no_grad():
            latents: Latents = self.model.encode(torch.tensor(frames, device=self.device)).cpu().numpy()
        return latents

    def decode(self, latents: Latents) -> Frames:
        frames: Frames = self.model.decode(torch.tensor(latents, device=self.device)).cpu().numpy()
        return frames

    def last_frame(self, latents: Latents) -> Frames:
        return self.decode(latents[:, -1:])[:, -1]  # latents are decoded one by one: the last one suffices


def weights_file(settings: WorldModelSettings) -> Path:
    """W2A_BACKBONE_MODEL, or the one in W2A_ZOO."""
    return Path(settings.backbone_model) if settings.backbone_model else settings.zoo / WEIGHTS


def load(settings: WorldModelSettings, device: str) -> SmallBackbone:
    """Raises store.WeightsError when the file is damaged or of another kind."""
    from world2act.models.worldmodel import WorldModel  # here: importing diffusers costs `weights_hash` nothing

    return SmallBackbone(WorldModel.load(weights_file(settings)), device)


def weights_hash(settings: WorldModelSettings, device: str) -> str:
    """sha256 of the weights file, as WorldModel.hash."""
    return store.read(weights_file(settings), "worldmodel")[2]
