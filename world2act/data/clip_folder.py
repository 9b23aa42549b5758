"""The authors' skill clips: what their Stage 1 reads, and what segmentation gives it. One mp4 a clip, no actions.

<folder>/videos/<sample>.mp4      the camera grid
<folder>/metadata.csv             columns video (<sample>.mp4 or videos/<sample>.mp4), prompt
<folder>/video_metadata.json      optional: {task: {demo: {aa: {"start", "end"}}}}, frames of the episode, end inclusive

Samples are named in one of two ways:
    RoboCasa  <task>_mg_demo_<id>_aa_<index>        aa: number of the atomic action, from 0
    LIBERO    demo_<id>-<task>-<prompt>-order<n>    words of the task and of the prompt joined by "_"

A clip becomes an `Episode` of its own: its prompt is the instruction, Episode.index the demonstration it was cut from; actions
and states have no columns and widths are NaN, for there are none. meta: aa or order, and start and end where they are told.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from world2act.data.formats import FormatError, Source, inside
from world2act.data.video import VideoWriter, read_video, video_frames
from world2act.types import Episode, ImageArray, Skill

ROBOCASA = re.compile(r"(?P<task>.+)_mg_demo_(?P<demo>\d+)_aa_(?P<aa>\d+)")
LIBERO = re.compile(r"demo_(?P<demo>\d+)-(?P<task>[^-]+)-(?P<prompt>.+)-order(?P<order>\d+)")
Names = Literal["robocasa", "libero"]
MAX_NAME = 240
"""Characters in a file's name; most file systems take 255 bytes."""


class ClipFolderSource(Source):
    """See the module. Keys are the samples' names."""

    name = "clips"
    signs = "folder with metadata.csv and videos/"

    @classmethod
    def detect(cls, path: Path) -> bool:
        return (path / "metadata.csv").is_file() and (path / "videos").is_dir()

    def keys(self) -> Iterator[str]:
        return iter(self.prompts)

    @cached_property
    def prompts(self) -> dict[str, str]:
        """Sample -> prompt, in the order of metadata.csv. Some hundred bytes a clip."""
        found: dict[str, str] = {}
        try:
            with (self.path / "metadata.csv").open(newline="", encoding="utf-8") as lines:
                reader = csv.DictReader(lines)
                if not {"video", "prompt"} <= set(reader.fieldnames or ()):
                    raise FormatError(f"{self.path.name}: metadata.csv: needs the columns video and prompt")
                for row in reader:
                    found[(row["video"] or "").removeprefix("videos/").removesuffix(".mp4")] = (row["prompt"] or "").strip()
        except (OSError, csv.Error, UnicodeDecodeError) as error:
            raise FormatError(f"{self.path.name}: metadata.csv: is not readable ({type(error).__name__})") from None
        return found

    @cached_property
    def spans(self) -> dict[str, Any]:
        """video_metadata.json, or nothing."""
        file = self.path / "video_metadata.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (ValueError, TypeError):
            raise FormatError(f"{self.path.name}: video_metadata.json: is not a JSON object") from None

    def _read(self, key: str, images: bool) -> Episode:
        match = ROBOCASA.fullmatch(key) or LIBERO.fullmatch(key)
        if match is None:
            raise FormatError(f"{key}: is named neither <task>_mg_demo_<id>_aa_<n> nor demo_<id>-<task>-<prompt>-order<n>")
        if not self.prompts[key]:
            raise FormatError(f"{key}: metadata.csv has no prompt for it")
        video = inside(self.path / "videos", f"{key}.mp4", "metadata.csv: video")
        fps, frames = video_frames(video)
        if frames < 2:
            raise FormatError(f"{key}: has {frames} frames, 2 at least are needed")
        parts = match.groupdict()
        demo, number = parts["demo"], parts.get("aa") or parts["order"]
        try:
            span = self.spans.get(parts["task"], {}).get(demo, {}).get(number, {})
            told = {name: str(int(span[name])) for name in ("start", "end") if name in span}
        except (AttributeError, TypeError, ValueError, ArithmeticError):
            raise FormatError(f"{key}: video_metadata.json: must be {{task: {{demo: {{number: {{start, end}}}}}}}}") from None
        return Episode(
            task=parts["task"],
            split=str(self.split),
            index=int(demo),
            instruction=self.prompts[key],
            images={"grid": read_video(video, frames)} if images else {},
            states=np.zeros((frames, 0), np.float32),
            widths=np.full(frames, np.nan, np.float32),
            actions=np.zeros((frames - 1, 0), np.float32),
            success=True,
            meta={"fps": f"{fps:g}", "order": number, **told},
        )


class ClipFolderWriter:
    """Writes skills as clips in the authors' layout, episode by episode.

    Everything goes to <out>.partial, which takes the final name on a clean exit of the `with` block; after an exception it stays
    for `resume=True`. What is whole is in its journal, so that a killed process leaves no half episode.
    """

    def __init__(self, out: Path, *, names: Names, fps: int, resume: bool = False) -> None:
        self.out = Path(out)
        self.names = names
        self.fps = fps
        self._folder = self.out.with_name(self.out.name + ".partial")
        self._journal = self._folder / "journal.jsonl"
        if self.out.exists():
            raise FileExistsError(f"out: {self.out.name} exists already")
        if not resume and self._folder.exists():
            raise FileExistsError(f"out: {self._folder.name} is left from an earlier run; resume it or remove it")
        (self._folder / "videos").mkdir(parents=True, exist_ok=True)
        if self._journal.exists():  # its last line may have been cut short by a kill
            whole = self._journal.read_bytes()
            self._journal.write_bytes(whole[: whole.rfind(b"\n") + 1])
        self.written = {str(line["key"]) for line in self._lines()}
        """Keys of the episodes that are there."""

    def write(self, key: str, episode: Episode, skills: Sequence[Skill], grid: ImageArray) -> None:
        """The skills of one episode; grid: its frames, uint8 (T+1, H, W, 3). Raises ValueError for a skill out of its bounds."""
        self.add(key, write_clips(self.videos, self.names, self.fps, episode, skills, grid))

    @property
    def videos(self) -> Path:
        """Where the clips of `write_clips` belong until `close`."""
        return self._folder / "videos"

    def add(self, key: str, clips: Sequence[dict[str, Any]]) -> None:
        """Take over the clips of one episode, which `write_clips` wrote, here or in another process."""
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps({"key": key, "clips": clips}) + "\n")
        self.written.add(key)

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self._journal.exists():
            with self._journal.open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)

    def close(self) -> None:
        """Write metadata.csv and video_metadata.json from the journal, and give the folder its name."""
        spans: dict[str, Any] = {}
        with (self._folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["video", "prompt"])
            for line in self._lines():
                for clip in line["clips"]:
                    table.writerow([f"{clip['sample']}.mp4", clip["prompt"]])
                    demo = spans.setdefault(clip["task"], {}).setdefault(clip["demo"], {})
                    demo[clip["number"]] = {"start": clip["start"], "end": clip["end"]}
        (self._folder / "video_metadata.json").write_text(json.dumps(spans), encoding="utf-8")
        self._journal.unlink(missing_ok=True)
        self._folder.replace(self.out)

    def __enter__(self) -> ClipFolderWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()


def write_clips(
    videos: Path, names: Names, fps: int, episode: Episode, skills: Sequence[Skill], grid: ImageArray
) -> list[dict[str, Any]]:
    """Write the skills of one episode as mp4 files into the folder `videos`; what `ClipFolderWriter.add` takes.

    grid: the episode's frames, uint8 (T+1, H, W, 3). Raises ValueError for a skill out of its bounds, before anything is written.
    """
    clips = [_clip(names, episode, number, skill, len(grid)) for number, skill in enumerate(skills)]
    for clip in clips:
        final = videos / f"{clip['sample']}.mp4"
        partial = final.with_suffix(".partial")
        with VideoWriter(partial, fps, (grid.shape[1], grid.shape[2])) as video:
            video.write(grid[clip["start"] : clip["end"] + 1])
        partial.replace(final)
    return clips


def _clip(names: Names, episode: Episode, number: int, skill: Skill, frames: int) -> dict[str, Any]:
    if not 0 <= skill.start < skill.end < frames:
        raise ValueError(f"skills: {skill.start} to {skill.end} is not within the episode's {frames} frames")
    task = _words(episode.task)
    if names == "robocasa":
        sample = f"{task}_mg_demo_{episode.index}_aa_{number}"
    else:
        sample = f"demo_{episode.index}-{task}-{_words(skill.prompt)}-order{number}"
    if len(sample) > MAX_NAME:
        raise ValueError(f"skills: the clip's name has {len(sample)} characters, the limit is {MAX_NAME}")
    place = {"task": task, "demo": str(episode.index), "number": str(number)}
    return {"sample": sample, "prompt": skill.prompt, "start": skill.start, "end": skill.end, **place}


def _words(text: str) -> str:
    """Text as part of a file's name: words joined by "_"; nothing that separates paths or the parts of a name."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_.") or "unnamed"
