"""Skill-compositional inference (METHOD section 2): each row's skills one after the other, the last frame of one clip starting
the next. Rows of many requests go to the world model together.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from services.runtime.artifacts import ArtifactStore, content_key
from services.runtime.messages import ImagineRequest
from services.worldmodel.backbones import Frames, Latents
from services.worldmodel.client import MAX_ROWS, Served
from world2act.data.grid import letterbox


class ServedChangedError(Exception):
    """Triton serves other weights than a moment ago: what was begun must be computed again."""


class Generate(Protocol):
    """ImagineClient.imagine, or anything that behaves like it."""

    def __call__(
        self,
        start: Frames,
        prompts: Sequence[str],
        seeds: Sequence[int],
        horizon: int,
        steps: int,
        guidance: float,
        wants: Sequence[str],
    ) -> tuple[dict[str, npt.NDArray[Any]], str, str]: ...


@dataclass(frozen=True)
class Task:
    """A request that was checked: its start frames uint8 (N, H, W, 3), and the key under which its result is cached."""

    request: ImagineRequest
    frames: Frames
    key: str


@dataclass(frozen=True)
class Imagined:
    """embeddings float32 (N, K, D), mask bool (N, K); latents float32 (N, 1+K, C, h, w), videos uint8 (1+M*k, H, W, 3) a row,
    if asked. A row's latents and frames are those of its skills joined; a later skill's latent 0 and first frame repeat the
    end of the skill before and are left out."""

    embeddings: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    latents: Latents | None
    videos: list[Frames]


def row_seed(seed: int, row: int, skill: int) -> int:
    """The seed (0 .. 2^63-1) of a row's skill: every row and skill of a request has its own noise, the same in every run."""
    digest = hashlib.blake2b(f"{seed}/{row}/{skill}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def read_task(request: ImagineRequest, store: ArtifactStore, served: Served, fps: int) -> Task:
    """Check `request` against what is served. Raises ValueError naming the field (ArtifactError for a missing artifact)."""
    try:
        tensors = store.get_tensors(request.starts)
    except SafetensorError as error:
        raise ValueError(f"starts: {request.starts} holds no tensors ({error})") from None
    if "frames" not in tensors:
        raise ValueError(f"starts: {request.starts} has no tensor 'frames', only {', '.join(sorted(tensors))[:200]}")
    frames, expected = tensors["frames"], (len(request.skills), *served.worldmodel.frame_shape)
    if served.worldmodel.letterboxes and frames.ndim == 4 and frames.dtype == np.uint8 and frames.shape[-1] == 3:
        frames = letterbox(frames, *expected[1:3])
    if frames.dtype != np.uint8 or frames.shape != expected:
        raise ValueError(f"starts: frames must be uint8 {expected} (one per row of skills), got {frames.dtype} {frames.shape}")
    limit = served.worldmodel.max_horizon
    for row, skills in enumerate(request.skills):
        if not skills:
            raise ValueError(f"skills[{row}]: must name at least one skill")
        for skill in skills:
            if skill.chunks > limit:
                raise ValueError(f"skills[{row}]: chunks {skill.chunks} is more than the world model's longest horizon, {limit}")
    return Task(request, frames, _key(request, frames, served, fps))


def _key(request: ImagineRequest, frames: Frames, served: Served, fps: int) -> str:
    """What the result depends on, and nothing else (neither the request's id nor the name of the starts' artifact)."""
    return content_key(
        "imagine",
        served.worldmodel.hash,
        served.adapters_hash,
        hashlib.sha256(frames.tobytes()).hexdigest(),
        frames.shape,
        [[(s.prompt, s.chunks) for s in skills] for skills in request.skills],
        request.seed,
        request.steps,
        request.guidance,
        request.latents,
        fps if request.video else None,
    )


@dataclass
class _Row:
    """One row on its way through its skills."""

    task: Task
    index: int
    frame: Frames
    e_v: list[npt.NDArray[np.float32]] = field(default_factory=list)
    latents: list[Latents] = field(default_factory=list)
    frames: list[Frames] = field(default_factory=list)


class _Group(NamedTuple):
    """What the rows of one call share."""

    horizon: int
    steps: int
    guidance: float
    wants: tuple[str, ...]


def _group(row: _Row, skill: int) -> _Group:
    request = row.task.request
    skills = request.skills[row.index]
    wants = ["e_v"]
    if request.latents:
        wants.append("latents")
    if request.video:
        wants.append("frames")
    elif skill + 1 < len(skills):
        wants.append("last_frame")
    return _Group(skills[skill].chunks, request.steps, request.guidance, tuple(wants))


def imagine(tasks: Sequence[Task], generate: Generate, served: Served) -> list[Imagined]:
    """Imagine all rows of all tasks, as many a call as the world model takes. Raises what `generate` raises, and
    ServedChangedError."""
    rows = [_Row(task, i, frame) for task in tasks for i, frame in enumerate(task.frames)]
    skill, rows_a_call = 0, min(MAX_ROWS, served.worldmodel.rows)
    while active := [row for row in rows if skill < len(row.task.request.skills[row.index])]:
        groups: dict[_Group, list[_Row]] = defaultdict(list)
        for row in active:
            groups[_group(row, skill)].append(row)
        for group, members in groups.items():
            for first in range(0, len(members), rows_a_call):
                _generate(group, members[first : first + rows_a_call], skill, generate, served)
        skill += 1
    return [_join(task, [row for row in rows if row.task is task], served) for task in tasks]


def _generate(group: _Group, rows: list[_Row], skill: int, generate: Generate, served: Served) -> None:
    """One call; its outputs are appended to the rows, whose `frame` becomes the next skill's start."""
    outputs, worldmodel_hash, adapters_hash = generate(
        np.stack([row.frame for row in rows]),
        [row.task.request.skills[row.index][skill].prompt for row in rows],
        [row_seed(row.task.request.seed, row.index, skill) for row in rows],
        group.horizon,
        group.steps,
        group.guidance,
        group.wants,
    )
    if (worldmodel_hash, adapters_hash) != (served.worldmodel.hash, served.adapters_hash):
        raise ServedChangedError
    skip = 0 if skill == 0 else 1
    for i, row in enumerate(rows):
        row.e_v.append(outputs["e_v"][i])
        if "latents" in outputs:
            row.latents.append(outputs["latents"][i][skip:])
        if "frames" in outputs:
            row.frames.append(outputs["frames"][i][skip:])
            row.frame = outputs["frames"][i][-1]
        elif "last_frame" in outputs:
            row.frame = outputs["last_frame"][i]


def _join(task: Task, rows: list[_Row], served: Served) -> Imagined:
    """Skills joined per row, rows padded with zeros to the longest."""
    lengths = [sum(len(part) for part in row.e_v) for row in rows]
    K = max(lengths)
    embeddings = np.zeros((len(rows), K, rows[0].e_v[0].shape[-1]), np.float32)
    mask = np.arange(K) < np.array(lengths)[:, None]
    latents = np.zeros((len(rows), 1 + K, *served.worldmodel.latent_shape), np.float32) if task.request.latents else None
    videos = []
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        embeddings[i, :length] = np.concatenate(row.e_v)
        if latents is not None:
            latents[i, : 1 + length] = np.concatenate(row.latents)
        if task.request.video:
            videos.append(np.concatenate(row.frames)[:, : served.worldmodel.active_rows])
    return Imagined(embeddings, mask, latents, videos)
