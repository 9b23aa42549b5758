"""(c) DreamGen in small (arXiv 2505.12705): imagine whole videos of new scenes, name their actions with an inverse-dynamics
model, and fine-tune the base on them together with its own demonstrations.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from experiments.arena import Policy
from experiments.methods.base import Frozen, Parts
from experiments.methods.inverse_dynamics import InverseDynamics, fit
from experiments.regimes import cloning_steps
from world2act import behaviour_cloning, schedule
from world2act.behaviour_cloning import Samples
from world2act.models.tiny_policy import TinyPolicy
from world2act.splits import Split
from world2act.types import M, Trajectory


def train(parts: Parts) -> Policy:
    """As many imagined episodes as our plan executes, each from the first frame of one of its scenes, skill by skill."""
    network = fit(parts)
    specs = schedule.plan(parts.settings, parts.tasks, parts.seed)
    runs = parts.arena.run(specs, Frozen(parts.base))  # only the first frame, the states and the lengths of skills are used
    dreams = [dream(parts, network, run.trajectory) for run in runs]
    rows = parts.base.config.active_rows
    real = behaviour_cloning.samples_of(parts.labels(), rows, (Split.BASE, Split.WORLDMODEL))
    samples = joined([real, *dreams], rows)
    policy = TinyPolicy(parts.base.config)
    policy.load_state_dict(parts.base.state_dict())
    steps = cloning_steps(len(dreams))
    settings = behaviour_cloning.Settings(None, None, seed=parts.seed, steps=steps, rate=5e-4)  # type: ignore[arg-type]
    behaviour_cloning.train(policy, samples, settings)
    parts.note("dreams", len(dreams))
    return Frozen(policy.requires_grad_(False))


@torch.no_grad()
def dream(parts: Parts, network: InverseDynamics, trajectory: Trajectory) -> Samples:
    """Samples at the chunk starts of one imagined episode. Proprioception is integrated from the named actions' first state:
    DreamGen sets it to zero; here it stays at the first state's value, which the base's noise must bear."""
    start = torch.from_numpy(trajectory.frames[:1])
    frames, chunks = [], []
    for prompt, length in ((p, len(list(same))) for p, same in itertools.groupby(trajectory.prompts)):
        latents = parts.model.imagine(start, [prompt], length, [parts.seed])
        pairs = torch.stack([latents[0, :-1], latents[0, 1:]], dim=1)
        chunks.append(parts.adapters.actions.denormalise(network(pairs)).clamp(-1, 1))
        film = parts.model.decode(latents)[0]
        frames.append(film[: M * length : M])
        start = film[-1:]
    n = sum(map(len, chunks))
    states = np.repeat(trajectory.states[:1], n, axis=0)
    return Samples(torch.cat(frames).numpy(), states, torch.cat(chunks).numpy(), [trajectory.instruction] * n)


def joined(samples: Sequence[Samples], rows: int) -> Samples:
    """One set of samples out of several."""
    return Samples(
        np.concatenate([part.frames[:, :rows] for part in samples]),
        np.concatenate([part.states for part in samples]),
        np.concatenate([part.chunks for part in samples]),
        [text for part in samples for text in part.instructions],
    )
