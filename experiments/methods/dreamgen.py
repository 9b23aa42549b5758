"""(c) DreamGen in small (arXiv 2505.12705): imagine whole videos of new scenes, name their actions with an inverse-dynamics
model, and fine-tune the base on them together with its own demonstrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.arena import Policy
from experiments.methods.base import Frozen, Parts
from experiments.naming import InverseDynamics
from experiments.regimes import cloning_steps
from world2act import behaviour_cloning, schedule
from world2act.behaviour_cloning import Samples
from world2act.models.tiny_policy import TinyPolicy
from world2act.segmentation import segment_episode
from world2act.splits import Split
from world2act.types import Episode, M, Trajectory


def train(parts: Parts) -> Policy:
    """As many imagined episodes as our plan executes, each from the first frame of one of its scenes, skill by skill."""
    network, labels = parts.inverse(), parts.labels()
    lengths, motion = skill_lengths(labels, parts.model.config.max_horizon), fit_motion(labels)
    specs = schedule.plan(parts.settings, parts.tasks, parts.seed)
    runs = parts.arena.run(specs, Frozen(parts.base))  # only its first frame and state are used
    dreams = [dream(parts, network, motion, lengths[run.trajectory.task], run.trajectory) for run in runs]
    rows = parts.base.config.active_rows
    real = behaviour_cloning.samples_of(labels, rows, (Split.BASE, Split.WORLDMODEL))
    samples = joined([real, *dreams], rows)
    policy = TinyPolicy(parts.base.config)
    policy.load_state_dict(parts.base.state_dict())
    steps = cloning_steps(len(dreams))
    settings = behaviour_cloning.Settings(Path(), Path(), seed=parts.seed, steps=steps, rate=5e-4)
    behaviour_cloning.train(policy, samples, settings)
    parts.note("dreams", len(dreams))
    return Frozen(policy.requires_grad_(False))


def skill_lengths(labels: Sequence[Episode], longest: int) -> dict[str, list[tuple[str, int]]]:
    """Task -> its skills in order with the median chunks that the labelled demonstrations take for each, 1 to `longest`."""
    found: dict[str, dict[str, list[int]]] = {}
    for episode in labels:
        for skill in segment_episode(episode).skills:
            found.setdefault(episode.task, {}).setdefault(skill.prompt, []).append((skill.end - skill.start) // M)
    medians = {task: [(prompt, int(np.median(n))) for prompt, n in skills.items()] for task, skills in found.items()}
    return {task: [(prompt, min(max(n, 1), longest)) for prompt, n in skills] for task, skills in medians.items()}


def fit_motion(labels: Sequence[Episode]) -> Tensor:
    """How proprioception answers a chunk: least squares of the change over M actions, float32 (M * A + S + 1, S)."""
    starts = [(episode, t) for episode in labels for t in range(len(episode.actions) - M + 1)]
    inputs = np.stack([np.concatenate([e.actions[t : t + M].ravel(), e.states[t], [1.0]]) for e, t in starts])
    changes = np.stack([e.states[t + M] - e.states[t] for e, t in starts])
    return torch.from_numpy(np.linalg.lstsq(inputs, changes, rcond=None)[0]).float()


@torch.no_grad()
def dream(
    parts: Parts, network: InverseDynamics, motion: Tensor, skills: Sequence[tuple[str, int]], trajectory: Trajectory
) -> Samples:
    """Samples at the chunk starts of one imagined episode, skill by skill. Proprioception follows the named actions: DreamGen
    sets it to zero, which a base that relies on it could not bear."""
    start = torch.from_numpy(trajectory.frames[:1])
    frames, chunks = [], []
    for prompt, length in skills:
        latents = parts.model.imagine(start, [prompt], length, [parts.seed])
        chunks.append(network.read(latents[:, 1:])[0].clamp(-1, 1))
        film = parts.model.decode(latents)[0]
        frames.append(film[: M * length : M])
        start = film[-1:]
    named, state, states = torch.cat(chunks), torch.from_numpy(trajectory.states[0]), []
    for chunk in named:
        states.append(state)
        state = state + torch.cat([chunk.flatten(), state, torch.ones(1)]) @ motion
    return Samples(torch.cat(frames).numpy(), torch.stack(states).numpy(), named.numpy(), [trajectory.instruction] * len(named))


def joined(samples: Sequence[Samples], rows: int) -> Samples:
    """One set of samples out of several."""
    return Samples(
        np.concatenate([part.frames[:, :rows] for part in samples]),
        np.concatenate([part.states for part in samples]),
        np.concatenate([part.chunks for part in samples]),
        [text for part in samples for text in part.instructions],
    )
