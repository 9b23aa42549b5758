"""What a world model is worth on held-out clips: pictures, latents ahead, and whether its predictions carry the action."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from world2act.data.clips import CutEpisode, LatentBank
from world2act.models.worldmodel import WorldModel
from world2act.types import ImageArray, M, Skill

AHEAD = (1, 4, 8, 12)
"""Latents ahead at which the error is reported."""


@torch.no_grad()
def reconstruction(model: WorldModel, episodes: Sequence[CutEpisode], frames_each: int = 9) -> dict[str, float]:
    """PSNR in dB of frames that went through the VAE, over all active pixels (object pixels are few: look at pictures too)."""
    rows, errors = model.config.vae.active_rows, []
    for episode in episodes[:: max(1, len(episodes) // 40)]:
        active = episode.frames[: frames_each if len(episode.frames) >= frames_each else 1]
        grid = np.zeros((1, len(active), model.config.vae.height, model.config.vae.width, 3), np.uint8)
        grid[0, :, :rows] = active
        decoded = model.decode(model.encode(torch.from_numpy(grid)))[0, :, :rows].float()
        errors.append(((decoded - torch.from_numpy(active).float()) / 255.0).square().mean().item())
    return {"reconstruction_psnr_db": float(-10 * np.log10(np.mean(errors)))}


@torch.no_grad()
def latent_errors(model: WorldModel, bank: LatentBank, rows: int = 256) -> dict[str, float]:
    """Squared error of predicted latents relative to copying the start latent, k latents ahead, over clips long enough.

    1 is no better than a still image; 0 is perfect. `nan` never leaves: a k that no clip reaches is left out.
    """
    horizon = min(max(AHEAD), model.config.max_horizon)
    starts = bank.starts[torch.linspace(0, len(bank.starts) - 1, min(rows, len(bank.starts))).long()]
    # Few starts reach far: take also the ones with the longest way to go.
    longest = bank.starts[(bank.ends[bank.starts] - bank.starts).argsort(descending=True)[: rows // 2]]
    predicted, copied, count = torch.zeros(horizon), torch.zeros(horizon), torch.zeros(horizon)
    for part in torch.split(torch.cat([starts, longest]), 32):
        batch = bank.batch(part, horizon)
        imagined = model.imagine_latents(batch.start, batch.prompts, horizon, [0] * len(part))[:, 1:]
        mask = batch.mask.float()
        predicted += ((imagined - batch.target).square().mean(dim=(2, 3, 4)) * mask).sum(0)
        copied += ((batch.start[:, None] - batch.target).square().mean(dim=(2, 3, 4)) * mask).sum(0)
        count += mask.sum(0)
    return {f"error_vs_copy_at_{k}": float(predicted[k - 1] / copied[k - 1]) for k in AHEAD if k <= horizon and count[k - 1] > 0}


class VideoModel(Protocol):
    """What the drift needs of a world model: tensors as in world2act.models.worldmodel.WorldModel."""

    def encode(self, frames: torch.Tensor) -> torch.Tensor: ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor: ...

    def imagine(self, start: torch.Tensor, prompts: Sequence[str], horizon: int, seeds: Sequence[int]) -> torch.Tensor: ...


def two_skills(model: WorldModel, episodes: Sequence[CutEpisode]) -> Iterator[tuple[ImageArray, tuple[Skill, ...], list[str]]]:
    """For `boundary_drift`: the episodes with two skills, their rows padded to the whole camera grid."""
    vae = model.config.vae
    for episode in episodes:
        if len(episode.skills) >= 2:
            frames = np.zeros((len(episode.frames), vae.height, vae.width, 3), np.uint8)
            frames[:, : vae.active_rows] = episode.frames
            yield frames, episode.skills[:2], [skill.prompt for skill in episode.skills[:2]]


@torch.no_grad()
def boundary_drift(
    model: VideoModel,
    episodes: Iterable[tuple[ImageArray, tuple[Skill, ...], list[str]]],
    longest: int,
    compression: int = M,
) -> dict[str, float]:
    """Squared latent error over an episode's second skill, relative to copying that skill's true first frame.

    episodes: frames (T+1, H, W, 3), two skills, the prompts to ask with. fresh: imagined from the true first frame; chained: from
    the last frame that the model imagined for the first skill, as `/rollout` does. Empty when no episode has two skills.
    """
    errors = {"fresh": 0.0, "chained": 0.0, "copied": 0.0}
    for images, (first, second), prompts in episodes:
        before, after = (min((skill.end - skill.start) // compression, longest) for skill in (first, second))
        if not before or not after:
            continue
        frames = torch.from_numpy(images)
        truth = model.encode(frames[None, second.start : second.start + compression * after + 1])[:, 1:]
        last = model.decode(model.imagine(frames[first.start][None], prompts[:1], before, [0]))[:, -1]
        for name, start in (("fresh", frames[second.start][None]), ("chained", last)):
            imagined = model.imagine(start, prompts[1:], after, [0])[:, 1:]
            errors[name] += (imagined - truth).square().mean((2, 3, 4)).sum().item()
        copied = model.encode(frames[None, second.start : second.start + 1])
        errors["copied"] += (copied - truth).square().mean((2, 3, 4)).sum().item()
    if not errors["copied"]:
        return {}
    return {f"second_skill_{name}": errors[name] / errors["copied"] for name in ("fresh", "chained")}


class Probe(nn.Module):
    """One latent -> one action chunk: the shape of the paper's video adapter, without its pooling."""

    def __init__(self, channels: int, height: int, width: int, actions: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 64, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(64, 128, 3, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(128 * (height // 4) * (width // 4), 128),
            nn.GELU(),
            nn.Linear(128, M * actions),
        )

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        chunk: torch.Tensor = self.layers(latent)
        return chunk


def action_probe(
    model: WorldModel, train: LatentBank, held_out: LatentBank, seed: int, steps: int = 600, rows: int = 6000
) -> dict[str, float]:
    """R2 of actions read from latent 1 by a small probe, held out: true latents, predicted latents (with a probe of their own).

    `clean` clips are of unperturbed demonstrations; in perturbed ones part of each action is random and nobody can predict it
    from the start frame, so their R2 bounds nothing. 1 is perfect, 0 is the mean action.
    """
    generator = torch.Generator().manual_seed(seed)
    some = train.starts[torch.randperm(len(train.starts), generator=generator)[:rows]]
    held = held_out.starts[~held_out.perturbed[held_out.starts]]
    result: dict[str, float] = {}
    for kind in ("true", "predicted"):
        x, y = _pairs(model, train, some, kind)
        hx, hy = _pairs(model, held_out, held, kind)
        mean, std = y.mean(0), y.std(0).clamp(min=1e-3)
        torch.manual_seed(seed)
        probe = Probe(*model.config.vae.latent_shape, train.chunks.shape[-1])
        optimiser = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
        for _ in range(steps):
            at = torch.randint(len(x), (96,), generator=generator)
            loss = nn.functional.mse_loss(probe(x[at].float()), (y[at] - mean) / std)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            error = (torch.cat([probe(part.float()) for part in torch.split(hx, 256)]) - (hy - mean) / std).square().mean()
            spread = ((hy - hy.mean(0)) / std).square().mean()
        result[f"action_r2_{kind}"] = float(1 - error / spread)
    return result


@torch.no_grad()
def _pairs(model: WorldModel, bank: LatentBank, starts: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent 1, true or predicted, (N, C, h, w) and its action chunk (N, M*A)."""
    latents, chunks = [], []
    for part in torch.split(starts, 64):
        batch = bank.batch(part, 1)
        ahead = batch.target[:, 0]
        if kind == "predicted":
            ahead = model.imagine_latents(batch.start, batch.prompts, 1, [0] * len(part))[:, 1]
        latents.append(ahead.half())
        chunks.append(batch.chunks[:, 0].flatten(1))
    return torch.cat(latents), torch.cat(chunks)


def card_text(model: WorldModel, card: dict[str, Any]) -> str:
    """The card as Markdown: what, data, command, seed, metrics."""
    settings, data = card["settings"], card["data"]
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    method = "Regression" if model.config.noise_scale == 0 else "Flow matching"
    gpu = "a GPU and " if settings.get("device") == "cuda" else ""
    kept = settings["vae_from"] or settings["tune"]
    vae = f"VAE as in {kept}" if kept else f"VAE {settings['vae']}"
    seen = "no actions" if not settings["transformer"]["reading_weight"] else "actions too, which are to be read in its latents"
    lines = [
        "# Embedded world model",
        "",
        "Small causal video VAE (4x time, 8x space) and a small CosmosTransformer3DModel, conditioned on start frame and skill",
        f"prompt. {method} (noise_scale {model.config.noise_scale:g}). Trained on video and prompts, {seen}; gripper",
        "widths cut the video into skills, and where the recorder disturbed the expert is known (`intended`).",
        "It knows the scenes of the tasks below; of no use elsewhere.",
        "",
        f"- weights: sha256 `{model.hash}`, float32, parameters {parameters}",
        f"- data: split `{data['split']}`, episodes per task {data['tasks']},",
        f"  {data['perturbed']} of them with random offsets per chunk; {data['skills']} skill clips;",
        f"  {data['discarded']} episodes that the segmenter discards are used with the skills that were active while they ran",
        f"- command: `{card['command']}`",
        f"- settings: {vae}; transformer {settings['transformer']}",
        f"- seconds on {gpu}{settings['threads']} thread(s): {card['seconds']}",
        "",
        f"Held out (split `validation`, {data['validation_episodes']} episodes):",
        "",
        "| metric | value |",
        "|---|---|",
        *[f"| {name} | {value:.4g} |" for name, value in card["metrics"].items()],
        "",
        "`loss_*`, `vae_*`: running means at the end of training, on its own clips.",
        "`error_vs_copy_at_k`: squared latent error k latents ahead, relative to copying the start latent.",
        "`action_r2_*`: actions read from latent 1 by a small probe, unperturbed episodes; `predicted` reads the imagined",
        "latent, which comes from the start frame alone.",
        "`second_skill_*`: squared latent error over the second skill, relative to copying its true first frame; `chained`",
        "starts from the last imagined frame of the first skill, `fresh` from the true frame.",
        "",
    ]
    return "\n".join(lines)
