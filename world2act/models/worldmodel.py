"""The embedded world model G: start frame and skill prompt -> video latents of the skill (METHOD sections 2 and 3).

A small causal video VAE and diffusers' CosmosTransformer3DModel (the architecture of Cosmos-Predict2). One formula serves
regression and flow matching. Source x1 = start latent repeated over time + noise_scale * noise; x_t = (1-t) x0 + t x1; the
network predicts v = x1 - x0 and `imagine` integrates from t = 1 in Euler steps. With noise_scale 0 and one step this is
deterministic regression with a skip from the start latent; with noise_scale > 0 it is flow matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import CosmosTransformer3DModel
from torch import nn

from world2act.models import store
from world2act.models.text import WordEmbedding
from world2act.models.vae import VAEConfig, VideoVAE, check_frames


@dataclass(frozen=True)
class WorldModelConfig:
    """Sizes of the transformer; `noise_scale` 0 = regression, > 0 = flow matching; `max_horizon` latents ahead at most."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    heads: int = 4
    head_width: int = 32
    layers: int = 4
    mlp_ratio: float = 3.0
    text_width: int = 64
    adaln_width: int = 32
    max_horizon: int = 20
    noise_scale: float = 0.0


class WorldModel(store.Stored):
    """Frozen G. Weights, configuration and card live in one safetensors file; `hash` is its sha256."""

    kind = "worldmodel"
    config: WorldModelConfig
    transformer: Any  # diffusers is untyped

    @staticmethod
    def config_from_json(values: dict[str, Any]) -> WorldModelConfig:
        vae = {**values["vae"], "widths": tuple(values["vae"]["widths"])}
        return WorldModelConfig(**{**values, "vae": VAEConfig(**vae)})

    def __init__(self, config: WorldModelConfig | None = None) -> None:
        config = config or WorldModelConfig()
        super().__init__(config)
        c, h, w = config.vae.latent_shape
        self.vae = VideoVAE(config.vae)
        self.text = WordEmbedding(config.text_width)
        self.transformer = CosmosTransformer3DModel(  # type: ignore[no-untyped-call]
            in_channels=2 * c + 1,  # noised video, start latent, which latents are given
            out_channels=c,
            num_attention_heads=config.heads,
            attention_head_dim=config.head_width,
            num_layers=config.layers,
            mlp_ratio=config.mlp_ratio,
            text_embed_dim=config.text_width,
            adaln_lora_dim=config.adaln_width,
            max_size=(1 + config.max_horizon, h, w),
            patch_size=(1, 2, 2),
            rope_scale=(1.0, 1.0, 1.0),
            concat_padding_mask=False,
            extra_pos_embed_type="learnable",
        )
        # diffusers starts these at zero and divides by their norm: the first gradient would be of order 1e6.
        for name in ("pos_emb_t", "pos_emb_h", "pos_emb_w"):
            nn.init.normal_(getattr(self.transformer.learnable_pos_embed, name), std=0.02)
        nn.init.zeros_(self.transformer.proj_out.weight)  # untrained, the prediction is the start latent

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames uint8 (B, 1+4n, H, W, 3) -> latents (B, 1+n, C, h, w)."""
        return self.vae.encode(frames)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, 1+n, C, h, w) -> frames uint8 (B, 1+4n, H, W, 3), the full camera grid."""
        return self.vae.decode(latents)

    def velocity(self, x: torch.Tensor, start: torch.Tensor, prompts: Sequence[str], t: torch.Tensor) -> torch.Tensor:
        """v at time t (B,) for video x (B, 1+horizon, C, h, w) from start latent (B, C, h, w), which replaces latent 0 of x."""
        given = torch.zeros_like(x[:, :, :1])
        given[:, 0] = 1.0
        x = torch.cat([start[:, None], x[:, 1:]], dim=1)
        inputs = torch.cat([x, start[:, None].expand_as(x), given], dim=2).transpose(1, 2)
        vectors, mask = self.text(prompts)
        v: torch.Tensor = self.transformer(inputs, 1000.0 * t, vectors, attention_mask=mask, return_dict=False)[0]
        return v.transpose(1, 2)

    @torch.no_grad()
    def imagine_latents(
        self,
        start: torch.Tensor,
        prompts: Sequence[str],
        horizon: int,
        seeds: Sequence[int],
        steps: int = 1,
        guidance: float = 1.0,
    ) -> torch.Tensor:
        """As `imagine`, from start latents (B, C, h, w)."""
        self._check_request(len(start), prompts, horizon, seeds, steps)
        x = start[:, None].repeat(1, 1 + horizon, 1, 1, 1)
        if self.config.noise_scale > 0.0:
            x[:, 1:] += self.config.noise_scale * _noise(seeds, x[:, 1:])
        for step in range(steps):
            t = torch.full((len(x),), 1.0 - step / steps, device=x.device)
            v = self.velocity(x, start, prompts, t)
            if guidance != 1.0:
                free = self.velocity(x, start, [""] * len(x), t)
                v = free + guidance * (v - free)
            x = torch.cat([x[:, :1], x[:, 1:] - v[:, 1:] / steps], dim=1)
        return x

    @torch.no_grad()
    def imagine(
        self,
        start: torch.Tensor,
        prompts: Sequence[str],
        horizon: int,
        seeds: Sequence[int],
        steps: int = 1,
        guidance: float = 1.0,
    ) -> torch.Tensor:
        """Start frames uint8 (B, H, W, 3), a prompt and a seed per row -> latents (B, 1+horizon, C, h, w); latent 0 is the start.

        `guidance` 1 is the conditional prediction alone. Each row depends on its own start, prompt and seed only.
        Raises ValueError naming the field that is out of range.
        """
        check_frames(start[:, None], self.config.vae.height, self.config.vae.width)
        return self.imagine_latents(self.encode(start[:, None])[:, 0], prompts, horizon, seeds, steps, guidance)

    @torch.no_grad()
    def denoise_once(self, frames: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """True clips uint8 (B, 1+4n, H, W, 3) -> latents (B, 1+n, C, h, w): moved a random part of the way to the source and
        predicted back in one step (METHOD section 3, the authors' code). Latent 0 is the start."""
        x0 = self.encode(frames)
        self._check_request(len(x0), prompts, x0.shape[1] - 1, seeds, 1)
        drawn = [torch.sigmoid(torch.randn(1, generator=torch.Generator().manual_seed(int(seed)))) for seed in seeds]
        t = torch.cat(drawn).to(x0)
        x1 = x0[:, :1] + self.config.noise_scale * _noise(seeds, x0)
        at = t[:, None, None, None, None]
        x = (1 - at) * x0 + at * x1
        v = self.velocity(x, x0[:, 0], prompts, t)
        return torch.cat([x0[:, :1], (x - at * v)[:, 1:]], dim=1)

    def _check_request(self, rows: int, prompts: Sequence[str], horizon: int, seeds: Sequence[int], steps: int) -> None:
        if len(prompts) != rows or len(seeds) != rows:
            raise ValueError(f"prompts, seeds: need one per start frame ({rows}), got {len(prompts)} and {len(seeds)}")
        if not 1 <= horizon <= self.config.max_horizon:
            raise ValueError(f"horizon: {horizon} is outside [1, {self.config.max_horizon}]")
        if not 1 <= steps <= 1000:
            raise ValueError(f"steps: {steps} is outside [1, 1000]")


def _noise(seeds: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise shaped like (B, ...), row by row from its own seed, the same on every device."""
    rows = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(like)
