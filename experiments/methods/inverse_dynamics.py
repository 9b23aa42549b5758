"""(d) inverse-dynamics pseudo-actions for the residual: as ours, but targets are actions read from the imagined video by a
model that was trained for nothing else, without the shared latent space: no contrastive term, no bottleneck, no D_a.
"""

from __future__ import annotations

import torch

from experiments.arena import Policy, Run
from experiments.methods.base import Parts
from experiments.methods.residual import post_train
from world2act.stage2 import Targets


def train(parts: Parts) -> Policy:
    """The same rounds, scenes and learner as ours."""
    network = parts.inverse()

    @torch.no_grad()
    def target(run: Run) -> Targets:
        trajectory = run.trajectory
        n = len(trajectory.frames)
        latents = parts.model.imagine(torch.from_numpy(trajectory.frames), trajectory.prompts, 1, [parts.seed] * n)
        chunks = network(latents[:, 1])
        # The embeddings only feed the reported cosine: the loss aims at the chunks.
        return Targets(parts.adapters.action(chunks[None])[0], torch.ones(n, dtype=torch.bool), latents[:, 0], chunks)

    return post_train(parts, target)
