"""What a diffusion world model is fine-tuned on: skill clips as latents and text embeddings, computed once and kept on disk.

A clip longer than the model's longest is cut into several. Frames stay one an action, so that a latent pairs with a chunk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors.torch import load_file, save_file

from services.worldmodel.backbones import Frames
from services.worldmodel.backbones.diffusion import Condition, DiffusionBackbone
from world2act.console import Progress, no_progress
from world2act.data import robomimic
from world2act.data.clips import camera_grid, skills_of
from world2act.data.formats import Skipped, open_source
from world2act.data.grid import letterbox
from world2act.skillset import episodes_of
from world2act.splits import Split
from world2act.types import Episode

log = structlog.get_logger()
INDEX = "index.json"


@dataclass(frozen=True)
class Window:
    """One clip: frames uint8 (1+M*n, H, W, 3) of the camera grid, from action `start` of its episode on."""

    task: str
    prompt: str
    frames: Frames
    start: int


def read_episodes(data: Path, split: Split, limit: int | None = None) -> Iterator[Episode]:
    """Episodes of <data>/<split>/<task>.hdf5, or of any format that `open_source` knows; at most `limit` a task."""
    counts: dict[str, int] = {}
    found: Iterator[Episode | Skipped]
    if (data / split.value).is_dir():
        found = iter(robomimic.read_root(data, allowed=[split]))
    else:
        found = episodes_of(open_source(data, split=split))
    for episode in found:
        if isinstance(episode, Skipped):
            log.warning("episode skipped", key=episode.key, reason=episode.reason[:200])
            continue
        counts[episode.task] = counts.get(episode.task, 0) + 1
        if limit is None or counts[episode.task] <= limit:
            yield episode


def cut_windows(episode: Episode, segmented: bool, compression: int, horizon: int) -> Iterator[Window]:
    """The skills of an episode (or, not segmented, all of it) in clips of at most `horizon` latents after latent 0."""
    grid = camera_grid(episode)
    for skill in skills_of(episode, segmented)[0]:
        total = (skill.end - skill.start) // compression
        for first in range(0, total, horizon):
            start = skill.start + compression * first
            stop = start + compression * min(horizon, total - first)
            yield Window(episode.task, skill.prompt, grid[start : stop + 1], start)


@dataclass(frozen=True)
class Kept:
    """A clip in the cache: its file, prompt and number of latents."""

    file: str
    task: str
    prompt: str
    latents: int


class Cache:
    """A folder of latents (one file a clip) and text embeddings (one file a prompt); its index is written last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.clips = [Kept(**entry) for entry in json.loads((folder / INDEX).read_text())]
        except (OSError, ValueError, TypeError):
            self.clips = []
        self.lengths: dict[int, list[int]] = {}
        for number, clip in enumerate(self.clips):
            self.lengths.setdefault(clip.latents, []).append(number)

    def clip(self, number: int) -> tuple[torch.Tensor, Condition]:
        """Latents (1, C, K, h, w) float32, and what the model takes from the start frame."""
        found = load_file(self.folder / self.clips[number].file)
        return found.pop("latents").float(), found

    def text(self, prompt: str) -> Condition:
        """Text embeddings of a prompt that was cached."""
        return dict(load_file(self.folder / text_file(prompt)))

    def batch(self, size: int, text_dropout: float, generator: torch.Generator) -> tuple[torch.Tensor, Condition]:
        """Random clips of one length: latents (size, C, K, h, w) and their conditions; prompts are dropped with a chance, so that
        guidance can be used."""
        first = int(torch.randint(len(self.clips), (), generator=generator))
        alike = self.lengths[self.clips[first].latents]
        more = torch.randint(len(alike), (size - 1,), generator=generator).tolist()
        rows = []
        for number in (first, *(alike[i] for i in more)):
            latents, seen = self.clip(number)
            dropped = torch.rand((), generator=generator).item() < text_dropout
            rows.append((latents, {**self.text("" if dropped else self.clips[number].prompt), **seen}))
        return torch.cat([latents for latents, _ in rows]), {k: torch.cat([c[k] for _, c in rows]) for k in rows[0][1]}


def text_file(prompt: str) -> str:
    """The file of a prompt's embeddings."""
    return f"text-{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"


def cache_name(backbone_hash: str, data: Path, split: Split, segmented: bool, limit: int | None, horizon: int) -> str:
    """What a cache's content depends on; data by its files' names, sizes and times."""
    files = sorted(p for p in (data.rglob("*") if data.is_dir() else [data]) if p.is_file())
    seen = [(str(p.relative_to(data)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    asked: Sequence[Any] = [backbone_hash, str(data.resolve()), seen, split.value, segmented, limit, horizon]
    return f"{split.value}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]}"


def fill(
    cache: Path,
    backbone: DiffusionBackbone,
    episodes: Iterator[Episode],
    segmented: bool,
    part: tuple[int, int] = (0, 1),
    progress: Progress = no_progress,
) -> list[Kept]:
    """Encode this process' share of the clips; part: (which, of how many processes). Returns all clips; who is part 0 writes the
    index when every process has returned (`finish`)."""
    cache.mkdir(parents=True, exist_ok=True)
    kept: list[Kept] = []
    info = backbone.info
    prompts = ["", backbone.negative]
    for episode in episodes:
        for window in cut_windows(episode, segmented, info.temporal_compression, info.max_horizon):
            number = len(kept)
            latents = 1 + (len(window.frames) - 1) // info.temporal_compression
            kept.append(Kept(f"{number:06d}.safetensors", window.task, window.prompt, latents))
            prompts.append(window.prompt)
            if number % part[1] == part[0] and not (cache / kept[-1].file).exists():
                frames = letterbox(window.frames, backbone.height, backbone.width)
                values = {"latents": backbone.encode_frames(frames), **backbone.look(frames[0])}
                _save(cache / kept[-1].file, values)
            progress("latents", number + 1, number + 1, {})
    for prompt in sorted(set(prompts)) if part[0] == 0 else []:
        if not (cache / text_file(prompt)).exists():
            backbone.check_text(prompt)
            _save(cache / text_file(prompt), backbone.text(prompt))
    return kept


def finish(cache: Path, kept: list[Kept]) -> None:
    """Write the index, whole or not at all. Raises ValueError for no clips."""
    if not kept:
        raise ValueError("data: no clip is left after segmentation")
    temporary = cache / f".{INDEX}"
    temporary.write_text(json.dumps([vars(k) for k in kept]))
    temporary.replace(cache / INDEX)


def _save(file: Path, tensors: Condition) -> None:
    temporary = file.with_name(f".{file.name}")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(file)
