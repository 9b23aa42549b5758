"""A small action-conditioned world model: the simulator that VLA-RFT and Ctrl-World improve a policy in.

It predicts what the skill world model predicts, latent 1 of a clip, from a still frame's latent, proprioception and the chunk
that is executed, and the next proprioception. It learns from what the others have learned from: the regime's labelled
demonstrations, its video with named actions, and the robot's play, whose actions are known. The video VAE is the skill world
model's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from experiments import naming
from experiments.methods.base import Parts
from experiments.naming import PLAY_EPISODES
from world2act.data.clips import camera_grid
from world2act.models.adapters import Adapters
from world2act.models.worldmodel import WorldModel
from world2act.optimisation import autocast, warm_cosine
from world2act.types import Episode, M

WIDTH, BLOCKS, HIDDEN, PLACES = 64, 3, 128, 8
STEPS, BATCH, RATE, WEIGHT_DECAY = 4000, 64, 2e-3, 1e-3
LATENT_NOISE = 0.1
"""Standard deviation of the noise on input latents in training, in their own spread: rollouts feed predictions back."""
STRIDE = 2
"""Frames between the starts of two transitions of a labelled demonstration; named video, its actions read by the chunk: M."""
HELD_OUT = 10
"""Every tenth episode of each source is held out."""


@dataclass(frozen=True)
class Transitions:
    """N chunks. still: latents (N, C, h, w) of the frame before, alone; moving: of the M frames after it (float16 both);
    states, after: proprioception (N, S) before and after; chunks (N, M, A), normalised."""

    still: Tensor
    moving: Tensor
    states: Tensor
    after: Tensor
    chunks: Tensor

    def __len__(self) -> int:
        return len(self.chunks)

    def at(self, rows: Tensor) -> Transitions:
        """Those of `rows`, latents in float32."""
        return Transitions(*(getattr(self, field.name)[rows].float() for field in fields(self)))

    @staticmethod
    def joined(parts: Sequence[Transitions]) -> Transitions:
        """One after the other. Raises ValueError if there are none."""
        if not parts:
            raise ValueError("transitions: none to learn from")
        return Transitions(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Transitions)))


def cut(
    model: WorldModel, adapters: Adapters, frames: Tensor, states: Tensor, actions: Tensor, starts: Sequence[int]
) -> Transitions:
    """Transitions that begin at frames `starts` of an episode: frames uint8 (T+1, H, W, 3), states (T+1, S), actions (T, A)."""
    at = torch.tensor(starts)
    with autocast("auto"):
        latents = model.encode(frames[at[:, None] + torch.arange(M + 1)]).half()
    chunks = adapters.actions.normalise(actions[at[:, None] + torch.arange(M)])
    return Transitions(latents[:, 0], latents[:, 1], states[at], states[at + M], chunks)


def of_demonstration(model: WorldModel, adapters: Adapters, episode: Episode, stride: int = STRIDE) -> Transitions:
    """Every `stride` frames, wherever a whole chunk follows; disturbed actions too, for they were executed."""
    frames, states, actions = (torch.from_numpy(x) for x in (camera_grid(episode), episode.states, episode.actions))
    return cut(model, adapters, frames, states, actions, range(0, len(actions) - M + 1, stride))


def of_play(parts: Parts) -> Iterator[Transitions]:
    """The robot's play, one by one; states are known at chunk starts only, so the last chunk of each is left out."""
    for run in naming.play(parts.arena, parts.base, parts.tasks, PLAY_EPISODES):
        frames, actions = naming.film_of_run(run)
        states = torch.from_numpy(run.trajectory.states)
        starts = range(0, M * (len(states) - 1), M)
        if starts:
            yield cut(parts.model, parts.adapters, frames, states.repeat_interleave(M, 0), actions, starts)


class _Block(nn.Module):
    """Residual block, its features scaled and shifted by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.modulate = nn.Linear(HIDDEN, 2 * width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition)[..., None, None].chunk(2, dim=1)
        y: Tensor = self.second(nn.functional.gelu(self.first(self.norm(x) * (1 + scale) + shift)))
        return x + y


class ActionWorldModel(nn.Module):
    """Still latent (N, C, h, w), states (N, S), normalised chunks (N, M, A) -> latent of the next M frames, states after them.

    Untrained it copies both.
    """

    state_mean: Tensor
    state_std: Tensor
    move_std: Tensor

    def __init__(self, shape: tuple[int, int, int], state_size: int, action_size: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.grid = (PLACES, height, width)
        inputs = state_size + M * action_size
        self.condition = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU())
        # Proprioception says where the hand is in space: a map of its own says where that is in the picture.
        self.place = nn.Linear(HIDDEN, PLACES * height * width)
        self.enter = nn.Conv2d(channels + PLACES, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(WIDTH) for _ in range(BLOCKS))
        self.leave = nn.Conv2d(WIDTH, channels, 3, padding=1)
        self.move = nn.Sequential(nn.Linear(HIDDEN + WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, state_size))
        for last in (self.leave, self.move[-1]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.register_buffer("state_mean", torch.zeros(state_size))
        self.register_buffer("state_std", torch.ones(state_size))
        self.register_buffer("move_std", torch.ones(state_size))

    def forward(self, still: Tensor, states: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
        normal = (states - self.state_mean) / self.state_std
        condition = self.condition(torch.cat([normal, chunks.flatten(1)], dim=1))
        x = self.enter(torch.cat([still, self.place(condition).unflatten(1, self.grid)], dim=1))
        for block in self.blocks:
            x = block(x, condition)
        move = self.move(torch.cat([condition, x.mean((2, 3))], dim=1))
        return still + self.leave(nn.functional.gelu(x)), states + self.move_std * move


def fit(parts: Parts) -> ActionWorldModel:
    """Learn from the regime's labels, named video and play; notes errors on held-out episodes."""
    started = time.monotonic()
    train: list[Transitions] = []
    held: list[Transitions] = []
    of = partial(of_demonstration, parts.model, parts.adapters)
    for source in (map(of, parts.labels()), (of(episode, M) for episode in parts.named()), of_play(parts)):
        for number, part in enumerate(source):
            (held if number % HELD_OUT == HELD_OUT - 1 else train).append(part)
    dynamics = fit_to(Transitions.joined(train), parts.seed, STEPS)
    parts.note("dynamics/transitions", sum(map(len, train)))
    for name, value in errors(dynamics, Transitions.joined(held or train)).items():
        parts.note(f"dynamics/{name}", value)
    parts.note("seconds/dynamics", time.monotonic() - started)
    return dynamics


def fit_to(data: Transitions, seed: int, steps: int) -> ActionWorldModel:
    """Squared error of the latent, and of the change of proprioception in its spread; a function of data, seed and steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels, height, width = data.still.shape[1:]
        dynamics = ActionWorldModel((channels, height, width), data.states.shape[1], data.chunks.shape[2])
    dynamics.state_mean.copy_(data.states.mean(0))
    dynamics.state_std.copy_(data.states.std(0).clamp_min(1e-3))
    dynamics.move_std.copy_((data.after - data.states).std(0).clamp_min(1e-4))
    optimiser = torch.optim.AdamW(dynamics.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    schedule = warm_cosine(optimiser, steps)
    for _ in range(steps):
        batch = data.at(torch.randint(len(data), (BATCH,), generator=generator))
        noisy = batch.still + LATENT_NOISE * torch.randn(batch.still.shape, generator=generator)
        with autocast("auto"):
            moving, after = dynamics(noisy, batch.states, batch.chunks)
        # Against the clean latent plus what was predicted to change: noise in must not be copied out.
        loss = nn.functional.mse_loss(moving.float() - noisy + batch.still, batch.moving)
        loss = loss + ((after.float() - batch.after) / dynamics.move_std).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(dynamics.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return dynamics.eval().requires_grad_(False)


@torch.no_grad()
def errors(dynamics: ActionWorldModel, data: Transitions, rows: int = 1024) -> dict[str, float]:
    """Mean squared one-step errors of at most `rows` transitions, latents in their own spread.

    latent_error; copy_error: of the still frame's latent; other_action_error: with the chunk of another transition, the
    sensitivity to actions; state_error: share of the variance of proprioception's change that is not explained.
    """
    generator = torch.Generator().manual_seed(0)
    batch = data.at(torch.randperm(len(data), generator=generator)[:rows])
    found: dict[str, list[Tensor]] = {}
    other = batch.chunks.roll(1, 0)  # rows are shuffled
    for part in torch.split(torch.arange(len(batch)), BATCH):
        still, moving, states = batch.still[part], batch.moving[part], batch.states[part]
        latent, after = dynamics(still, states, batch.chunks[part])
        wrong, _ = dynamics(still, states, other[part])
        for name, value in (("latent", latent), ("copy", still), ("other_action", wrong)):
            found.setdefault(f"{name}_error", []).append((value - moving).square().flatten(1).mean(1))
        found.setdefault("state_error", []).append(((after - batch.after[part]) / dynamics.move_std).square().mean(1))
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


@dataclass(frozen=True)
class Imagined:
    """After a chunk: moving, its latent (N, C, h, w); frames uint8 (N, H, W, 3), its last one, which a base can look at; still,
    that frame's own latent; states (N, S)."""

    moving: Tensor
    frames: Tensor
    still: Tensor
    states: Tensor


class World(Protocol):
    """A simulator in imagination."""

    def step(self, still: Tensor, states: Tensor, chunks: Tensor, *, look: bool = True) -> Imagined:
        """Execute normalised chunks (N, M, A). look false: nobody reads frames and still, they are empty."""
        ...


@dataclass(frozen=True)
class Simulator:
    """The learned dynamics, and the VAE that turns its latents into what the policy sees."""

    model: WorldModel
    dynamics: ActionWorldModel

    @torch.no_grad()
    def step(self, still: Tensor, states: Tensor, chunks: Tensor, *, look: bool = True) -> Imagined:
        moving, after = self.dynamics(still, states, chunks)
        if not look:
            return Imagined(moving, torch.empty(0), torch.empty(0), after)
        with autocast("auto"):  # most of a step's time
            frames = self.model.decode(moving[:, None])[:, -1]  # decoded as a first latent: the last of its frames alone
            still = self.model.encode(frames[:, None])[:, 0]
        return Imagined(moving, frames, still.float(), after)
