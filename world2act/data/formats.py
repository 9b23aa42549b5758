"""Demonstrations of any origin through one interface: `open_source(path)` finds the format, a `Source` reads its episodes.

A new format is one file with a `Source` and one line in `FORMATS`; tests/conformance/test_data_formats.py holds what any must
satisfy. Whatever a file's own conventions are, an `Episode` has ours: images upright, frame t seen before action t and frame
T after the last one, gripper widths in metres, gripper action -1 open and +1 close.

Most formats store N observations with N actions, so one action has a frame on one side only: the last (RoboCasa, LeRobot:
seen, then done) or the first (LIBERO: done, then seen). It is left out; no frame is made up. Such an episode has N frames and
N - 1 actions.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from world2act import splits
from world2act.splits import LeakageError, Split
from world2act.types import Episode

FORMATS: dict[str, str] = {
    "world2act": "world2act.data.robomimic:RobomimicSource",
    "libero": "world2act.data.libero:LiberoSource",
    "robocasa": "world2act.data.robocasa:RobocasaSource",
    "lerobot": "world2act.data.lerobot:LeRobotSource",
    "clips": "world2act.data.clip_folder:ClipFolderSource",
}
"""Format name -> 'module:class', imported on use. Asked in this order whether they know a path."""

MAX_WIDTH = 0.5
"""Metres. A wider gripper means that the file's widths are in another unit, most likely millimetres."""
MAX_FPS = 1000


class FormatError(ValueError):
    """A file or episode that is not what it claims to be; the message names the file, the item and what was expected."""


@dataclass(frozen=True)
class Skipped:
    """An episode that could not be read: which, and why. The others are not affected."""

    source: str
    key: str
    reason: str


class Source(ABC):
    """Demonstrations of one format at one path, a file or a folder. Holds no open file: it can be sent to another process.

    Raises FormatError (in the constructor) where the path as a whole is unreadable.
    """

    name: ClassVar[str]
    """The format's name in FORMATS."""
    signs: ClassVar[str]
    """What `detect` looks for, as said to a person whose path nothing recognises."""
    own_split: ClassVar[bool] = False
    """Whether the data says its split. Foreign data does not: the caller says what it may be used for."""

    def __init__(self, path: Path, split: Split | None = None) -> None:
        self.path = Path(path)
        self.split = split
        if split is None and not self.own_split:
            raise ValueError(f"split: {self.name} data has none of its own; say what it may be used for ({', '.join(Split)})")

    @classmethod
    @abstractmethod
    def detect(cls, path: Path) -> bool:
        """Whether `path` is of this format, by what cannot be missing from it. Reads little. Raises FormatError where all that it
        could look at is damaged."""

    @abstractmethod
    def keys(self) -> Iterator[str]:
        """A key for each episode, always in the same order, damaged ones included. Reads no episode."""

    @abstractmethod
    def _read(self, key: str, images: bool) -> Episode:
        """The episode at `key`, which is one of `keys()`."""

    @property
    def robot(self) -> str:
        """The robot, or the simulator where that says it, in the data's words; the format's name where the data says nothing."""
        return self.name

    @cached_property
    def fps(self) -> float:
        """Frames a second: that of the first episode that can be read. A world model's frames have one distance in time."""
        for key in self.keys():
            try:
                return float(self._checked(key, images=False).meta["fps"])
            except FormatError:
                continue
        raise FormatError(f"{self.path.name}: holds no readable episode")

    def read(self, key: str, *, images: bool = True) -> Episode:
        """One episode, checked; without `images` none is decoded and `episode.images` is empty.

        `meta` has format, source, key, robot, fps, and what the columns of `states` and `actions` are.
        Raises FormatError, naming the item, for whatever is wrong with it.
        """
        episode = self._checked(key, images)
        if float(episode.meta["fps"]) != self.fps:
            raise FormatError(
                f"{key}: fps: {episode.meta['fps']}, but the source's first episode has {self.fps:g}; read them apart"
            )
        return episode

    def episodes(self, *, start: str | None = None, images: bool = True) -> Iterator[Episode | Skipped]:
        """All episodes from key `start` (default: the first), one in memory at a time; a `Skipped` in place of a bad one.

        Raises ValueError if `start` is no key of this source.
        """
        found = start is None
        for key in self.keys():
            found = found or key == start
            if found:
                try:
                    yield self.read(key, images=images)
                except FormatError as error:
                    yield Skipped(self.path.name, key, str(error))
        if not found:
            raise ValueError(f"start: {str(start)[:80]!r} is no episode of {self.path.name}")

    def _checked(self, key: str, images: bool) -> Episode:
        try:
            episode = self._read(key, images)
            check_fps(float(episode.meta["fps"]), "fps")
            check_episode(replace(episode, widths=np.nan_to_num(episode.widths)) if no_widths(episode) else episode)
        except LeakageError:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            if isinstance(error, FormatError) and key.partition(":")[0] in str(error):
                raise
            raise FormatError(f"{key}: {error}") from error
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # as of a null in a number's place
            raise FormatError(f"{key}: its metadata is malformed ({type(error).__name__}: {error})") from error
        common = {"format": self.name, "source": self.path.name, "key": key, "robot": self.robot}
        return replace(episode, meta={**episode.meta, **common})


def open_source(path: Path | str, *, split: Split | None = None, format: str | None = None, **options: Any) -> Source:
    """The source at `path`. split: what foreign data may be used for; our own files carry theirs, which must then agree.

    options: the format's own (`LeRobotSource`: gripper, mirrored). Raises FormatError as `find_format`; ValueError if a split is
    needed, or for an option that the format does not have.
    """
    kind = find_format(Path(path), format)
    if wrong := options.keys() - inspect.signature(kind).parameters.keys():
        raise ValueError(f"{min(wrong)}: {kind.name} data has no such option")
    return kind(Path(path), split, **options)


def find_format(path: Path, format: str | None = None) -> type[Source]:
    """The kind of source at `path`. Raises FormatError if there is nothing, if all there is is damaged, if no format fits, or if
    `format` is unknown.
    """
    if not path.exists():
        raise FormatError(f"{path.name}: no such file or folder")
    if format is not None and format not in FORMATS:
        raise FormatError(f"format: {format[:40]!r} is unknown; choose one of {', '.join(FORMATS)}")
    known: list[str] = []
    damaged: FormatError | None = None
    for name in [format] if format else FORMATS:
        module, attribute = FORMATS[name].split(":")
        try:
            kind: type[Source] = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            known.append(f"{name} (not readable here: {error.name} is missing, pip install 'world2act[data]')")
            continue
        try:
            if format or kind.detect(path):
                return kind
        except FormatError as error:
            damaged = damaged or error
        known.append(f"{name} ({kind.signs})")
    if damaged is not None:
        raise damaged
    raise FormatError(f"{path.name}: no known format fits. Known: {'; '.join(known)}")


def inside(root: Path, name: str, field: str) -> Path:
    """`root`/`name`, for a name that a data set's own files give. Raises FormatError where it leads out of `root`."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name:
        raise FormatError(f"{root.name}: {field}: {name[:80]!r} leads out of the data set's folder")
    return root / relative


def no_widths(episode: Episode) -> bool:
    """Whether the source has no gripper width."""
    return bool(np.isnan(episode.widths).all())


def check_fps(value: Any, field: str) -> float:
    """`value`, frames a second. Raises FormatError, naming `field`, unless it is a number in (0, MAX_FPS]."""
    if not isinstance(value, int | float) or not 0 < value <= MAX_FPS:
        raise FormatError(f"{field}: must be a number in (0, {MAX_FPS}], got {str(value)[:20]}")
    return value


def check_episode(episode: Episode, chunk: int = 1, cameras: Collection[str] | None = None) -> None:
    """Raise ValueError, naming the field, unless shapes, dtypes and units are those of `Episode` and `chunk` divides T.

    cameras: those that there must be, all and no others.
    """
    steps = len(episode.actions)
    if steps == 0 or steps % chunk:
        raise ValueError(f"actions: {steps} actions; the number must be a positive multiple of {chunk}")
    if cameras is not None and set(episode.images) != set(cameras):
        raise ValueError(f"images: cameras must be {sorted(cameras)}, got {sorted(episode.images)}")
    for name, image in episode.images.items():
        if image.dtype != np.uint8 or image.ndim != 4 or image.shape[0] != steps + 1 or image.shape[-1] != 3:
            raise ValueError(f"images[{name!r}]: must be uint8 ({steps + 1}, H, W, 3), got {image.dtype} {image.shape}")
    for field, values, rows, ndim in (
        ("actions", episode.actions, steps, 2),
        ("states", episode.states, steps + 1, 2),
        ("widths", episode.widths, steps + 1, 1),
        *((f"truth[{name!r}]", values, steps + 1, 1) for name, values in (episode.truth or {}).items()),
    ):
        if values.dtype != np.float32 or values.ndim != ndim or len(values) != rows:
            raise ValueError(f"{field}: must be float32 with {ndim} axes and {rows} rows, got {values.dtype} {values.shape}")
        if not (finite := np.isfinite(values)).all():
            row = int(np.argmin(finite.reshape(rows, -1).all(axis=1)))
            raise ValueError(f"{field}: values must be finite; row {row} is NaN or infinite")
    if episode.intended is not None and episode.intended.shape != (steps,):
        raise ValueError(f"intended: must be ({steps},), one per action, got {episode.intended.shape}")
    for name, values in episode.cues.items():
        if values.dtype != np.float32 or len(values) != steps + 1 or not np.isfinite(values).all():
            raise ValueError(f"cues[{name!r}]: must be {steps + 1} finite float32 rows, got {values.dtype} {values.shape}")
    if episode.widths.min() < 0 or episode.widths.max() > MAX_WIDTH:
        raise ValueError(
            f"widths: must lie in [0, {MAX_WIDTH}] metres, got up to {episode.widths.max():g}; is the unit millimetres?"
        )


def require_split(found: str, allowed: Split | None, where: str) -> None:
    """For data with a split of its own: raise LeakageError if the caller expects another."""
    if allowed is not None:
        splits.require([found], [allowed], where)
