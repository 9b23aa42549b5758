"""Training the embedded world model on skill clips: first the video VAE, then the transformer on its cached latents.

    world2act train-worldmodel --demos DIR --out zoo/worldmodel.safetensors

A large world model: world2act train-worldmodel --backbone NAME --help (there --data, not --demos).

Reads split `worldmodel` (or `base`: a world model that has seen no more than a base policy) for training and `validation` for
the numbers in the card; any other split is refused. Only video and prompts train it, never actions. Three things decide
whether its predictions carry the action (measured in a prototype):
- small objects vanish from the VAE unless pixels that differ from the task's median first frame weigh about 25 times more;
- without the skip from the start latent, minutes go into learning the background (the source x1 of models/worldmodel.py);
- clips begin at any frame of a skill, mostly one or two latents long: that is how closed-loop targets use it.

What is drawn is drawn on the CPU, so that a GPU trains on the same batches; its last bits are its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel

from world2act import splits, worldmodel_metrics
from world2act.console import Progress, command_line, no_progress, progress_display
from world2act.data.clips import Cut, CutEpisode, LatentBank, median_first_frames, read_cut
from world2act.models.vae import SEEN, VideoVAE, to_float
from world2act.models.worldmodel import WorldModel, WorldModelConfig
from world2act.optimisation import Precision, autocast, device_of, warm_cosine
from world2act.splits import Split
from world2act.types import Device

FUSED_FROM = 6
"""Latents ahead from which fused attention is the faster one."""


@dataclass(frozen=True)
class VAESettings:
    """steps of `batch` windows of five frames; object_weight: see the module's docstring; still_share: windows that show one
    frame only, as latent 0 does; kl: weight of the posterior's KL per latent element, which keeps the latents smooth."""

    steps: int = 3000
    batch: int = 16
    rate: float = 1e-3
    object_weight: float = 24.0
    object_contrast: float = 0.15
    still_share: float = 0.2
    kl: float = 1e-4
    normalising_windows: int = 512


@dataclass(frozen=True)
class TransformerSettings:
    """Every step trains on `short_batch` clips of `short_horizon` latents or, with chance `long_share`, on `long_batch` clips
    of up to `long_horizon` latents. text_dropout: prompts replaced by '', so that guidance can be used; latent_stride: clips
    begin at every such frame of an episode; averaging: decay of the running average of the weights. reading_weight: of what a
    small network, trained along and thrown away, reads of the actions in each imagined latent (Huber, normalised chunks): squared
    error alone does not ask a latent to say what is done. 0: nobody looks at actions."""

    steps: int = 6000
    short_batch: int = 32
    short_horizon: int = 2
    long_batch: int = 6
    long_horizon: int = 14
    long_share: float = 0.2
    rate: float = 2e-3
    weight_decay: float = 1e-2
    text_dropout: float = 0.1
    latent_stride: int = 2
    averaging: float = 0.99
    reading_weight: float = 0.0
    checkpoint_steps: int = 400


@dataclass(frozen=True)
class Settings:
    """demos: folder of <split>/<task>.hdf5; out: weights file to write, with a card <name>.md beside it; vae_from: reuse the VAE
    of this world model; split: of the demonstrations; segmented: false trains on whole episodes with their instruction (Base-WM
    instead of Skill-WM); tune: go on from this world model, whose VAE stays; limit: demonstrations per task; own: folder of
    posttrain/<task>.hdf5, the robot's own episodes, which train it too; more: folder of worldmodel/<task>.hdf5, video of other
    tasks: about half of what is drawn, however little the rest is; max_horizon: latents ahead at most, for rollouts a whole
    skill; device: what trains VAE and transformer; threads: CPU threads; probe_steps: training of the probe that measures how
    well latents carry actions."""

    demos: Path
    out: Path
    seed: int = 0
    threads: int = 1
    limit: int | None = None
    tasks: tuple[str, ...] | None = None
    vae_from: Path | None = None
    tune: Path | None = None
    segmented: bool = True
    split: Literal[Split.WORLDMODEL, Split.BASE] = Split.WORLDMODEL
    own: Path | None = None
    more: Path | None = None
    noise_scale: float = 0.0
    max_horizon: int = 20
    device: Device = "auto"
    precision: Precision = "auto"
    probe_steps: int = 600
    vae: VAESettings = field(default_factory=VAESettings)
    transformer: TransformerSettings = field(default_factory=TransformerSettings)


class _Windows:
    """Draws windows of five frames with the weights of their pixels."""

    def __init__(
        self, episodes: Sequence[CutEpisode], settings: VAESettings, rng: np.random.Generator, device: torch.device
    ) -> None:
        self.episodes, self.settings, self.rng, self.device = episodes, settings, rng, device
        self.medians = {task: torch.from_numpy(m) for task, m in median_first_frames(episodes).items()}
        sizes = np.array([e.weight * max(1, len(e.frames) - SEEN + 1) for e in episodes], np.float64)
        self.chances = sizes / sizes.sum()

    def draw(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames uint8 (batch, 5, rows, W, 3) and pixel weights (batch, 4, rows, W, 1) of the last four, mean 1."""
        frames, medians = [], []
        for number in self.rng.choice(len(self.episodes), batch, p=self.chances):
            episode = self.episodes[number]
            first = int(self.rng.integers(0, max(1, len(episode.frames) - SEEN + 1)))
            first -= first % episode.every  # windows that a slow camera's chunks show
            at = np.arange(first, first + SEEN).clip(max=len(episode.frames) - 1)
            if self.rng.random() < self.settings.still_share:
                at[:] = at[self.rng.integers(SEEN)]
            frames.append(torch.from_numpy(episode.frames[at]))
            medians.append(self.medians[episode.task])
        seen = torch.stack(frames).to(self.device)
        return seen, self._weights(to_float(seen[:, 1:]), to_float(torch.stack(medians).to(self.device))[:, None])

    def _weights(self, seen: torch.Tensor, median: torch.Tensor) -> torch.Tensor:
        contrast = (seen - median).abs().amax(dim=-1, keepdim=True) / (2 * self.settings.object_contrast)
        weights = 1.0 + self.settings.object_weight * contrast.clamp(max=1.0)
        # Each view counts the same: nearly every pixel of the moving wrist camera differs from the median.
        left, right = weights.chunk(2, dim=3)
        return torch.cat([view / view.mean(dim=(1, 2, 3), keepdim=True) for view in (left, right)], dim=3)


def train_vae(
    vae: VideoVAE,
    episodes: Sequence[CutEpisode],
    settings: VAESettings,
    seed: int,
    precision: Precision = "auto",
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Train `vae` in place on windows of `episodes` (splits worldmodel, base and posttrain only); sets its latent statistics.

    Returns final losses. Loss: weighted Huber of the four frames that a latent is decoded to + kl * KL(posterior | N(0, 1)).
    """
    splits.require((e.split for e in episodes), [Split.WORLDMODEL, Split.BASE, Split.POSTTRAIN], "train_vae")
    generator = torch.Generator().manual_seed(seed)
    device = vae.mean.device
    windows = _Windows(episodes, settings, np.random.default_rng(seed), device)
    vae.train()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = warm_cosine(optimiser, settings.steps)
    mean_error = mean_kl = 0.0
    best = float("inf")
    for step in range(settings.steps):
        seen, weights = windows.draw(settings.batch)
        x = to_float(seen)
        with autocast(precision, device):
            mean, logvar = vae.moments(x)
            z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator).to(device)
            decoded = vae.reconstruct(z)
        error = (weights * torch.nn.functional.smooth_l1_loss(decoded, x[:, 1:], beta=0.1, reduction="none")).mean()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        optimiser.zero_grad(set_to_none=True)
        (error + settings.kl * divergence).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        keep = min(0.98, step / (step + 1))
        mean_error = keep * mean_error + (1 - keep) * error.item()
        mean_kl = keep * mean_kl + (1 - keep) * divergence.item()
        best = min(best, mean_error) if step >= 50 else best
        if mean_error > 2 * best:
            raise RuntimeError(
                f"VAE: diverged at step {step} (error {mean_error:.3g}, was {best:.3g}): lower vae.rate ({settings.rate:g})"
            )
        progress("VAE", step + 1, settings.steps, {"error": mean_error, "kl": mean_kl})
    vae.eval()
    _set_statistics(vae, windows.draw(settings.normalising_windows)[0])
    return {"vae_error": mean_error, "vae_kl": mean_kl}


@torch.no_grad()
def _set_statistics(vae: VideoVAE, seen: torch.Tensor) -> None:
    """Mean and spread of each latent channel over windows (N, 5, rows, W, 3)."""
    z = torch.cat([vae.moments(to_float(part))[0] for part in torch.split(seen, 64)])
    vae.mean.copy_(z.mean(dim=(0, 2, 3)))
    vae.std.copy_(z.std(dim=(0, 2, 3)).clamp(min=1e-4))


def train_transformer(
    model: WorldModel,
    bank: LatentBank,
    settings: TransformerSettings,
    seed: int,
    precision: Precision = "auto",
    progress: Progress = no_progress,
    checkpoint: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Train transformer and word vectors of `model` in place on cached latents; the VAE stays. Returns final losses.

    Loss: masked MSE of v = x1 - x0 at a random t (t = 1 when noise_scale is 0: regression), latents 1 .. n. The weights that
    stay are a running average; `checkpoint` is called with the model holding it, every `checkpoint_steps`.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [*model.transformer.parameters(), *model.text.parameters()]
    reader = _Reader(model, bank) if settings.reading_weight else None
    if reader:
        parameters += reader.probe.parameters()
    optimiser = torch.optim.AdamW(parameters, lr=settings.rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay)
    schedule = warm_cosine(optimiser, settings.steps)
    average = [parameter.detach().clone() for parameter in parameters]
    losses = {"short": 0.0, "long": 0.0} | ({"reading": 0.0} if reader else {})
    seen = dict.fromkeys(losses, 0)
    model.train()
    for step in range(settings.steps):
        long = torch.rand((), generator=generator).item() < settings.long_share
        size, horizon = (settings.long_batch, settings.long_horizon) if long else (settings.short_batch, settings.short_horizon)
        starts = bank.starts[torch.randint(len(bank.starts), (size,), generator=generator)]
        latent, read = _losses(model, bank, reader, starts, horizon, settings.text_dropout, generator, precision)
        optimiser.zero_grad(set_to_none=True)
        (latent + settings.reading_weight * read).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], max(1 - settings.averaging, 9 / (10 + step)))
        if (step + 1) % settings.checkpoint_steps == 0 or step + 1 == settings.steps:
            latest = [parameter.detach().clone() for parameter in parameters]
            _assign(parameters, average)
            checkpoint()
            if step + 1 < settings.steps:
                _assign(parameters, latest)
        found = {"long" if long else "short": latent} | ({"reading": read} if reader else {})
        for kind, value in found.items():
            keep = min(0.98, seen[kind] / (seen[kind] + 1))
            losses[kind] = keep * losses[kind] + (1 - keep) * value.item()
            seen[kind] += 1
        progress("world model", step + 1, settings.steps, losses)
    model.eval()
    return {f"loss_{kind}": value for kind, value in losses.items()}


@torch.no_grad()
def _assign(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


class _Reader:
    """Reads actions in imagined latents while these are learned, so that there are some to read."""

    def __init__(self, model: WorldModel, bank: LatentBank) -> None:
        self.probe = worldmodel_metrics.Probe(*model.config.vae.latent_shape, bank.chunks.shape[-1]).to(model.vae.mean.device)
        chunks = bank.chunks[bank.starts].flatten(1)
        self.mean, self.std = chunks.mean(0), chunks.std(0).clamp(min=1e-3)

    def errors(self, latents: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        """Of each latent (B, n, C, h, w) of its chunk (B, n, M, A): (B, n)."""
        wanted = (chunks.flatten(2) - self.mean.to(chunks)) / self.std.to(chunks)
        read = self.probe(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        return torch.nn.functional.smooth_l1_loss(read, wanted, reduction="none").mean(dim=2)


def _losses(
    model: WorldModel,
    bank: LatentBank,
    reader: _Reader | None,
    starts: torch.Tensor,
    horizon: int,
    text_dropout: float,
    generator: torch.Generator,
    precision: Precision,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the latents, and of the actions read in them: zero without a reader, and for clips whose prompt was dropped."""
    device = model.vae.mean.device
    batch = bank.batch(starts, horizon).to(device)
    size = len(starts)
    x0 = torch.cat([batch.start[:, None], batch.target], dim=1)
    x1 = batch.start[:, None].expand_as(x0)
    t = torch.ones(size)
    if model.config.noise_scale > 0.0:
        x1 = x1 + model.config.noise_scale * torch.randn(x0.shape, generator=generator).to(device)
        t = torch.rand(size, generator=generator)
    dropped = torch.rand(size, generator=generator) < text_dropout
    prompts = ["" if drop else prompt for prompt, drop in zip(batch.prompts, dropped.tolist(), strict=True)]
    t = t.to(device)
    at = t[:, None, None, None, None]
    x = (1 - at) * x0 + at * x1
    # Under bfloat16 torch's fused CPU attention is slow backwards for short sequences: half of a step.
    kernel = SDPBackend.MATH if horizon < FUSED_FROM else SDPBackend.FLASH_ATTENTION
    with autocast(precision, device), sdpa_kernel(kernel) if device.type == "cpu" else nullcontext():
        v = model.velocity(x, batch.start, prompts, t).float()
    errors = (v - (x1 - x0))[:, 1:].square().mean(dim=(2, 3, 4))
    latent = (errors * batch.mask).sum() / batch.mask.sum().clamp(min=1)
    if reader is None:
        return latent, torch.zeros_like(latent)
    said = batch.mask & ~dropped.to(device)[:, None]
    read = reader.errors((x - at * v)[:, 1:], batch.chunks)
    return latent, (read * said).sum() / said.sum().clamp(min=1)


def _check(settings: Settings) -> None:
    if settings.transformer.reading_weight < 0:
        raise ValueError(f"transformer.reading_weight: must be >= 0, got {settings.transformer.reading_weight:g}")
    fresh = Settings(settings.demos, settings.out)
    given = [
        name for name in ("vae_from", "noise_scale", "max_horizon", "vae") if getattr(settings, name) != getattr(fresh, name)
    ]
    if settings.tune is not None and given:
        raise ValueError(f"{', '.join(given)}: with tune they are those of the world model that it goes on from; leave them out")


def train_worldmodel(
    settings: Settings, progress: Progress = no_progress, name: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> WorldModel:
    """The whole recipe: read, cut, VAE, latents, transformer, metrics; writes weights and card. Returns the model.

    Raises ValueError for settings that contradict `tune`.

    name: latents of the video (n, 1, C, h, w) -> the actions (n, 1, M, A) in the place of recorded ones, which nobody sees then.
    """
    _check(settings)
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    times: dict[str, float] = {}
    clock = time.monotonic()

    def lap(part: str) -> None:
        nonlocal clock
        times[part], clock = round(time.monotonic() - clock, 1), time.monotonic()

    device = device_of(settings.device)
    config = WorldModelConfig(noise_scale=settings.noise_scale, max_horizon=settings.max_horizon)
    model = WorldModel(config) if settings.tune is None else WorldModel.load(settings.tune).requires_grad_(True)
    model.to(device)
    rows = model.config.vae.active_rows
    cut = read_cut(settings.demos, [settings.split], rows, settings.tasks, settings.limit, settings.segmented)
    if settings.own is not None:
        own = read_cut(settings.own, [Split.POSTTRAIN], rows, settings.tasks, segmented=settings.segmented)
        cut = replace(cut, episodes=cut.episodes + own.episodes)
    if settings.more is not None:
        more = read_cut(settings.more, [Split.WORLDMODEL], rows, segmented=settings.segmented)
        cut = Cut(mixed(cut.episodes, more.episodes), cut.discarded + more.discarded)
    held_out = read_cut(settings.demos, [Split.VALIDATION], rows, settings.tasks, segmented=settings.segmented)
    lap("read")
    metrics: dict[str, float] = {}
    if settings.vae_from is not None:
        model.vae.load_state_dict(WorldModel.load(settings.vae_from).vae.state_dict())
    elif settings.tune is None:
        metrics |= train_vae(model.vae, cut.episodes, settings.vae, settings.seed, settings.precision, progress)
        model.save(settings.out.with_suffix(".vae.safetensors"), {"part": "VAE trained, transformer not: go on with --vae-from"})
    lap("vae")
    model.vae.eval().requires_grad_(False)
    bank = LatentBank(model.vae, cut.episodes, settings.transformer.latent_stride, progress)
    if name is not None:
        bank.name(name)
    held_bank = LatentBank(model.vae, held_out.episodes, settings.transformer.latent_stride)
    lap("latents")
    metrics |= train_transformer(
        model,
        bank,
        settings.transformer,
        settings.seed,
        settings.precision,
        progress,
        lambda: model.save(settings.out, {"part": "checkpoint of a training that goes on"}),
    )
    lap("transformer")
    model.requires_grad_(False).cpu()
    metrics |= worldmodel_metrics.reconstruction(model, held_out.episodes)
    metrics |= worldmodel_metrics.latent_errors(model, held_bank)
    metrics |= worldmodel_metrics.boundary_drift(
        model, worldmodel_metrics.two_skills(model, held_out.episodes), model.config.max_horizon
    )
    metrics |= worldmodel_metrics.action_probe(model, bank, held_bank, settings.seed, settings.probe_steps)
    lap("metrics")
    asked = asdict(settings) | {"device": device.type}
    asked |= {name: path.name for name, path in asked.items() if isinstance(path, Path)}
    card = {
        "data": _describe(cut.episodes, cut.discarded) | {"validation_episodes": len(held_out.episodes)},
        "command": command_line("world2act train-worldmodel", settings),
        "settings": json.loads(json.dumps(asked, default=str)),
        "metrics": {name: round(value, 5) for name, value in metrics.items()},
        "seconds": times,
    }
    model.save(settings.out, card)
    settings.out.with_suffix(".vae.safetensors").unlink(missing_ok=True)
    settings.out.with_suffix(".md").write_text(worldmodel_metrics.card_text(model, card))
    return model


def mixed(episodes: Sequence[CutEpisode], others: Sequence[CutEpisode]) -> list[CutEpisode]:
    """All of them, with those of `episodes` weighing more if they are few: about half of what is drawn is theirs.

    Raises ValueError where there is none, or `others` show a task of `episodes`: it would not be another one.
    """
    if not episodes:
        raise ValueError("episodes: none is left after segmentation")
    if shared := sorted({e.task for e in episodes} & {e.task for e in others}):
        raise ValueError(f"more: other tasks' video must not show {', '.join(shared)}")
    weight = max(1, round(sum(len(e.frames) for e in others) / sum(len(e.frames) for e in episodes)))
    return [*(replace(e, weight=weight) for e in episodes), *others]


def _describe(episodes: Sequence[CutEpisode], discarded: int) -> dict[str, Any]:
    tasks = sorted({e.task for e in episodes})
    return {
        "tasks": {task: sum(e.task == task for e in episodes) for task in tasks},
        "perturbed": sum(e.perturbed for e in episodes),
        "skills": sum(len(e.skills) for e in episodes),
        "discarded": discarded,
        "split": " and ".join(sorted({e.split for e in episodes})),
    }


def main() -> None:
    """Command line; see `Settings`."""
    config = (tyro.conf.EnumChoicesFromValues,)
    settings = tyro.cli(Settings, prog="world2act train-worldmodel", description=__doc__, config=config)
    try:
        with progress_display() as progress:
            model = train_worldmodel(settings, progress)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    for name, value in model.card["metrics"].items():
        print(f"{name:32s} {value:.4f}")


if __name__ == "__main__":
    main()
