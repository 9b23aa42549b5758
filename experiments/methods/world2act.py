"""Ours: Stage 2 towards the world model's latents, with the settings of the cell."""

from __future__ import annotations

import copy
from collections.abc import Callable

from experiments.arena import Policy, Run
from experiments.methods.base import Parts
from experiments.methods.named_residual import film
from experiments.methods.residual import post_train
from world2act import stage2
from world2act.optimisation import device_of
from world2act.stage2 import Targets


def train(parts: Parts) -> Policy:
    """Targets as `parts.settings` say: where they are imagined from, how far, and how they are matched in time."""
    return post_train(parts, imagined(parts))


def with_film(parts: Parts) -> Policy:
    """The same rounds and updates, from the first round on with what `named-residual` learns from too: film where an expert went,
    imagination where the policy went. Episodes are drawn by their number."""
    return post_train(parts, imagined(parts), film=film(parts))


def imagined(parts: Parts) -> Callable[[Run], Targets]:
    """The targets of `parts.settings`, imagined on a GPU where there is one."""
    device = device_of("auto")
    model, adapters = copy.deepcopy(parts.model).to(device), copy.deepcopy(parts.adapters).to(device)
    return lambda run: stage2.imagined_targets(model, adapters, parts.settings, run.trajectory, parts.seed)
