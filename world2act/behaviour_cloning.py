"""Training the embedded base policy by behaviour cloning on few demonstrations (split `base` only), so that it can be improved.

world2act train-base --demos DIR --out zoo/base.safetensors
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from world2act import splits
from world2act.console import Progress, command_line, no_progress, progress_display
from world2act.data import robomimic
from world2act.data.clips import camera_every, camera_grid, intended
from world2act.models.tiny_policy import TinyPolicy, TinyPolicyConfig
from world2act.models.vae import to_float
from world2act.optimisation import Precision, autocast, warm_cosine
from world2act.splits import Split
from world2act.types import Episode, FloatArray, ImageArray, M


@dataclass(frozen=True)
class Settings:
    """Train the base policy on demonstrations of split base."""

    demos: Path
    """Folder of demonstrations: <demos>/<split>/<task>.hdf5."""
    out: Path
    """Weights file to write, with a card <name>.md beside it."""
    seed: int = 0
    threads: int = 1
    """CPU threads."""
    per_task: int = 4
    """Demonstrations a task at most, the first."""
    tasks: tuple[str, ...] | None = None
    """Tasks; none: all that there are."""
    steps: int = 1000
    """Training steps."""
    batch: int = 64
    """Samples a step."""
    rate: float = 2e-3
    """Learning rate, the highest of its schedule."""
    weight_decay: float = 1e-3
    """Of AdamW."""
    shift: int = 3
    """Random image shift in pixels, each way."""
    state_noise: float = 0.05
    """Noise on the state, in its standard deviations."""
    precision: Precision = "auto"
    """auto: bfloat16 where the CPU has AMX."""


@dataclass(frozen=True)
class Samples:
    """Every frame from which a whole chunk follows. frames uint8 (N, rows, W, 3); states (N, S); chunks (N, M, A)."""

    frames: ImageArray
    states: FloatArray
    chunks: FloatArray
    instructions: list[str]


def samples_of(episodes: Sequence[Episode], rows: int, allowed: Collection[Split] = (Split.BASE,)) -> Samples:
    """One sample per new frame from which M intended actions follow: what is seen there, and they.

    LeakageError for a split that is not `allowed`.
    """
    splits.require((e.split for e in episodes), allowed, "behaviour_cloning")
    frames, states, chunks, instructions = [], [], [], []
    for episode in episodes:
        wanted = intended(episode)
        starts = range(0, len(episode.actions) - M + 1, camera_every(episode))
        at = np.array([t for t in starts if wanted[t : t + M].all()], np.int64)
        frames.append(camera_grid(episode)[at, :rows])
        states.append(episode.states[at])
        chunks.append(episode.actions[at[:, None] + np.arange(M)])
        instructions += [episode.instruction] * len(at)
    return Samples(np.concatenate(frames), np.concatenate(states), np.concatenate(chunks), instructions)


def shifted(views: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
    """Each of the two views of each image (B, 3, rows, W) moved by up to `shift` pixels each way, edges repeated."""
    batch, channels, height, width = views.shape
    single = views.reshape(batch, channels, height, 2, width // 2).permute(0, 3, 1, 2, 4).flatten(0, 1)
    padded = torch.nn.functional.pad(single, (shift,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * shift + 1, (2, len(single), 1), generator=generator)
    down = (offsets[0] + torch.arange(height))[:, :, None].to(views.device)
    right = (offsets[1] + torch.arange(width // 2))[:, None, :].to(views.device)
    moved = padded[torch.arange(len(single), device=views.device)[:, None, None], :, down, right].permute(0, 3, 1, 2)
    return moved.reshape(batch, 2, channels, height, width // 2).permute(0, 2, 3, 1, 4).reshape(views.shape)


def train(policy: TinyPolicy, samples: Samples, settings: Settings, progress: Progress = no_progress) -> dict[str, float]:
    """Train `policy` in place: Huber loss of normalised chunks, shifted images, noisy proprioception. Sets its statistics."""
    generator = torch.Generator().manual_seed(settings.seed)
    frames = torch.from_numpy(samples.frames)
    states, chunks = torch.from_numpy(samples.states), torch.from_numpy(samples.chunks)
    policy.state_mean.copy_(states.mean(0))
    policy.state_std.copy_(states.std(0).clamp(min=1e-3))
    policy.action_mean.copy_(chunks.mean((0, 1)))
    policy.action_std.copy_(chunks.flatten(0, 1).std(0).clamp(min=1e-2))
    target = (chunks - policy.action_mean) / policy.action_std
    optimiser = torch.optim.AdamW(policy.parameters(), lr=settings.rate, weight_decay=settings.weight_decay)
    schedule = warm_cosine(optimiser, settings.steps)
    policy.train()
    mean = 0.0
    for step in range(settings.steps):
        at = torch.randint(len(frames), (settings.batch,), generator=generator)
        seen = shifted(to_float(frames[at]).permute(0, 3, 1, 2), settings.shift, generator)
        noise = settings.state_noise * policy.state_std * torch.randn((len(at), states.shape[1]), generator=generator)
        instructions = [samples.instructions[int(i)] for i in at]
        with autocast(settings.precision):
            chunk = policy(seen.contiguous(memory_format=torch.channels_last), states[at] + noise, instructions)
        loss = torch.nn.functional.smooth_l1_loss(chunk.float(), target[at])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        keep = min(0.98, step / (step + 1))
        mean = keep * mean + (1 - keep) * loss.item()
        progress("base policy", step + 1, settings.steps, {"loss": mean})
    policy.eval()
    return {"loss": mean}


def train_base(settings: Settings, progress: Progress = no_progress) -> TinyPolicy:
    """The whole recipe: read, train, write weights and card. Returns the policy."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    clock = time.monotonic()
    chosen: dict[str, list[Episode]] = {}
    for episode in robomimic.read_root(settings.demos, allowed=[Split.BASE], tasks=settings.tasks):
        if len(chosen.setdefault(episode.task, [])) < settings.per_task:
            chosen[episode.task].append(episode)
    episodes = [e for task in chosen.values() for e in task]
    config = TinyPolicyConfig(actions=episodes[0].actions.shape[1], states=episodes[0].states.shape[1])
    policy = TinyPolicy(config)
    samples = samples_of(episodes, config.active_rows)
    metrics = train(policy, samples, settings, progress)
    asked = asdict(settings) | {"demos": settings.demos.name, "out": settings.out.name}
    card = {
        "data": {
            "split": Split.BASE.value,
            "tasks": {task: len(some) for task, some in chosen.items()},
            "samples": len(samples.frames),
        },
        "command": command_line("world2act train-base", settings),
        "settings": json.loads(json.dumps(asked, default=str)),
        "metrics": {name: round(value, 5) for name, value in metrics.items()},
        "seconds": round(time.monotonic() - clock, 1),
    }
    policy.save(settings.out, card)
    settings.out.with_suffix(".md").write_text(card_text(policy, card))
    return policy


def card_text(policy: TinyPolicy, card: dict[str, Any]) -> str:
    """The card as Markdown: what, data, command, seed, metrics."""
    settings, data = card["settings"], card["data"]
    return "\n".join(
        [
            "# Embedded base policy `tiny`",
            "",
            "Two 64x64 views, proprioception and hashed words of the instruction -> one chunk of four actions: the frozen base",
            "that post-training is to improve.",
            "",
            f"- weights: sha256 `{policy.hash}`, float32, {sum(p.numel() for p in policy.parameters())} parameters",
            f"- data: split `{data['split']}`, episodes per task {data['tasks']}; {data['samples']} samples",
            f"- command: `{card['command']}`",
            f"- settings: {settings}",
            f"- seconds on {settings['threads']} thread(s): {card['seconds']}",
            f"- training loss (Huber, normalised actions): {card['metrics']['loss']:.4f}",
            "",
        ]
    )


def main() -> None:
    """Command line; see `Settings`."""
    settings = tyro.cli(Settings, prog="world2act train-base", description=__doc__)
    with progress_display() as progress:
        policy = train_base(settings, progress)
    print(f"wrote {settings.out} (sha256 {policy.hash[:12]})")


if __name__ == "__main__":
    main()
