"""The residual policy of Stage 2 (METHOD section 4): what the frozen base policy should have done differently.

Tokens [action = frozen E_a(base chunk), image, state (, instruction)] -> self-attention, 2 layers, 4 heads, width D in the
paper -> the action token's output -> MLP -> D_a, initialised from Stage 1 and trained further -> residual chunk, normalised.

Start and bound. Stage 1 leaves a D_a that decodes *full* actions: used as it is, an untrained head would add a second base
action. So the MLP outputs a shift of the base chunk's embedding, its last layer starts at zero, and the residual is
D_a(e + shift) - D_a(e): exactly zero at first, and already an action difference in the right units once the shift moves.
A tanh bounds it to `bound` standard deviations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from world2act.models.adapters import Adapters
from world2act.models.text import WordEmbedding

PIXELS = 256
"""Image size for which METHOD's convolutions end in 32 x 14 x 14 = 6272 features."""


@dataclass(frozen=True)
class ResidualSettings:
    """state_size: S; latent_shape: (C, h, w) of one frame's VAE latent, read when vision is "latent"; width: of the tokens."""

    state_size: int = 4
    latent_shape: tuple[int, int, int] = (16, 8, 16)
    vision: Literal["latent", "pixels"] = "latent"
    instruction: bool = True
    bound: float = 1.0
    width: int = 32
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if self.vision not in ("latent", "pixels"):
            raise ValueError(f"vision: must be 'latent' or 'pixels', got {self.vision!r}")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"bound: must be > 0 and finite, got {self.bound}")
        for name, limit in (("state_size", 100_000), ("layers", 64), ("heads", 64), ("width", 4096)):
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name}: must be 1 to {limit}, got {getattr(self, name)}")
        if len(self.latent_shape) != 3 or not all(1 <= n <= 100_000 for n in self.latent_shape):
            raise ValueError(f"latent_shape: must be three numbers of 1 to 100000, got {self.latent_shape}")
        if self.width % self.heads:
            raise ValueError(f"width: must be a multiple of {self.heads} heads, got {self.width}")


class PixelEncoder(nn.Module):
    """METHOD's visual encoder. uint8 (N, H, W, 3), resized to 256x256 -> (N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 8, 4),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, 2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 2),
            nn.Flatten(),
            nn.Linear(6272, width),
            nn.LayerNorm(width),
        )

    def forward(self, frames: Tensor) -> Tensor:
        images = frames.permute(0, 3, 1, 2).float() / 255.0
        token: Tensor = self.net(F.interpolate(images, (PIXELS, PIXELS), mode="bilinear", align_corners=False))
        return token


class LatentEncoder(nn.Module):
    """A small convolution on the frame's VAE latent: faster and better than pixels at small size. (N, C, h, w) -> (N, width)."""

    def __init__(self, shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, rows, columns = shape
        cells = ((rows + 1) // 2) * ((columns + 1) // 2)
        self.net = nn.Sequential(
            nn.Conv2d(channels, 64, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * cells, width),
            nn.LayerNorm(width),
        )

    def forward(self, latents: Tensor) -> Tensor:
        token: Tensor = self.net(latents)
        return token


class ResidualPolicy(nn.Module):
    """Trainable on top of a frozen base. Build with `from_adapters`; state statistics are buffers (`set_state_statistics`)."""

    state_mean: Tensor
    state_std: Tensor

    def __init__(self, settings: ResidualSettings, action_adapter: nn.Module, decoder: nn.Module, size: int) -> None:
        super().__init__()
        self.settings = settings
        self.action_adapter = copy.deepcopy(action_adapter).requires_grad_(False)
        self.decoder = copy.deepcopy(decoder).requires_grad_(True)
        width = settings.width
        self.embed = nn.Identity() if width == size else nn.Linear(size, width)
        self.state = nn.Sequential(nn.Linear(settings.state_size, 128), nn.ReLU(), nn.Linear(128, width), nn.LayerNorm(width))
        self.vision = LatentEncoder(settings.latent_shape, width) if settings.vision == "latent" else PixelEncoder(width)
        self.words = WordEmbedding(width) if settings.instruction else None
        layer = nn.TransformerEncoderLayer(width, settings.heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.attention = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        last = nn.Linear(128, size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 128), nn.GELU(), last)
        self.register_buffer("state_mean", torch.zeros(settings.state_size))
        self.register_buffer("state_std", torch.ones(settings.state_size))

    @classmethod
    def from_adapters(cls, settings: ResidualSettings, adapters: Adapters) -> ResidualPolicy:
        """A fresh residual policy: zero residual, E_a and D_a from Stage 1."""
        return cls(settings, adapters.action, adapters.decoder, adapters.settings.size)

    def set_state_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and spread (S,) of proprioception, kept with the weights."""
        self.state_mean.copy_(mean)
        self.state_std.copy_(std)

    def forward(self, visual: Tensor, states: Tensor, base: Tensor, instructions: Sequence[str]) -> Tensor:
        """Residual chunk (N, M, A), normalised, each component within +-bound.

        visual: latents (N, C, h, w) or frames uint8 (N, H, W, 3), as settings.vision says; states: (N, S), raw units;
        base: (N, M, A) normalised; instructions: one per row, read only when settings.instruction.
        """
        embedding: Tensor = self.action_adapter(base)
        tokens = [self.embed(embedding), self.vision(visual), self.state((states - self.state_mean) / self.state_std)]
        if self.words is not None:
            different = list(dict.fromkeys(instructions))  # few: a batch repeats them
            vectors, mask = self.words(different)
            rows = [different.index(text) for text in instructions]
            tokens.append(((vectors * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))[rows])
        seen: Tensor = self.attention(torch.stack(tokens, dim=1))[:, 0]
        shift = self.head(seen)
        raw: Tensor = self.decoder(embedding + shift) - self.decoder(embedding)
        return self.settings.bound * torch.tanh(raw / self.settings.bound)
