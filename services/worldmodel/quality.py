"""Quality of world models on held-out clips without a judge: error per step ahead, Frechet distance, drift across skills.

Everything goes through the contract `Backbone`, so the embedded model and a large one are measured by the same code. Every error
is relative to copying the start frame (1: no better than a still image; 0: perfect).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from services.worldmodel.backbones import Backbone, Frames, Latents
from services.worldmodel.windows import cut_windows
from world2act import worldmodel_metrics
from world2act.data.clips import camera_grid, intended, skills_of
from world2act.data.grid import letterbox
from world2act.types import Episode
from world2act.worldmodel_metrics import AHEAD

FEATURES = 32
FEATURE_SIZE = 64
"""Pixels a side of what the encoder sees."""


@dataclass(frozen=True)
class HeldOut:
    """A true clip: frames uint8 (1+M*n, H, W, 3) as the world model's size; prompt of its skill; instruction of its episode;
    foreseeable: latents before a disturbance acted, which no model can foresee."""

    task: str
    prompt: str
    instruction: str
    frames: Frames
    foreseeable: int


@dataclass(frozen=True)
class Imagined:
    """A clip, its true latents, and what was made of its first frame: latents (1+n, C, h, w), frames (1+M*n, H, W, 3)."""

    clip: HeldOut
    asked: str
    true: Latents
    latents: Latents
    frames: Frames


def choose_clips(
    episodes: Sequence[Episode], backbone: Backbone, count: int, seed: int, prompts: str = "", tasks: str = ""
) -> list[HeldOut]:
    """`count` skill clips at random, of prompts and tasks that match the regular expressions. Raises ValueError for none."""
    info, found = backbone.info, []
    for episode in episodes:
        for window in cut_windows(episode, True, info.temporal_compression, info.max_horizon):
            if re.search(prompts, window.prompt) and re.search(tasks, window.task):
                frames = letterbox(window.frames, *info.frame_shape[:2]) if info.letterboxes else window.frames
                chunks = (len(frames) - 1) // info.temporal_compression
                wanted = intended(episode)[window.start :][: chunks * info.temporal_compression].reshape(chunks, -1).all(axis=1)
                found.append(HeldOut(window.task, window.prompt, episode.instruction, frames, int(wanted.cumprod().sum())))
    if not found:
        raise ValueError(f"data: no held-out clip has a prompt like {prompts!r} and a task like {tasks!r}")
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in sorted(order)]


def imagine_clips(
    backbone: Backbone, clips: Sequence[HeldOut], by_instruction: bool, steps: int = 0, guidance: float = 0.0
) -> list[Imagined]:
    """Each clip imagined from its first frame; by_instruction: under the episode's instruction, as Base-WM was trained."""
    out = []
    for number, clip in enumerate(clips):
        horizon = (len(clip.frames) - 1) // backbone.info.temporal_compression
        asked = clip.instruction if by_instruction else clip.prompt
        latents = backbone.imagine(clip.frames[:1], [asked], [number], horizon, steps, guidance)
        out.append(Imagined(clip, asked, backbone.encode(clip.frames[None])[0], latents[0], backbone.decode(latents)[0]))
    return out


def errors(imagined: Sequence[Imagined], compression: int, active_rows: int) -> dict[str, float]:
    """latent_at_k: squared error of latent k against copying latent 0; pixel_at_k: of frame M*k against copying frame 0 (active
    rows); each summed over the clips that reach so far undisturbed. A k that no clip reaches is left out."""
    sums: dict[str, npt.NDArray[np.float64]] = {}

    def add(name: str, predicted: npt.NDArray[np.float32], true: npt.NDArray[np.float32], start: npt.NDArray[np.float32]) -> None:
        pair = (((predicted - true) ** 2).mean(dtype=np.float64), ((start - true) ** 2).mean(dtype=np.float64))
        sums[name] = sums.get(name, np.zeros(2)) + pair

    for clip in imagined:
        frames, true = (f[:, :active_rows].astype(np.float32) for f in (clip.frames, clip.clip.frames))
        for k in AHEAD:
            if k <= clip.clip.foreseeable:
                add(f"latent_at_{k}", clip.latents[k], clip.true[k], clip.true[0])
                add(f"pixel_at_{k}", frames[compression * k], true[compression * k], true[0])
    return {name: float(error / copied) for name, (error, copied) in sums.items() if copied > 0}


# --- Frechet distance ----------------------------------------------------------------------------------------------------


class ClipEncoder(nn.Module):
    """Videos -> FEATURES numbers: convolutions over time and space with fixed random weights, nothing learned.

    So the distance favours no model's own VAE and needs no download; it is not comparable with published FVD, which uses I3D.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = ((3, 16, 4), (16, 32, 2), (32, FEATURES, 2))
        self.layers = nn.ModuleList(nn.Conv3d(a, b, 3, (1, s, s), 1, bias=False) for a, b, s in widths)
        generator = torch.Generator().manual_seed(0)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.get_parameter("weight"), generator=generator)

    @torch.no_grad()
    def forward(self, frames: Frames) -> npt.NDArray[np.float64]:
        """(T, H, W, 3) -> (FEATURES,): the spread over time and space of each feature of frames and of their changes."""
        small = letterbox(frames, FEATURE_SIZE, FEATURE_SIZE)
        x = torch.from_numpy(small).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        x = x - x[:, :, :1]  # what happens, not what stands around
        for layer in self.layers:
            x = nn.functional.leaky_relu(layer(x), 0.1)
        features: npt.NDArray[np.float64] = x[0].double().mean(dim=(1, 2, 3)).numpy()
        return features


def frechet(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Squared Frechet distance of two sets of features (N, F), as normal distributions."""
    difference = a.mean(0) - b.mean(0)
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(difference @ difference + np.trace(first) + np.trace(second) - 2 * cross)


def distances(imagined: Sequence[Imagined]) -> dict[str, float]:
    """frechet: imagined clips against true ones, in units of the distance of copied start frames (1: as far as still images).

    frechet_floor: two halves of the true clips, in the same unit: what the number of clips allows to see. Empty below 4 clips.
    """
    if len(imagined) < 4:
        return {}
    encoder = ClipEncoder()
    true = np.stack([encoder(c.clip.frames) for c in imagined])
    made = np.stack([encoder(c.frames) for c in imagined])
    unit = frechet(true, np.stack([encoder(np.repeat(c.clip.frames[:1], len(c.clip.frames), axis=0)) for c in imagined]))
    return {"frechet": frechet(true, made) / unit, "frechet_floor": frechet(true[::2], true[1::2]) / unit} if unit > 0 else {}


def drift(backbone: Backbone, episodes: Sequence[Episode], by_instruction: bool) -> dict[str, float]:
    """second_skill_fresh, second_skill_chained: see worldmodel_metrics.boundary_drift."""
    pairs = []
    for episode in episodes:
        skills = skills_of(episode)[0]
        if len(skills) >= 2:
            grid = camera_grid(episode)
            frames = letterbox(grid, *backbone.info.frame_shape[:2]) if backbone.info.letterboxes else grid
            prompts = [episode.instruction if by_instruction else skill.prompt for skill in skills[:2]]
            pairs.append((frames, skills[:2], prompts))
    return worldmodel_metrics.boundary_drift(
        TorchModel(backbone), pairs, backbone.info.max_horizon, backbone.info.temporal_compression
    )


class TorchModel:
    """A backbone as the method sees a world model (`world2act.stage1.VideoModel`): tensors in and out."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    @property
    def hash(self) -> str:
        return self.backbone.info.hash

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.backbone.encode(frames.numpy()))

    def imagine(self, start: torch.Tensor, prompts: Sequence[str], horizon: int, seeds: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self.backbone.imagine(start.numpy(), prompts, seeds, horizon, 0, 0.0))

    def denoise_once(self, frames: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self.backbone.denoise_once(frames.numpy(), prompts, seeds))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.backbone.decode(latents.numpy()))
