"""(e) VLA-RFT in small (arXiv 2510.00406): policy gradient inside an action-conditioned world model, towards verified rewards.

As there: the policy's chunks, explored with Gaussian noise, are rolled out in a world model that takes actions; the reward of
each step is how close the imagined observation is to a reference; GRPO's advantage (reward against its group from the same
start, in the group's spread) and a KL bound to the base. Not as there: the reference comes from the skill world model's
imagination of the instruction, not from an expert's trajectory, for there is none in post-training; closeness is measured in
latents, not in pixels and LPIPS; what is trained is our residual, not a VLA with a flow-matching head; every collection is
used for one update, so the importance ratio is 1 and there is nothing to clip. Starts are the states visited in the same
on-policy rounds as ours, a better choice for the base's errors than the original's offline frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.arena import Policy, Run
from experiments.methods.action_worldmodel import Simulator, World, fit
from experiments.methods.base import Frozen, Parts, WithResidual
from world2act import schedule
from world2act.normalisation import Statistics
from world2act.stage2 import Learner, Metrics

BaseChunk = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
"""Frames uint8 (N, H, W, 3), states, instructions -> the base's chunks, normalised."""


@dataclass(frozen=True)
class Settings:
    """starts: per update; group: rollouts from each; horizon: chunks of a rollout. Exploration in standard deviations of the
    actions: `spread` is one offset for the chunk, `jitter` one per action. kl: weight of KL(policy | base) per rollout step.

    One chunk is the default: rewards are per chunk and starts are on-policy, and a second chunk costs ten times as much, for the
    base must see decoded frames.
    """

    starts: int = 24
    group: int = 8
    horizon: int = 1
    spread: float = 0.25
    jitter: float = 0.1
    kl: float = 0.02


@dataclass(frozen=True)
class Starts:
    """N visited states: latents (N, C, h, w), states (N, S), base chunks (N, M, A) normalised, reference latents
    (N, horizon, C, h, w), instructions."""

    latents: Tensor
    states: Tensor
    base: Tensor
    reference: Tensor
    instructions: tuple[str, ...]

    @staticmethod
    def joined(parts: Sequence[Starts]) -> Starts:
        """One after the other."""
        latents, states, base, reference = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "states", "base", "reference")
        )
        return Starts(latents, states, base, reference, tuple(text for part in parts for text in part.instructions))

    def repeated(self, rows: Tensor, times: int) -> Starts:
        """Those of `rows`, each `times` in a row, in float32."""
        at = rows.repeat_interleave(times)
        latents, states, base, reference = (x[at].float() for x in (self.latents, self.states, self.base, self.reference))
        return Starts(latents, states, base, reference, tuple(self.instructions[i] for i in at.tolist()))


@torch.no_grad()
def starts_of(parts: Parts, run: Run, horizon: int) -> Starts:
    """Every state that an episode visited, and the skill world model's clip from its frame under the skill active there."""
    trajectory = run.trajectory
    frames = torch.from_numpy(trajectory.frames)
    seeds = [parts.seed + i for i in range(len(frames))]
    latents = parts.model.imagine(frames, trajectory.prompts, horizon, seeds).half()
    base = parts.adapters.actions.normalise(torch.from_numpy(trajectory.base))
    texts = (trajectory.instruction,) * len(frames)
    return Starts(latents[:, 0], torch.from_numpy(trajectory.states), base, latents[:, 1:], texts)


def explore(like: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """Gaussian noise (N, M, A): one offset a chunk plus one a action; its covariance is what `quadratic` inverts."""
    n, m, a = like.shape
    shared = torch.randn((n, 1, a), generator=generator)
    return settings.spread * shared + settings.jitter * torch.randn((n, m, a), generator=generator)


def quadratic(difference: Tensor, settings: Settings) -> Tensor:
    """d' Sigma^-1 d of chunks (N, M, A) under the covariance jitter^2 I + spread^2 1 1' of each component over time; (N,)."""
    mean = difference.mean(1, keepdim=True)
    along = difference.shape[1] * mean.square() / (settings.jitter**2 + difference.shape[1] * settings.spread**2)
    across = (difference - mean).square() / settings.jitter**2
    return along.sum((1, 2)) + across.sum((1, 2))


def advantages(rewards: Tensor, group: int) -> Tensor:
    """Rewards (H, N) -> what still follows each step, minus its group's mean, over its group's spread; groups are neighbours."""
    following = rewards.flip(0).cumsum(0).flip(0).reshape(len(rewards), -1, group)
    centred = following - following.mean(2, keepdim=True)
    scaled: Tensor = centred / (centred.square().mean(2, keepdim=True).sqrt() + 1e-8)
    return scaled.flatten(1)


def executable(chunks: Tensor, actions: Statistics) -> Tensor:
    """Normalised chunks as the simulator would execute them: within [-1, 1] in its units, normalised again."""
    return actions.normalise(actions.denormalise(chunks).clamp(-1.0, 1.0))


def objective(
    learner: Learner, world: World, base: BaseChunk, starts: Starts, settings: Settings
) -> tuple[Tensor, dict[str, float]]:
    """Policy-gradient loss of one collection from `starts`, whose rows are groups of `settings.group`; its metrics."""
    noise, generator = learner.settings.latent_noise, learner.generator
    still, states, chunk = starts.latents, starts.states, starts.base
    scores, divergences, rewards, sizes = [], [], [], []
    for step in range(settings.horizon):
        seen = still + noise * torch.randn(still.shape, generator=generator)
        residual = learner.policy(seen, states, chunk, starts.instructions)
        mean = chunk + residual
        action = (mean + explore(mean, settings, generator)).detach()
        scores.append(-0.5 * quadratic(action - mean, settings))
        divergences.append(0.5 * quadratic(residual, settings))
        sizes.append(residual.detach().square().mean())
        last = step + 1 == settings.horizon
        imagined = world.step(still, states, executable(action, learner.adapters.actions), look=not last)
        rewards.append(-(imagined.moving - starts.reference[:, step]).square().flatten(1).mean(1))
        if not last:
            still, states = imagined.still, imagined.states
            chunk = base(imagined.frames, states, starts.instructions)
    reward, score, divergence = torch.stack(rewards), torch.stack(scores), torch.stack(divergences)
    loss = -(advantages(reward, settings.group) * score).mean() + settings.kl * divergence.mean()
    metrics = {"reward": reward.mean(), "kl": divergence.detach().mean(), "residual_norm": torch.stack(sizes).mean().sqrt()}
    return loss, {name: float(value) for name, value in metrics.items()}


def improve(learner: Learner, world: World, base: BaseChunk, starts: Starts, steps: int, settings: Settings) -> list[Metrics]:
    """A round of `steps` updates from random starts; raises the learner's version."""
    if learner.total_steps == 0:
        statistics = Statistics.fit(starts.states, torch.ones(len(starts.states), dtype=torch.bool))
        learner.policy.set_state_statistics(statistics.mean, statistics.std)
    history = []
    for step in range(steps):
        rows = torch.randint(len(starts.states), (settings.starts,), generator=learner.generator)
        loss, metrics = objective(learner, world, base, starts.repeated(rows, settings.group), settings)
        learner.settings.optimiser.update(learner.optimiser, loss, step, steps)
        learner.total_steps += 1
        history.append(metrics)
    learner.version += 1
    return history


def train(parts: Parts, settings: Settings = Settings()) -> Policy:
    """The same rounds, scenes and numbers of updates as ours."""
    world = Simulator(parts.model, fit(parts))
    config, shape = parts.base.config, parts.model.config.vae.latent_shape
    learner = Learner(parts.adapters, replace(parts.settings, vision="latent"), parts.seed, config.states, shape)

    def base(frames: Tensor, states: Tensor, instructions: Sequence[str]) -> Tensor:
        return parts.adapters.actions.normalise(parts.base.act(frames, states, instructions))

    policy: Policy = Frozen(parts.base)
    known: list[Starts] = []
    seconds = {"execute": 0.0, "target": 0.0, "train": 0.0}
    for number, members in schedule.rounds(schedule.plan(parts.settings, parts.tasks, parts.seed)):
        started = time.monotonic()
        runs = parts.arena.run(members, policy)
        executed = time.monotonic()
        known += [starts_of(parts, run, settings.horizon) for run in runs]
        learner.consumed |= {spec.key for spec in members}
        labelled = time.monotonic()
        history = improve(learner, world, base, Starts.joined(known), schedule.steps_of(number, parts.settings), settings)
        policy = WithResidual(parts.base, learner.bundle(parts.base.hash), parts.model.encode)
        seconds["execute"] += executed - started
        seconds["target"] += labelled - executed
        seconds["train"] += time.monotonic() - labelled
        for name in history[-1]:
            recent = [metrics[name] for metrics in history[-20:]]
            parts.note(f"round_{number}/{name}", sum(recent) / len(recent))
        parts.on_round(number, policy)
    for name, value in seconds.items():
        parts.note(f"seconds/{name}", value)
    return policy
