"""Methods by name: one file each on shared parts (`base.py`, `residual.py`)."""

from __future__ import annotations

from experiments.methods import (
    cloning,
    ctrl_world,
    dreamgen,
    inverse_dynamics,
    latent_cloning,
    lora,
    named_residual,
    oracles,
    vla_rft,
    world2act,
)
from experiments.methods.base import Method

METHODS: dict[str, Method] = {
    "base": cloning.base,
    "more-cloning": cloning.more,
    "named-cloning": cloning.named,
    "named-cloning-blind": cloning.named_blind,
    "latent-cloning": latent_cloning.train,
    "named-residual": named_residual.train,
    "world2act": world2act.train,
    "world2act-film": world2act.with_film,
    "dreamgen": dreamgen.train,
    "inverse-dynamics": inverse_dynamics.train,
    "vla-rft": vla_rft.train,
    "ctrl-world": ctrl_world.train,
    "lora-16": lora.rank_16,
    "lora-32": lora.rank_32,
    "imagination": oracles.imagination,
    "oracle-action": oracles.action,
    "oracle-video": oracles.video,
}
"""Baselines are named after what they imitate in small: DreamGen's recipe, not its authors' code."""
