"""(a) the base as it is; (b) the base retrained on every labelled demonstration that any other part has seen, and on the video
that they have seen too, its actions named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from experiments.arena import Policy
from experiments.methods.base import Frozen, Parts
from experiments.regimes import clone


def base(parts: Parts) -> Policy:
    """Nothing is trained."""
    return Frozen(parts.base)


def more(parts: Parts) -> Policy:
    """Behaviour cloning from scratch: the control that post-training has to beat."""
    return Frozen(clone(parts.labels(), parts.seed))


def named(parts: Parts) -> Policy:
    """As `more`, with the regime's video too: no world model, no post-training, what its expert shows is what is cloned."""
    return Frozen(parts.named_clone())


def named_blind(parts: Parts) -> Policy:
    """As `named`, without anybody's proprioception: film from elsewhere has none."""
    episodes = [*parts.labels(), *parts.named()]
    return Frozen(clone([replace(episode, states=np.zeros_like(episode.states)) for episode in episodes], parts.seed), blind=True)
