"""Ours: Stage 2 towards the world model's latents, with the settings of the cell."""

from __future__ import annotations

from experiments.arena import Policy, Run
from experiments.methods.base import Parts
from experiments.methods.residual import post_train
from world2act import stage2
from world2act.stage2 import Targets


def train(parts: Parts) -> Policy:
    """Targets as `parts.settings` say: where they are imagined from, how far, and how they are matched in time."""

    def target(run: Run) -> Targets:
        return stage2.imagined_targets(parts.model, parts.adapters, parts.settings, run.trajectory, parts.seed)

    return post_train(parts, target)
