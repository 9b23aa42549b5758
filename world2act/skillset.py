"""Demonstrations of any origin cut into a data set of skills, one episode at a time (METHOD: paper section 3, points 1 to 4).

`survey` looks at a source once and says how all of its episodes are cut; `cut` does one episode, and is what a worker process
runs. What it returns is JSON and enough for every statistic: nothing of an episode needs to be read again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from world2act.data.clip_folder import Names, write_clips
from world2act.data.formats import FormatError, Skipped, Source, no_widths
from world2act.data.grid import stitch
from world2act.segmentation.alignment import Aligner
from world2act.segmentation.comparison import compare
from world2act.segmentation.events import GripperCalibration, calibrated
from world2act.segmentation.planner import Planner
from world2act.segmentation.schemas import load_schemas
from world2act.segmentation.segment import Segmentation, default_planner, hand_of, segment_episode, segment_film
from world2act.segmentation.visual import pixel_features
from world2act.types import Episode, ImageArray

Cue = Literal["gripper", "visual"]
Record = dict[str, Any]
Model = tuple[Planner, Aligner]

CELLS = {"primary": 0, "wrist": 1, "left": 0, "right": 1}
"""Places in the grid (paper supplement E): LIBERO primary, wrist; RoboCasa left, right, wrist."""

CALIBRATION_EPISODES = 16
"""The hand's fully-open width is the median over the first so many."""


@dataclass(frozen=True)
class Recipe:
    """How the episodes of a source are cut.

    embodiment, calibration: of the gripper; None where the source has no widths. cells: camera -> place in the grid.
    fps: the source's, whole. names: how the authors name clips of such data.
    """

    embodiment: str | None
    calibration: GripperCalibration | None
    cells: Mapping[str, int]
    fps: int
    names: Names


def survey(source: Source, embodiment: str | None = None) -> Recipe:
    """Looks at the first episodes that can be read. embodiment: a calibration's name, by default what the source's robot has.

    Raises FormatError if none can be read, ValueError naming `embodiment` for a hand that is not known.
    """
    why = ""
    for episode in source.episodes(images=False):
        if isinstance(episode, Episode):
            break
        why = why or f"; {episode.reason}"
    else:
        raise FormatError(f"{source.path.name}: holds no readable episode{why}")
    shown = next((e for e in source.episodes() if isinstance(e, Episode)), None)
    if shown is None:
        raise FormatError(f"{source.path.name}: holds no episode whose images can be read")
    names: Names = "robocasa" if source.robot in ("robocasa", "PandaOmron") else "libero"
    hand, calibration = hand_of_source(source, embodiment) or (None, None)
    return Recipe(hand, calibration, grid_cells(list(shown.images)), max(1, round(source.fps)), names)


def hand_of_source(source: Source, embodiment: str | None = None) -> tuple[str, GripperCalibration] | None:
    """Name and calibration of the hand that made all of a source's episodes; None where the first of them have no widths.

    embodiment: a calibration's name, by default what the source's robot has. The hand opens as wide as the file says, or else as
    the first episodes show (`calibrated`). Raises ValueError naming `embodiment` for a hand that is not known.
    """
    readable = islice((e for e in source.episodes(images=False) if isinstance(e, Episode)), CALIBRATION_EPISODES)
    seen = [e for e in readable if not no_widths(e)]
    if not seen:
        return None
    table, robot = load_schemas(), embodiment or source.robot
    hand = table.hand(robot)
    if hand is None:
        known = ", ".join(table.calibrations)
        raise ValueError(f"embodiment: the hand of {robot[:40]!r} is not known; name the one to use ({known})")
    told = "gripper_open_width" in json.loads(seen[0].meta.get("env_args", "{}"))
    return hand, hand_of(seen[0], hand) if told else calibrated(table.calibration(hand), (e.widths for e in seen))


def episodes_of(source: Source) -> Iterator[Episode | Skipped]:
    """`source.episodes()`, whose meta says how wide the source's hand opens (`hand_of`). Of an unknown robot, as they are."""
    found = hand_of_source(source) if load_schemas().hand(source.robot) else None
    for episode in source.episodes():
        if found is None or isinstance(episode, Skipped):
            yield episode
            continue
        about = {**json.loads(episode.meta.get("env_args", "{}")), "gripper_open_width": found[1].open_width_m}
        yield replace(episode, meta={**episode.meta, "env_args": json.dumps(about)})


def grid_cells(cameras: Sequence[str]) -> dict[str, int]:
    """Camera -> place in the 2x2 grid. Cameras that it does not know come in their own order. ValueError for more than four."""
    if len(cameras) > 4:
        raise ValueError(f"cameras: there are {len(cameras)} ({', '.join(cameras)}), the grid has 4 places")
    if {"left", "right"} <= set(cameras):
        return {**{c: i for i, c in enumerate(sorted(set(cameras) - {"left", "right"}), start=2)}, "left": 0, "right": 1}
    known = sorted(cameras, key=lambda c: CELLS.get(c, 4))
    return {camera: place for place, camera in enumerate(known)}


def cut(
    source: Source,
    key: str,
    recipe: Recipe,
    *,
    number: int = 0,
    cue: Cue = "gripper",
    images: bool = True,
    videos: Path | None = None,
    tolerances: Sequence[int] = (),
    model: Model | None = None,
    by_model: bool = False,
) -> Record:
    """One episode: {"key", "skipped": why} for one that cannot be read or used, else {"key", "task", "index", "instruction",
    "understood", "cues": names of the contact cues beside widths, "segmentation": Segmentation.to_json(), "clips": what
    ClipFolderWriter.add takes, "scores": method -> Score.to_json()}.

    number: what its clips call the demonstration; each key's own, for files of one task or of several splits count alike.
    cue: "visual" cuts an episode without gripper widths where its film changes; "gripper" discards it. images: whether one whose
    images cannot be read is skipped, even if nothing here needs them. videos: where clips are written, or None.
    tolerances: frames at which boundaries are scored where the truth is known; none: nothing is scored.
    model: a planner and an aligner to be scored, and with `by_model` to cut by; the rules are the default.
    Raises what the model raises, LeakageError, and OSError where clips cannot be written.
    """
    try:
        episode = source.read(key, images=images or cue == "visual" or videos is not None or bool(tolerances))
    except FormatError as error:
        return {"key": key, "skipped": str(error)}
    planner, aligner = model if model is not None and by_model else (None, None)
    try:
        found = _segment(episode, recipe, cue, planner, aligner)
        segmentation = replace(found, task=episode.task)
        clips = []
        if videos is not None and segmentation.skills:
            grid = stitch(episode.images, recipe.cells)
            clips = write_clips(videos, recipe.names, recipe.fps, replace(episode, index=number), segmentation.skills, grid)
        scores = compare(episode, recipe.calibration, tolerances, model) if tolerances else {}
    except ValueError as error:
        return {"key": key, "skipped": f"{key}: {error}"}
    head = {"key": key, "task": episode.task, "index": episode.index, "instruction": episode.instruction}
    scored = {method: score.to_json() for method, score in scores.items()}
    head |= {"understood": understood(found.task, episode.instruction), "cues": sorted(episode.cues)}
    return {**head, "segmentation": segmentation.to_json(), "clips": clips, "scores": scored}


def understood(task: str | None, instruction: str) -> bool:
    """Whether rows of schemas.json know what was cut: `task` is the row that its plan names, or they know all verb phrases."""
    return task is not None or bool(default_planner().understand(instruction).task)


def _segment(episode: Episode, recipe: Recipe, cue: Cue, planner: Planner | None, aligner: Aligner | None) -> Segmentation:
    if recipe.calibration is not None and not no_widths(episode):
        return segment_episode(episode, calibration=recipe.calibration, planner=planner, aligner=aligner)
    if cue == "visual":
        # The instruction alone: the task of a clip is that of the episode it was cut from.
        return segment_film(pixel_features(view(episode)), episode.instruction, planner=planner)
    reason = (
        "no gripper signal: the source has no widths; say which columns of a LeRobot state they are (--gripper), "
        "or cut by the film (--cue visual)"
    )
    return Segmentation((), reason, (), (), length=len(episode.actions))


def view(episode: Episode) -> ImageArray:
    """The camera that shows most of the scene: the first of the grid."""
    return episode.images[min(grid_cells(list(episode.images)).items(), key=lambda item: item[1])[0]]


def moments(source: Source, key: str, start: int, end: int) -> ImageArray:
    """First, middle and last frame of a skill of episode `key`, actions start .. end-1: uint8 (3, H, W, 3). Raises as `read`."""
    return view(source.read(key))[[start, (start + end) // 2, end]]
