"""Skill clips: demonstrations cut by the segmenter, as whole clips (`cut_clips`) and as cached latents (`LatentBank`).

The bank holds the latent of *every* window of five frames, not only of windows at chunk starts. A clip may then begin at any
frame s of a skill without encoding anything again: latent 0 is `still[s]`, latent k >= 1 is `moving[s + M(k-1)]`, which
pairs with the action chunk `chunks[s + M(k-1)]` (METHOD: paper section 3, chunk alignment). What reaches beyond
the skill's end is masked out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from world2act import splits
from world2act.console import Progress, no_progress
from world2act.data import robomimic
from world2act.data.grid import stitch
from world2act.models.vae import VideoVAE, to_float
from world2act.segmentation import OnlineSkill, RuleBasedPlanner, Segmentation, hand_of, segment_episode
from world2act.splits import Split
from world2act.types import BoolArray, Clip, Episode, FloatArray, ImageArray, M, Skill

CELLS = ({"primary": 0, "wrist": 1}, {"left": 0, "right": 1, "wrist": 2}, {"primary": 0})
"""Camera -> place in the grid (paper supplement E): Meta-World and LIBERO, RoboCasa, one camera alone."""


def camera_grid(episode: Episode, cells: dict[str, int] | None = None) -> ImageArray:
    """An episode's cameras as one grid, uint8 (T+1, H, W, 3); `cells` defaults to those of CELLS with the episode's cameras.

    An episode of the authors' clips is a grid already. Raises ValueError for other cameras.
    """
    if set(episode.images) == {"grid"}:
        return episode.images["grid"]
    known = next((c for c in CELLS if set(c) == set(episode.images)), CELLS[0])
    return stitch(episode.images, cells or known)


def camera_every(episode: Episode) -> int:
    """After how many actions its cameras show a new frame. Those between repeat it: no clip and no sample begins at one."""
    return int(json.loads(episode.meta.get("env_args", "{}")).get("camera_every", 1))


def skills_of(episode: Episode, segmented: bool = True) -> tuple[tuple[Skill, ...], bool]:
    """The skills of an episode, and whether the segmenter discarded it (they are then as it lived them, and may be none).

    `segmented` false: one clip with the instruction as the prompt, the data of Base-WM (METHOD section 2). A clip of the authors'
    folders is one skill. What a robot did itself (split posttrain) has the skills that it was given.
    """
    if not segmented or set(episode.images) == {"grid"}:
        return (Skill(episode.instruction, 0, len(episode.actions), "not segmented"),), False
    if episode.split == Split.POSTTRAIN:
        return lived_skills(episode), False
    found = segment_episode(episode).skills
    return (found, False) if found else (lived_skills(episode), True)


def lived_skills(episode: Episode) -> tuple[Skill, ...]:
    """The skills that a running policy would have been given, chunk by chunk (`OnlineSkill`), equal neighbours joined.

    For episodes that the segmenter discards because a step is missing: a missed grasp and what follows it is just what a world
    model must have seen to be asked about it in closed loop.
    """
    online = OnlineSkill(RuleBasedPlanner().plan(episode.instruction, episode.task), hand_of(episode))
    prompts = [online.update(episode.widths[max(0, t - M + 1) : t + 1]) for t in range(0, len(episode.actions) - M + 1, M)]
    skills: list[Skill] = []
    for number, prompt in enumerate(prompts):
        if skills and skills[-1].prompt == prompt:
            skills[-1] = replace(skills[-1], end=M * (number + 1))
        else:
            skills.append(Skill(prompt, M * number, M * (number + 1), "as seen while it ran"))
    return tuple(skills)


def cut_clips(episode: Episode, segmentation: Segmentation | None = None, phases: Sequence[int] = (0,)) -> list[Clip]:
    """An episode's skills as clips of whole chunks; where the segmenter discards it, the skills as it lived them.

    Each skill is cut once per phase, beginning that many frames later: chunks at other phases are other pairs. A phase at which a
    slow camera repeats its frame is left out: what is seen there is older than what is done.
    """
    skills = (segmentation.skills or lived_skills(episode)) if segmentation else skills_of(episode)[0]
    grid = camera_grid(episode)
    every = camera_every(episode)
    shifted = [replace(skill, start=skill.start + phase) for phase in phases for skill in skills]
    return [_clip(episode, grid, s) for s in shifted if s.end - s.start >= M and s.start % every == 0]


def intended(episode: Episode) -> BoolArray:
    """Per action, bool (T,): what the demonstrator wanted, not what a disturbance made of it."""
    return np.ones(len(episode.actions), np.bool_) if episode.intended is None else episode.intended


def _clip(episode: Episode, grid: ImageArray, skill: Skill) -> Clip:
    chunks = (skill.end - skill.start) // M
    stop = skill.start + M * chunks
    actions = episode.actions[skill.start : stop].reshape(chunks, M, -1)
    frames = grid[skill.start : stop + 1]
    wanted = intended(episode)[skill.start : stop].reshape(chunks, M).all(axis=1)
    return Clip(episode.task, skill.prompt, frames, actions, wanted, episode.split, episode.index)


@dataclass(frozen=True)
class CutEpisode:
    """One demonstration and its skills. frames: uint8 (T+1, rows, W, 3), the active rows of the camera grid, of which every
    `every`-th is new; weight: how many times it counts where training draws."""

    task: str
    split: str
    index: int
    perturbed: bool
    frames: ImageArray
    actions: FloatArray
    intended: BoolArray
    skills: tuple[Skill, ...]
    every: int = 1
    weight: int = 1


@dataclass(frozen=True)
class Cut:
    """Episodes, and how many of them the segmenter discarded (their skills are as they lived them)."""

    episodes: list[CutEpisode]
    discarded: int


def read_cut(
    root: Path,
    allowed: Collection[Split],
    rows: int,
    tasks: Collection[str] | None = None,
    limit: int | None = None,
    segmented: bool = True,
) -> Cut:
    """Read and segment demonstrations under `root` (<root>/<split>/<task>.hdf5), at most `limit` a task.

    `segmented` false leaves each episode one clip with its instruction as the prompt: the data of Base-WM (METHOD section 2).
    Raises LeakageError for a split that is not allowed, robomimic.FormatError for files that are not readable.
    """
    episodes: list[CutEpisode] = []
    counts: dict[str, int] = {}
    discarded = 0
    for episode in robomimic.read_root(root, allowed=allowed, tasks=tasks):
        splits.require([episode.split], allowed, "clips")
        counts[episode.task] = counts.get(episode.task, 0) + 1
        if limit is not None and counts[episode.task] > limit:
            continue
        skills, rejected = skills_of(episode, segmented)
        discarded += rejected
        if not skills:
            continue  # shorter than a chunk
        perturbed = episode.meta.get("perturbed") == "true"
        frames = np.ascontiguousarray(camera_grid(episode)[:, :rows])
        seen, done, wanted, every = frames, episode.actions, intended(episode), camera_every(episode)
        episodes.append(CutEpisode(episode.task, episode.split, episode.index, perturbed, seen, done, wanted, skills, every))
    return Cut(episodes, discarded)


@dataclass(frozen=True)
class Batch:
    """Clips that begin anywhere in a skill. start (B, C, h, w); target (B, n, C, h, w), latents 1 .. n; mask bool (B, n);
    chunks (B, n, M, A), target k-1 shows the result of chunk k-1; prompts, one a row."""

    start: torch.Tensor
    target: torch.Tensor
    mask: torch.Tensor
    chunks: torch.Tensor
    prompts: list[str]

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        start, target, mask, chunks = (x.to(device) for x in (self.start, self.target, self.mask, self.chunks))
        return Batch(start, target, mask, chunks, self.prompts)


class LatentBank:
    """Latents of all episodes end to end, N frames in all (float16: half the memory, an error of 0.0005 of the spread).

    still (N, C, h, w): frame t alone. moving (N, C, h, w): frames t .. t+M. ends (N,): the frame at which the skill active at t
    ends. chunks (N, M, A): the actions from t on. wanted (N,): whether all of them are intended: what a disturbance did is seen
    as a state to start from, never as something to predict. starts: the frames from which a whole, wanted chunk fits, each
    as often as its episode weighs.
    """

    def __init__(self, vae: VideoVAE, episodes: Sequence[CutEpisode], stride: int = 1, progress: Progress = no_progress) -> None:
        if not episodes:
            raise ValueError("episodes: none is left after segmentation")
        self.stride = stride
        sizes = [len(e.frames) for e in episodes]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        total = int(self.offsets[-1])
        self.still = torch.zeros((total, *vae.config.latent_shape), dtype=torch.float16)
        self.moving = torch.zeros_like(self.still)
        self.chunks = torch.zeros((total, M, episodes[0].actions.shape[1]))
        self.ends = torch.zeros(total, dtype=torch.int64)
        self.perturbed = torch.zeros(total, dtype=torch.bool)
        self.wanted = torch.zeros(total, dtype=torch.bool)
        self.tasks = [e.task for e in episodes for _ in e.frames]
        self.prompts = [""] * total
        allowed = torch.zeros(total, dtype=torch.bool)
        for number, (episode, offset) in enumerate(zip(episodes, self.offsets, strict=False)):
            self._label(episode, int(offset), allowed)
            self._encode(vae, episode, int(offset))
            progress("latents", number + 1, len(episodes), {})
        weights = torch.tensor([e.weight for e in episodes]).repeat_interleave(torch.tensor(sizes))
        starts = (allowed & self.wanted).nonzero()[:, 0]
        self.starts = starts.repeat_interleave(weights[starts])

    def _label(self, episode: CutEpisode, offset: int, allowed: torch.Tensor) -> None:
        for skill in episode.skills:
            span = slice(offset + skill.start, offset + skill.end)
            self.ends[span] = offset + skill.end
            self.prompts[span] = [skill.prompt] * (skill.end - skill.start)
            allowed[offset + skill.start : offset + skill.end - M + 1 : math.lcm(self.stride, episode.every)] = True
        self.perturbed[offset : offset + len(episode.frames)] = episode.perturbed
        actions = torch.from_numpy(episode.actions)
        if len(actions) >= M:
            self.chunks[offset : offset + len(actions) - M + 1] = actions.unfold(0, M, 1).transpose(1, 2)
            windows = torch.from_numpy(episode.intended).unfold(0, M, 1)
            self.wanted[offset : offset + len(windows)] = windows.all(dim=1)

    @torch.no_grad()
    def _encode(self, vae: VideoVAE, episode: CutEpisode, offset: int) -> None:
        frames = torch.from_numpy(episode.frames)
        at = torch.arange(0, len(frames), math.lcm(self.stride, episode.every))
        alone = frames[at][:, None].expand(-1, M + 1, -1, -1, -1)
        self.still[offset + at] = vae.normalise(vae.moments(to_float(alone))[0]).half().cpu()
        at = at[at + M < len(frames)]
        seen = frames[at[:, None] + torch.arange(M + 1)]
        self.moving[offset + at] = vae.normalise(vae.moments(to_float(seen))[0]).half().cpu()

    @torch.no_grad()
    def name(self, read: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put what `read` makes of `moving`, (n, 1, C, h, w) -> (n, 1, M, A), in the place of the recorded actions."""
        for at in torch.split(self.wanted.nonzero()[:, 0], 1024):
            self.chunks[at] = read(self.moving[at, None].float())[:, 0]

    def batch(self, starts: torch.Tensor, horizon: int) -> Batch:
        """Clips from `starts` (B,), frame numbers out of `self.starts`, `horizon` latents ahead."""
        at = starts[:, None] + M * torch.arange(horizon)
        mask = at + M <= self.ends[starts][:, None]
        safe = at.clamp(max=len(self.still) - 1)
        mask = (mask & self.wanted[safe]).cumprod(dim=1).bool()  # after a disturbance the clip is another one
        target = self.moving[safe].float() * mask[..., None, None, None]
        chunks = self.chunks[safe] * mask[..., None, None]
        return Batch(self.still[starts].float(), target, mask, chunks, [self.prompts[int(s)] for s in starts])


def median_first_frames(episodes: Sequence[CutEpisode]) -> dict[str, ImageArray]:
    """Task -> the median of its first frames, uint8 (rows, W, 3): what does not differ between scenes."""
    first: dict[str, list[ImageArray]] = {}
    for episode in episodes:
        first.setdefault(episode.task, []).append(episode.frames[0])
    return {task: np.median(np.stack(frames), axis=0).astype(np.uint8) for task, frames in first.items()}
