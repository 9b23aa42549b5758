"""(d) inverse-dynamics pseudo-actions for the residual: as ours, but targets are actions read from the imagined video by a
model that was trained for nothing else, without the shared latent space: no contrastive term, no bottleneck, no D_a.
"""

from __future__ import annotations

import torch

from experiments import naming
from experiments.arena import Policy, Run
from experiments.methods.base import Parts
from experiments.methods.residual import post_train
from experiments.naming import InverseDynamics
from world2act.presets import STAGE1
from world2act.stage2 import Targets

STEPS = 3000
"""Explains 0.854 of held-out experts' actions from imagined latents, 1,200 steps 0.843; D_a(E_v) 0.856 (decision 041)."""


def fit(parts: Parts) -> InverseDynamics:
    """On what Stage 1 has seen, named video too, true and predicted latents in equal parts; and on play if there is any."""
    true, predicted = parts.seen()
    own = parts.play()
    pools = [(true, 0.5), (predicted, 0.5)] if own is None else [(own, 0.25), (true, 0.25), (predicted, 0.5)]
    return naming.fit(pools, STAGE1["default"].latent_noise, parts.seed, parts.adapters.actions, STEPS)


def train(parts: Parts) -> Policy:
    """The same rounds, scenes and learner as ours."""
    network = fit(parts)

    @torch.no_grad()
    def target(run: Run) -> Targets:
        trajectory = run.trajectory
        n = len(trajectory.frames)
        latents = parts.model.imagine(torch.from_numpy(trajectory.frames), trajectory.prompts, 1, [parts.seed] * n)
        chunks = network(latents[:, 1])
        # The embeddings only feed the reported cosine: the loss aims at the chunks.
        return Targets(parts.adapters.action(chunks[None])[0], torch.ones(n, dtype=torch.bool), latents[:, 0], chunks)

    return post_train(parts, target)
