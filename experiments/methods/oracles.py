"""Upper bounds, to find out which part loses the gain. None of them is a method.

imagination: the targets act themselves, no residual: what a learner would reach that copied them everywhere. It needs the world
    model at every chunk.
The others ask what only a simulator knows.
oracle-action: Stage 2's learner with the expert's true chunk at every visited state: what remains is the learner's.
oracle-video: E_v reads the true video of the expert from every visited state: what is lost further is E_v's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.arena import Policy, Run
from experiments.methods.base import Parts
from experiments.methods.residual import post_train
from world2act.stage2 import Targets


@dataclass
class Imagining:
    """D_a(E_v(the imagined next latent)) from every frame, under the active skill."""

    parts: Parts
    version: int = 0

    @torch.no_grad()
    def act(self, frames: Tensor, states: Tensor, instructions: Sequence[str], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        parts = self.parts
        latents = parts.model.imagine(frames, prompts, 1, [parts.seed] * len(frames))
        chunks = parts.adapters.decoder(parts.adapters.video(latents[:, 1:]))[:, 0]
        return parts.base.act(frames, states, instructions), parts.adapters.actions.denormalise(chunks).clamp(-1.0, 1.0)


def imagination(parts: Parts) -> Policy:
    """Nothing is trained."""
    return Imagining(parts)


def action(parts: Parts) -> Policy:
    """The expert's chunks as targets of the decode term."""

    @torch.no_grad()
    def target(run: Run) -> Targets:
        assert run.expert is not None
        chunks = parts.adapters.actions.normalise(torch.from_numpy(run.expert))
        embeddings = parts.adapters.action(chunks[None])[0]
        return Targets(embeddings, torch.ones(len(chunks), dtype=torch.bool), chunks=chunks)

    return post_train(parts, target, expert="action")


def video(parts: Parts) -> Policy:
    """E_v of the expert's true video."""

    @torch.no_grad()
    def target(run: Run) -> Targets:
        assert run.expert_frames is not None
        frames = np.concatenate([run.trajectory.frames[:, None], run.expert_frames], axis=1)
        latents = parts.model.encode(torch.from_numpy(frames))
        embeddings = parts.adapters.video(latents[:, 1:])[:, 0]
        return Targets(embeddings, torch.ones(len(frames), dtype=torch.bool), latents[:, 0])

    return post_train(parts, target, expert="video")
