"""For a base that must stay as it is: the residual fitted to demonstrations and named video, without imagination or rollouts; of
the world model only the VAE is used. What ours has to beat where there is film of an expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from experiments.arena import Policy
from experiments.methods.base import Frozen, Parts, Shown, WithResidual
from world2act import schedule
from world2act.data.clips import camera_grid, intended
from world2act.schedule import EpisodeSpec
from world2act.splits import Split
from world2act.stage2 import Learner, Stage2Dataset, Targets
from world2act.types import Episode, M, Trajectory


def train(parts: Parts) -> Policy:
    """As many updates as ours, each on as many episodes of as many tasks."""
    data = Stage2Dataset(parts.adapters, parts.settings, parts.model.encode, (Split.BASE, Split.WORLDMODEL))
    for shown in film(parts):
        data.add(*shown)
    learner = Learner(parts.adapters, parts.settings, parts.seed, device="auto")
    policy: Policy = Frozen(parts.base)
    for number in range(parts.settings.plan.rounds + 1):
        learner.train_round(data, schedule.steps_of(number, parts.settings))
        policy = WithResidual(parts.base, learner.bundle(parts.base.hash), parts.model.encode)
        parts.on_round(number, policy)
    return policy


def film(parts: Parts) -> Iterator[Shown]:
    """The regime's demonstrations and named video, as Stage 2 takes episodes."""
    episodes = itertools.chain(parts.labels(), parts.named())  # one at a time: film fills memory
    for number, episode in enumerate(e for e in episodes if len(e.actions) >= M):
        yield EpisodeSpec(0, episode.task, episode.index, 0.0, str(number)), *_shown(parts, episode)


@torch.no_grad()
def _shown(parts: Parts, episode: Episode) -> tuple[Trajectory, Targets]:
    """What the base would have done at each chunk's start, and what was done; a disturbed chunk is no target."""
    at = np.arange(0, len(episode.actions) - M + 1, M)
    following = at[:, None] + np.arange(M)
    frames, states = camera_grid(episode)[at], episode.states[at]
    base = parts.base.act(torch.from_numpy(frames), torch.from_numpy(states), [episode.instruction] * len(at)).numpy()
    chunks = parts.adapters.actions.normalise(torch.from_numpy(episode.actions[following]))
    wanted = torch.from_numpy(intended(episode)[following].all(axis=1))
    prompts = ("",) * len(at)
    trajectory = Trajectory(
        episode.task, episode.split, episode.index, 0, frames, states, base, base, prompts, episode.instruction
    )
    return trajectory, Targets(parts.adapters.action(chunks[None])[0], wanted, chunks=chunks)
