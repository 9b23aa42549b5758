"""(f) Ctrl-World in small (arXiv 2510.10125): the base acts inside an action-conditioned world model, from the first frames of
our plan's scenes, with perturbed behaviour; the rollouts that are judged best fine-tune it by supervised learning.

As there: a world model that takes actions, several rollouts a scene made different on purpose, a few kept, the whole policy
fine-tuned on them. Not as there: people (and a VLM) judged success, which here would be a success signal; instead a rollout's
judge is the skill world model, which is told the instruction: kept are those that stay closest to what it imagines from each of
their states. The original changes instructions and start poses; here it is the behaviour, by an offset held for some chunks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.arena import Policy
from experiments.methods.action_worldmodel import Simulator, World, fit
from experiments.methods.base import Frozen, Parts
from experiments.methods.dreamgen import joined
from experiments.regimes import cloning_steps
from world2act import behaviour_cloning, schedule
from world2act.behaviour_cloning import Samples
from world2act.models.tiny_policy import TinyPolicy
from world2act.segmentation import OnlineSkill, RuleBasedPlanner, load_schemas
from world2act.splits import Split
from world2act.types import M, Trajectory

ROLLOUTS, KEPT = 4, 1
"""Rollouts a scene, the first of them without noise, and how many of them are kept."""
NOISE, HOLD = 0.6, 4
"""Spread of the offset on the arm's motion in standard deviations of the actions, and the chunks that one offset lasts."""
SCENES = 16
"""Scenes that run side by side."""


@dataclass(frozen=True)
class Rollouts:
    """R imagined episodes of n chunks, shorter ones padded. frames uint8 (R, n, rows, W, 3) and states (R, n, S) at chunk starts;
    chunks (R, n, M, A), in the simulator's units; distance (R, n): latent error against the skill world model's imagination."""

    frames: Tensor
    states: Tensor
    chunks: Tensor
    distance: Tensor


def offsets(rows: int, chunks: int, size: int, generator: torch.Generator) -> Tensor:
    """(rows, chunks, 1, A), in standard deviations: zero for every ROLLOUTS-th row and for the gripper."""
    drawn = NOISE * torch.randn((rows, -(-chunks // HOLD), 1, size), generator=generator)
    drawn[..., 3:] = 0.0
    drawn[::ROLLOUTS] = 0.0
    return drawn.repeat_interleave(HOLD, 1)[:, :chunks]


@torch.no_grad()
def roll_out(parts: Parts, world: World, scenes: Sequence[Trajectory], generator: torch.Generator) -> Rollouts:
    """ROLLOUTS episodes from the first frame and state of each scene (neighbouring rows), as long as the scene's episode was."""
    rows = [scene for scene in scenes for _ in range(ROLLOUTS)]
    length = max(len(scene.frames) for scene in scenes)
    spec, actions, planner = parts.arena.spec, parts.adapters.actions, RuleBasedPlanner()
    hand = load_schemas().calibration_of(parts.arena.simulator, spec.gripper_open_width)
    skills = [OnlineSkill(planner.plan(row.instruction, row.task), hand, stride=M) for row in rows]
    instructions = [row.instruction for row in rows]
    noise = offsets(len(rows), length, len(actions.mean), generator) * actions.std
    frames = torch.from_numpy(np.stack([row.frames[0] for row in rows]))
    states = torch.from_numpy(np.stack([row.states[0] for row in rows]))
    still = parts.model.encode(frames[:, None])[:, 0]
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for number in range(length):
        widths = states[:, spec.gripper_width_index].clamp_min(0.0).tolist()
        active = [skill.update(width) for skill, width in zip(skills, widths, strict=True)]
        prompts = active if parts.arena.segmented else instructions
        chunk = (parts.base.act(frames, states, instructions) + noise[:, number]).clamp(-1.0, 1.0)
        imagined = world.step(still, states, actions.normalise(chunk))
        expected = parts.model.imagine_latents(still, prompts, 1, [parts.seed] * len(rows))[:, 1]
        distance = (imagined.moving - expected).square().flatten(1).mean(1)
        found.append((frames[:, : parts.base.config.active_rows], states, chunk, distance))
        frames, still, states = imagined.frames, imagined.still, imagined.states
    return Rollouts(*(torch.stack(values, dim=1) for values in zip(*found, strict=True)))


def best(distance: Tensor, kept: int) -> Tensor:
    """Distances (scenes, rollouts) -> row numbers of the `kept` closest rollouts of each scene, (scenes * kept,)."""
    if not 1 <= kept <= distance.shape[1]:
        raise ValueError(f"kept: must be between 1 and {distance.shape[1]}, the rollouts of a scene, got {kept}")
    chosen = distance.argsort(1)[:, :kept]
    return (chosen + torch.arange(len(distance))[:, None] * distance.shape[1]).flatten()


def selected(rollouts: Rollouts, scenes: Sequence[Trajectory]) -> tuple[Samples, Tensor]:
    """Samples of the best rollouts of each scene, and the distances (scenes, ROLLOUTS) by which they were chosen."""
    lengths = torch.tensor([len(scene.frames) for scene in scenes]).repeat_interleave(ROLLOUTS)
    inside = torch.arange(rollouts.distance.shape[1]) < lengths[:, None]
    mean = ((rollouts.distance * inside).sum(1) / lengths).view(-1, ROLLOUTS)
    rows = best(mean, KEPT)
    keep = inside[rows]
    instructions = [scenes[int(row) // ROLLOUTS].instruction for row in rows for _ in range(int(lengths[row]))]
    frames, states, chunks = (x[rows][keep].numpy() for x in (rollouts.frames, rollouts.states, rollouts.chunks))
    return Samples(frames, states, chunks, instructions), mean


def train(parts: Parts) -> Policy:
    """Rollouts from as many scenes as our plan executes; the base goes on with those kept and its own demonstrations."""
    world = Simulator(parts.model, fit(parts))
    started = time.monotonic()
    specs = schedule.plan(parts.settings, parts.tasks, parts.seed)
    runs = parts.arena.run(specs, Frozen(parts.base))  # only first frames, first states and lengths are used
    scenes = [run.trajectory for run in runs]
    executed = time.monotonic()
    generator = torch.Generator().manual_seed(parts.seed)
    kept: list[Samples] = []
    distances: list[Tensor] = []
    for first in range(0, len(scenes), SCENES):
        members = scenes[first : first + SCENES]
        samples, distance = selected(roll_out(parts, world, members, generator), members)
        kept.append(samples)
        distances.append(distance)
    imagined = time.monotonic()
    policy = fine_tune(parts, kept, KEPT * len(scenes))
    distance = torch.cat(distances)
    parts.note("rollouts", distance.numel())
    parts.note("distance/unperturbed", float(distance[:, 0].mean()))
    parts.note("distance/all", float(distance.mean()))
    parts.note("distance/kept", float(distance.flatten()[best(distance, KEPT)].mean()))
    parts.note("seconds/execute", executed - started)
    parts.note("seconds/target", imagined - executed)
    parts.note("seconds/train", time.monotonic() - imagined)
    return Frozen(policy)


def fine_tune(parts: Parts, kept: Sequence[Samples], episodes: int) -> TinyPolicy:
    """The base trained on, with the recipe of `dreamgen`."""
    rows = parts.base.config.active_rows
    real = behaviour_cloning.samples_of(parts.labels(), rows, (Split.BASE, Split.WORLDMODEL))
    policy = TinyPolicy(parts.base.config)
    policy.load_state_dict(parts.base.state_dict())
    settings = behaviour_cloning.Settings(Path(), Path(), seed=parts.seed, steps=cloning_steps(episodes), rate=5e-4)
    behaviour_cloning.train(policy, joined([real, *kept], rows), settings)
    return policy.requires_grad_(False)
