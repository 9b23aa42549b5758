"""Methods by name: one file each on shared parts (`base.py`, `residual.py`)."""

from __future__ import annotations

from experiments.methods import cloning, dreamgen, inverse_dynamics, oracles, world2act
from experiments.methods.base import Method

METHODS: dict[str, Method] = {
    "base": cloning.base,
    "more-cloning": cloning.more,
    "world2act": world2act.train,
    "dreamgen": dreamgen.train,
    "inverse-dynamics": inverse_dynamics.train,
    "oracle-action": oracles.action,
    "oracle-video": oracles.video,
}
"""Baselines are named after what they imitate in small: DreamGen's recipe, not its authors' code."""
