"""The base cloned anew by an imitator that sees no more than the world model is given: a frame's latent and the active skill.
Beside `named-cloning` it says what the latents lose, beside `imagination` what is lost after them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.arena import Policy
from experiments.methods.base import Parts
from experiments.naming import STRIDE
from world2act.data.clips import camera_grid, intended, skills_of
from world2act.models.text import WordEmbedding
from world2act.types import Episode, M

STEPS, BATCH, RATE = 3000, 128, 2e-3
LATENT_NOISE = 0.15


class Imitator(nn.Module):
    """Latents (N, C, h, w) and prompts -> normalised chunks (N, M, A)."""

    def __init__(self, shape: tuple[int, int, int], actions: int, width: int = 256, words: int = 64) -> None:
        super().__init__()
        channels, height, across = shape
        self.text = WordEmbedding(words)
        self.look = nn.Sequential(
            nn.Conv2d(channels, 64, 3, 1, 1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, 2, 1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, 1, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * ((height + 1) // 2) * ((across + 1) // 2), width),
            nn.LayerNorm(width),
        )
        self.head = nn.Sequential(
            nn.Linear(width + words, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, M * actions)
        )

    def forward(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        vectors, mask = self.text(prompts)
        said = (vectors * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        chunk: Tensor = self.head(torch.cat([self.look(latents), said], dim=1))
        return chunk.view(len(chunk), M, -1)


@dataclass
class _Imitating:
    parts: Parts
    imitator: Imitator
    version: int = 0

    @torch.no_grad()
    def act(self, frames: Tensor, states: Tensor, instructions: Sequence[str], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        chunks = self.imitator(self.parts.model.encode(frames[:, None])[:, 0], prompts)
        base = self.parts.base.act(frames, states, instructions)
        return base, self.parts.adapters.actions.denormalise(chunks).clamp(-1.0, 1.0)


def train(parts: Parts) -> Policy:
    """Labelled demonstrations and named video, as `named-cloning`; as there, a disturbed chunk is nothing to imitate."""
    shown = [_shown(parts, episode) for episode in itertools.chain(parts.labels(), parts.named())]
    latents, chunks = torch.cat([one[0] for one in shown]), torch.cat([one[1] for one in shown])
    prompts = [prompt for one in shown for prompt in one[2]]
    torch.manual_seed(parts.seed)
    imitator = Imitator((latents.shape[1], latents.shape[2], latents.shape[3]), chunks.shape[2])
    optimiser = torch.optim.AdamW(imitator.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS)
    for _ in range(STEPS):
        at = torch.randint(len(latents), (BATCH,))
        seen = latents[at].float()
        read = imitator(seen + LATENT_NOISE * torch.randn(seen.shape), [prompts[i] for i in at.tolist()])
        optimiser.zero_grad()
        nn.functional.smooth_l1_loss(read, chunks[at]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return _Imitating(parts, imitator.eval().requires_grad_(False))


@torch.no_grad()
def _shown(parts: Parts, episode: Episode) -> tuple[Tensor, Tensor, list[str]]:
    """Latents float16, normalised chunks, prompts: every `STRIDE`-th frame from which an intended chunk of a skill follows."""
    wanted, frames = intended(episode), torch.from_numpy(camera_grid(episode))
    found = [
        (t, skill.prompt)
        for skill in skills_of(episode)[0]
        for t in range(skill.start, skill.end - M + 1, STRIDE)
        if wanted[t : t + M].all()
    ]
    at = torch.tensor([t for t, _ in found], dtype=torch.int64)
    chunks = torch.from_numpy(episode.actions)[at[:, None] + torch.arange(M)]
    latents = parts.model.encode(frames[at][:, None])[:, 0].half()
    return latents, parts.adapters.actions.normalise(chunks), [prompt for _, prompt in found]
