"""Names for the actions of video that has none: an inverse-dynamics model, and the play that it learns from.

At play (`policies.Playing`) the robot moves at random, hand open and closed, in between what its base does. That shows what
actions look like without a label, a success or a reward; a few labelled demonstrations show how an expert's look.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.arena import Arena, Run
from experiments.policies import Playing
from world2act.data.clips import camera_grid
from world2act.models import store
from world2act.models.tiny_policy import TinyPolicy
from world2act.models.worldmodel import WorldModel
from world2act.normalisation import Statistics
from world2act.schedule import INDICES_PER_SEED, EpisodeSpec
from world2act.types import Episode, M

PLAY_EPISODES = 100
"""Per task."""
PLAY_NOISE = 0.6
PLAY_SEED = 99
"""The seed of `schedule.plan` whose scenes of split posttrain play uses; no method uses it."""
STRIDE = 2
"""A window of video begins at every such frame."""
STEPS, BATCH, RATE = 1200, 128, 2e-3  # 3,000 steps fit play better and an expert's video worse
KIND = "inverse-dynamics"
Film = tuple[Tensor, Tensor]
"""Frames uint8 (T+1, H, W, 3) and actions (T, A)."""


class InverseDynamics(nn.Module):
    """One latent, the video of a chunk -> the normalised chunk. (N, C, h, w) -> (N, M, A)."""

    def __init__(self, shape: tuple[int, int, int], actions: Statistics) -> None:
        super().__init__()
        channels, height, width = self.shape = shape
        self.actions = actions
        self.net = nn.Sequential(
            nn.Conv2d(channels, 96, 3, 1, 1),
            nn.GroupNorm(8, 96),
            nn.GELU(),
            nn.Conv2d(96, 96, 3, 2, 1),
            nn.GroupNorm(8, 96),
            nn.GELU(),
            nn.Conv2d(96, 96, 3, 1, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(96 * ((height + 1) // 2) * ((width + 1) // 2), 256),
            nn.GELU(),
            nn.Linear(256, M * len(actions.mean)),
        )

    def forward(self, latents: Tensor) -> Tensor:
        chunk: Tensor = self.net(latents)
        return chunk.view(len(chunk), M, -1)

    def save(self, path: Path, seconds: float) -> None:
        """Weights, statistics, and how long `fit` took."""
        metadata = {"kind": KIND, "shape": self.shape, "seconds": seconds}
        store.write(path, {**self.state_dict(), **self.actions.tensors("actions")}, metadata)

    @classmethod
    def load(cls, path: Path) -> tuple[InverseDynamics, float]:
        """What `save` wrote. Raises WeightsError for another file."""
        tensors, metadata, _ = store.read(path, KIND)
        network = cls(metadata["shape"], Statistics.take(tensors, "actions"))
        network.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("actions.")})
        return network.eval().requires_grad_(False), float(metadata["seconds"])

    @torch.no_grad()
    def read(self, latents: Tensor) -> Tensor:
        """Actions in the simulator's units: (N, K, C, h, w) -> (N, K, M, A)."""
        chunks = torch.cat([self(part.float()) for part in torch.split(latents.flatten(0, 1), 1024)])
        return self.actions.denormalise(chunks).view(*latents.shape[:2], *chunks.shape[1:])


@dataclass(frozen=True)
class Windows:
    """Video of single chunks and what was done in them: latents float16 (N, C, h, w), chunks (N, M, A), simulator's units."""

    latents: Tensor
    chunks: Tensor

    def save(self, path: Path) -> None:
        """One safetensors file."""
        save_file({"latents": self.latents.contiguous(), "chunks": self.chunks.contiguous()}, path)

    @classmethod
    def load(cls, path: Path) -> Windows:
        return cls(**load_file(path))


@torch.no_grad()
def windows(model: WorldModel, films: Iterable[Film], stride: int = STRIDE) -> Windows:
    """Every `stride` frames of films, wherever a whole chunk follows."""
    latents, chunks = [], []
    for frames, actions in films:
        starts = torch.arange(0, len(actions) - M + 1, stride)
        for at in torch.split(starts, 64):
            latents.append(model.encode(frames[at[:, None] + torch.arange(M + 1)])[:, 1].half())
            chunks.append(actions[at[:, None] + torch.arange(M)].float())
    return Windows(torch.cat(latents), torch.cat(chunks))


def film_of(episode: Episode) -> Film:
    """A demonstration as `windows` takes it."""
    return torch.from_numpy(camera_grid(episode)), torch.from_numpy(episode.actions)


@torch.no_grad()
def named(model: WorldModel, network: InverseDynamics, episode: Episode) -> Episode:
    """`episode`, as far as whole chunks go, with the actions that `network` reads from its video; its own are not looked at."""
    frames = torch.from_numpy(camera_grid(episode))
    starts = torch.arange(0, len(frames) - M, M)
    latents = [model.encode(frames[at[:, None] + torch.arange(M + 1)])[:, 1] for at in torch.split(starts, 64)]
    actions = network.read(torch.cat(latents)[None]).flatten(0, 2).clamp(-1.0, 1.0).numpy()
    end = len(actions)
    return replace(
        episode,
        images={name: images[: end + 1] for name, images in episode.images.items()},
        states=episode.states[: end + 1],
        widths=episode.widths[: end + 1],
        actions=actions,
        intended=None if episode.intended is None else episode.intended[:end],
        truth=None,
        cues={},
    )


def play(arena: Arena, base: TinyPolicy, tasks: Sequence[str], count: int = PLAY_EPISODES) -> Iterator[Run]:
    """`count` episodes a task at play, with every frame."""
    first, policy = PLAY_SEED * INDICES_PER_SEED, Playing(base, PLAY_SEED)
    for index in range(first, first + count):
        specs = [EpisodeSpec(0, task, index, PLAY_NOISE, f"{index:x}{number:x}") for number, task in enumerate(tasks)]
        yield from arena.run(specs, policy, film=True)


def film_of_run(run: Run) -> Film:
    """An executed episode, with every frame, as `windows` takes it."""
    assert run.frames is not None
    return torch.from_numpy(run.frames), torch.from_numpy(run.trajectory.executed).flatten(0, 1)


def fit(
    pools: Sequence[tuple[Windows, float]], noise: float, seed: int, actions: Statistics | None = None, steps: int = STEPS
) -> InverseDynamics:
    """Train on batches with a share of each pool. noise: on the latents, in their own spread; actions: default, of all pools."""
    everything = torch.cat([pool.chunks for pool, _ in pools])[None]
    statistics = actions or Statistics.fit(everything, torch.ones(everything.shape[:2], dtype=torch.bool))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        channels, height, width = pools[0][0].latents.shape[1:]
        network = InverseDynamics((channels, height, width), statistics)
    optimiser = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(steps):
        rows = [torch.randint(len(pool.chunks), (round(share * BATCH),), generator=generator) for pool, share in pools]
        seen = torch.cat([pool.latents[r] for (pool, _), r in zip(pools, rows, strict=True)]).float()
        wanted = statistics.normalise(torch.cat([pool.chunks[r] for (pool, _), r in zip(pools, rows, strict=True)]))
        loss = nn.functional.mse_loss(network(seen + noise * torch.randn(seen.shape, generator=generator)), wanted)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return network.eval().requires_grad_(False)
