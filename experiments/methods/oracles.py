"""Upper bounds that only a simulator can give, to find out which part loses the gain. None of them is a method.

oracle-action: Stage 2's learner with the expert's true chunk at every visited state: what remains is the learner's.
oracle-video: E_v reads the true video of the expert from every visited state: what is lost further is E_v's.
"""

from __future__ import annotations

import numpy as np
import torch

from experiments.arena import Policy, Run
from experiments.methods.base import Parts
from experiments.methods.residual import post_train
from world2act.stage2 import Targets


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
