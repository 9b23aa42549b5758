"""The small causal video VAE: 4x in time, 8x in space (METHOD: paper section 3, chunk alignment).

Latent k sees frames 4k-4 .. 4k (kernel 5, stride 4, frame 0 repeated in front; latent 0 sees frame 0 alone) and is decoded to
frames 4k-3 .. 4k (latent 0: frame 0). The five frames of a latent are stacked on channels: then every convolution runs
once per latent instead of once per frame, five times cheaper on a CPU. Only the active (not constantly black) upper rows of the
camera grid are coded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from world2act.types import M

SEEN = M + 1
"""Frames that one latent sees."""


@dataclass(frozen=True)
class VAEConfig:
    """Grid size in pixels, rows of it that are coded, latent channels, widths at 1/2, 1/4 and 1/8 resolution."""

    height: int = 128
    width: int = 128
    active_rows: int = 64
    latent_channels: int = 16
    widths: tuple[int, int, int] = (24, 64, 128)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        return self.latent_channels, self.active_rows // 8, self.width // 8


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(nn.functional.gelu(self.first(self.norm(x))))
        return x + y


def check_frames(frames: torch.Tensor, height: int, width: int) -> None:
    """Raise ValueError unless frames are uint8 (B, 1+4n, height, width, 3) with n >= 0."""
    if frames.dtype != torch.uint8:
        raise ValueError(f"frames: dtype must be uint8, got {frames.dtype}")
    if frames.ndim != 5 or tuple(frames.shape[2:]) != (height, width, 3):
        raise ValueError(f"frames: shape must be (batch, time, {height}, {width}, 3), got {tuple(frames.shape)}")
    if frames.shape[1] % M != 1:
        raise ValueError(f"frames: time must be 1 + {M}n frames, got {frames.shape[1]}")


class VideoVAE(nn.Module):
    """Frames <-> latents. Latents that leave `encode` have zero mean and unit spread per channel on the training clips."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        c, (a, b, d) = config.latent_channels, config.widths
        self.encoder = nn.Sequential(
            nn.Conv2d(3 * SEEN, a, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(a, b, 4, 2, 1),
            _Residual(b),
            nn.Conv2d(b, d, 4, 2, 1),
            _Residual(d),
            nn.Conv2d(d, 2 * c, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(c, d, 3, padding=1),
            _Residual(d),
            nn.Conv2d(d, 4 * b, 3, padding=1),
            nn.PixelShuffle(2),
            _Residual(b),
            nn.Conv2d(b, 4 * a, 3, padding=1),
            nn.PixelShuffle(2),
            nn.GELU(),
            nn.Conv2d(a, 4 * 3 * M, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.register_buffer("mean", torch.zeros(c))
        self.register_buffer("std", torch.ones(c))

    def moments(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows float (N, 5, rows, W, 3) in [-1, 1], on any device -> mean and log variance (N, C, h, w), not normalised."""
        stacked = windows.to(self.mean.device).permute(0, 1, 4, 2, 3).flatten(1, 2)
        mean, logvar = self.encoder(stacked.contiguous(memory_format=torch.channels_last)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-12.0, 4.0)

    def reconstruct(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, h, w), not normalised -> frames float (N, 4, rows, W, 3), about [-1, 1]."""
        frames: torch.Tensor = self.decoder(z).float()
        return frames.reshape(len(frames), M, 3, *frames.shape[2:]).permute(0, 1, 3, 4, 2)

    def windows(self, active: torch.Tensor) -> torch.Tensor:
        """Frames (B, 1+4n, rows, W, 3) -> what each latent sees (B, 1+n, 5, rows, W, 3)."""
        padded = torch.cat([active[:, :1].expand(-1, M, -1, -1, -1), active], dim=1)
        return padded.unfold(1, SEEN, M).movedim(-1, 2)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames uint8 (B, 1+4n, H, W, 3) -> normalised latents float32 (B, 1+n, C, h, w); the posterior's mean, no noise."""
        check_frames(frames, self.config.height, self.config.width)
        seen = self.windows(frames[:, :, : self.config.active_rows])
        mean, _ = self.moments(to_float(seen.flatten(0, 1).to(self.mean.device)))
        return self.normalise(mean).reshape(*seen.shape[:2], *self.config.latent_shape)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (B, 1+n, C, h, w) -> frames uint8 (B, 1+4n, H, W, 3), inactive rows black."""
        if latents.ndim != 5 or tuple(latents.shape[2:]) != self.config.latent_shape:
            raise ValueError(f"latents: shape must be (batch, time, *{self.config.latent_shape}), got {tuple(latents.shape)}")
        z = latents.flatten(0, 1) * self.std[:, None, None] + self.mean[:, None, None]
        decoded = to_uint8(self.reconstruct(z))
        active = decoded.reshape(len(latents), -1, *decoded.shape[2:])[:, M - 1 :]
        grid = active.new_zeros((*active.shape[:2], self.config.height, self.config.width, 3))
        grid[:, :, : self.config.active_rows] = active
        return grid

    def normalise(self, z: torch.Tensor) -> torch.Tensor:
        """Raw latents (N, C, h, w) -> zero mean, unit spread."""
        return (z - self.mean[:, None, None]) / self.std[:, None, None]


def to_float(frames: torch.Tensor) -> torch.Tensor:
    """uint8 0 .. 255 -> float32 -1 .. 1."""
    return frames.float() / 127.5 - 1.0


def to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """float -1 .. 1 -> uint8 0 .. 255, rounded and clipped."""
    return ((frames + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
