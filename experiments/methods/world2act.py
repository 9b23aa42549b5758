"""Ours: Stage 2 towards the world model's latents, with the settings of the cell."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from experiments.arena import Policy, Run
from experiments.methods.base import Parts
from experiments.methods.residual import post_train
from world2act import stage2
from world2act.data.clips import camera_grid, intended
from world2act.schedule import EpisodeSpec
from world2act.stage2 import Targets
from world2act.types import Episode, M, Trajectory

PHASES = (0, M // 2)
"""A film is cut into chunks as many times, as in Stage 1."""


def train(parts: Parts) -> Policy:
    """Targets as `parts.settings` say: where they are imagined from, how far, and how they are matched in time."""
    return post_train(parts, lambda run: _imagined(parts, run))


def with_film(parts: Parts) -> Policy:
    """As `train`, and the regime's video is trained on too: at its frames the target is E_v of what the film shows next."""
    return post_train(parts, lambda run: _imagined(parts, run), film=_filmed(parts))


def _imagined(parts: Parts, run: Run) -> Targets:
    return stage2.imagined_targets(parts.model, parts.adapters, parts.settings, run.trajectory, parts.seed)


def _filmed(parts: Parts) -> Iterator[tuple[EpisodeSpec, Trajectory, Targets]]:
    for episode in parts.named():
        for phase in PHASES:
            if len(episode.actions) >= phase + M:
                trajectory, targets = _as_lived(parts, episode, phase)
                key = f"film/{episode.task}/{episode.index}/{phase}"
                yield EpisodeSpec(0, episode.task, episode.index, 0.0, key), trajectory, targets


@torch.no_grad()
def _as_lived(parts: Parts, episode: Episode, phase: int) -> tuple[Trajectory, Targets]:
    """What the base would have done at each chunk start, and the latents of what came; disturbed chunks are no target."""
    frames = torch.from_numpy(camera_grid(episode))
    at = torch.arange(phase, len(episode.actions) - M + 1, M)
    states, texts = torch.from_numpy(episode.states[at]), [episode.instruction] * len(at)
    latents = parts.model.encode(frames[at[:, None] + torch.arange(M + 1)])
    wanted = torch.from_numpy(intended(episode)[at[:, None] + np.arange(M)].all(1))
    base = parts.base.act(frames[at], states, texts).numpy()
    trajectory = Trajectory(
        episode.task, episode.split, episode.index, 0, frames[at].numpy(), states.numpy(), base, base, ("",) * len(at), texts[0]
    )
    return trajectory, Targets(parts.adapters.video(latents[None, :, 1])[0], wanted, latents[:, 0])
