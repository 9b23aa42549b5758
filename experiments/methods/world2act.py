"""Ours: Stage 2 towards the world model's latents, with the preset of the cell."""

from __future__ import annotations

from experiments.arena import Policy, Run
from experiments.methods.base import Parts
from experiments.methods.residual import post_train
from world2act import stage2
from world2act.stage2 import Targets


def train(parts: Parts) -> Policy:
    """Targets as `parts.settings.target` says: imagined again from each visited frame, or one clip from the first frame."""
    imagine = stage2.closed_loop_targets if parts.settings.target == "closed-loop" else stage2.open_loop_targets

    def target(run: Run) -> Targets:
        return imagine(parts.model, parts.adapters, run.trajectory, parts.seed)

    return post_train(parts, target)
