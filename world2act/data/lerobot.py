"""LeRobot data sets, v2.0, v2.1 and v3.0 (parquet + mp4), RoboCasa365 among them. Needs the extra `data` (pyarrow).

A folder with meta/info.json (codebase_version, fps, features, data_path, video_path). v2 keeps one parquet file and one video a
camera and episode, meta/episodes.jsonl and tasks.jsonl; v3 many episodes a file, meta/episodes/**.parquet saying which rows of
which file, and which seconds of which video, are an episode's, and meta/tasks.parquet. Source: huggingface/lerobot,
src/lerobot/datasets (0.4.4 and 0.6.1).

Row t holds what was seen before action t; nothing is there after the last action, so that one is left out.

Gripper widths, in this order: feature observation.gripper_width (our own export); the indices that the caller gives; where
meta/modality.json puts gripper_qpos; PandaOmron's and LIBERO's known places. Else there are none (NaN): a number that is
called gripper somewhere may be anything from a percentage to radians.

RoboCasa365 (robot PandaOmron) keeps actions in its own order (robocasa.COLUMNS_365, or as meta/modality.json says); they are put
into that of world2act/data/robocasa.py. The two LIBERO conversions in use (observation.images.image, image) are upright but
mirrored left to right, since their makers turned images by 180 degrees which an up-down flip makes upright. Nothing in the files
says so: they are left as they are unless the caller says `mirrored`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from world2act.data import robocasa
from world2act.data.formats import FormatError, Source, check_fps, inside
from world2act.data.video import decode_image, read_video
from world2act.splits import Split
from world2act.types import Episode, FloatArray, ImageArray

CAMERAS = {key: name for name, key in robocasa.CAMERAS.items()} | {"image": "primary", "wrist_image": "wrist", "image2": "wrist"}
"""Feature name (without observation.images.) -> our name; others keep theirs."""
INFO = ("codebase_version", "fps", "features", "data_path")
KEY = "episode_"
WIDTH, SUCCESS = "observation.gripper_width", "next.success"
TASK_COLUMN, ROBOCASA_TASK = "task_name", "annotation.human.task_name"
Row = dict[str, Any] | str
"""A row of the metadata, or why it cannot be read."""


class LeRobotSource(Source):
    """See the module. Episode.index is LeRobot's episode_index; keys are episode_<six digits>.

    A file or row of the episodes' metadata that cannot be read has one key, its place: it is reported as one skipped item.
    """

    name = "lerobot"
    signs = "folder with meta/info.json"

    def __init__(self, path: Path, split: Split | None = None, gripper: Sequence[int] = (), mirrored: bool = False) -> None:
        """gripper: indices into observation.state whose absolute values add up to the width in metres. mirrored: all images are
        mirrored left to right, and are to be mirrored back."""
        super().__init__(path, split)
        self.gripper = list(gripper)
        self.mirrored = mirrored
        self.info = self._info()
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.modality = self._modality()
        size = self._size(self._state)
        if size is not None and not all(0 <= i < size for i in self.gripper):
            raise FormatError(f"gripper: {self.gripper} are not all columns of a state of {size}")

    @property
    def robot(self) -> str:
        """robot_type of meta/info.json."""
        return str(self.info.get("robot_type") or self.name)

    @classmethod
    def detect(cls, path: Path) -> bool:
        return (path / "meta" / "info.json").is_file()

    def keys(self) -> Iterator[str]:
        return iter(self.index)

    @cached_property
    def index(self) -> dict[str, Row]:
        """Key -> the episode's row in the metadata, without statistics: some hundred bytes an episode."""
        meta = self.path / "meta"
        files = sorted((meta / "episodes").glob("*/*.parquet")) if self._is_v3 else [meta / "episodes.jsonl"]
        if not files:
            raise FormatError(f"{self.path.name}: meta/episodes: has no parquet file")
        read = _episode_rows if self._is_v3 else _json_lines
        rows = _by_number((row for file in files for row in read(file, self.path)), "episode_index")
        return {n if isinstance(n, str) else f"{KEY}{n:06d}": row for n, row in rows.items()}

    @cached_property
    def tasks(self) -> dict[int | str, str]:
        """task_index -> instruction; and of a row that cannot be read, under its place, why."""
        text = "task"
        if self._is_v3:
            file = self.path / "meta" / "tasks.parquet"
            text = text if text in _parquet_names(file) else "__index_level_0__"  # pandas' name for an index without one
            table = _parquet(file, [text, "task_index"]).to_pylist()
            rows = _by_number(((f"meta/{file.name}: row {n}", row) for n, row in enumerate(table)), "task_index")
        else:
            rows = _by_number(_json_lines(self.path / "meta" / "tasks.jsonl", self.path), "task_index")
        return {n: row if isinstance(row, str) else str(row.get(text) or "").strip() for n, row in rows.items()}

    def _instruction(self, key: str, number: Any) -> str:
        found = self.tasks.get(number)
        if not found:
            unread = next((f" ({why})" for place, why in self.tasks.items() if isinstance(place, str)), "")
            raise FormatError(f"{key}: task_index {str(number)[:20]}: no instruction in meta/tasks{unread}")
        return found

    @property
    def _is_v3(self) -> bool:
        return str(self.info["codebase_version"]).startswith("v3")

    def _info(self) -> dict[str, Any]:
        info = _json(self.path / "meta" / "info.json")
        missing = [key for key in INFO if key not in info]
        if missing:
            raise FormatError(f"{self.path.name}: meta/info.json lacks {', '.join(missing)}")
        if str(info["codebase_version"])[:2] not in ("v2", "v3"):
            raise FormatError(f"{self.path.name}: codebase_version: {str(info['codebase_version'])[:20]!r}; v2 and v3 are read")
        check_fps(info["fps"], f"{self.path.name}: meta/info.json: fps")
        if not isinstance(info["features"], dict) or "action" not in info["features"]:
            raise FormatError(f"{self.path.name}: meta/info.json: features lacks action")
        for name, about in info["features"].items():
            if not isinstance(about, dict):
                raise FormatError(f"{self.path.name}: meta/info.json: features.{name[:80]} must be a JSON object")
        return info

    def _modality(self) -> dict[str, dict[str, slice]]:
        """meta/modality.json (GR00T's): "state" and "action" -> part -> its columns."""
        file = self.path / "meta" / "modality.json"
        content = _json(file) if file.is_file() else {}
        try:
            found: dict[str, dict[str, slice]] = {}
            for kind in ("state", "action"):
                found[kind] = {n: slice(int(p["start"]), int(p["end"])) for n, p in content.get(kind, {}).items()}
            return found
        except (TypeError, KeyError, AttributeError, ValueError, ArithmeticError):
            raise FormatError(f"{self.path.name}: meta/modality.json: parts of state and action need start and end") from None

    def _read(self, key: str, images: bool) -> Episode:
        row = self.index[key]
        if isinstance(row, str):
            raise FormatError(row)
        index = int(row["episode_index"])
        columns = self._columns(index, row, images)
        rows = len(columns["action"])
        if rows != row.get("length") or rows < 2:
            raise FormatError(f"{key}: has {rows} rows, its metadata says {row.get('length')}; 2 at least are needed")
        self._check_times(key, np.asarray(columns["timestamp"], np.float64))
        states, actions = self._vector(columns, self._state), self._vector(columns, "action")
        instruction = self._instruction(key, columns["task_index"][0])
        flip = -1 if self.mirrored else 1
        seen = {camera: self._frames(feature, row, index, columns, rows) for camera, feature in self._cameras(images)}
        success = columns.get(SUCCESS)
        order = self._robocasa_order(actions.shape[1])
        meta, cues = {"fps": f"{self.info['fps']:g}"}, {}
        if order:
            actions = robocasa.from_365(actions, order)
            meta |= robocasa.META
            cues["command"] = robocasa.commands(np.where(actions[:, robocasa.GRIPPER] < 0.5, -1, 1))  # as its simulator reads it
        return Episode(
            task=self._task(row, columns, instruction),
            split=str(self.split),
            index=index,
            instruction=instruction,
            images={camera: np.ascontiguousarray(image[:, :, ::flip]) for camera, image in seen.items()},
            states=states,
            widths=self._widths(columns, states, actions.shape[1]),
            actions=np.ascontiguousarray(actions[:-1]),
            success=bool(np.any(success)) if success is not None else True,
            meta=meta,
            cues=cues,
        )

    @property
    def _state(self) -> str:
        return "observation.state" if "observation.state" in self.features else "state"

    def _cameras(self, images: bool) -> list[tuple[str, str]]:
        """(our name, feature) of each camera; depth is left out."""
        found = []
        for feature, about in self.features.items() if images else ():
            hints = {**(about.get("video_info") or {}), **(about.get("info") or {})}
            depth = hints.get("video.is_depth_map") or hints.get("is_depth_map")
            if about.get("dtype") in ("image", "video") and not depth:
                short = feature.removeprefix("observation.").removeprefix("images.")
                found.append((CAMERAS.get(short, short), feature))
        return found

    def _columns(self, index: int, row: Mapping[str, Any], images: bool) -> dict[str, Any]:
        """The episode's rows, as columns: numbers as lists, pictures as their bytes."""
        wanted = ["action", "timestamp", "task_index", self._state, WIDTH, SUCCESS, ROBOCASA_TASK]
        wanted += [f for _, f in self._cameras(images) if self.features[f]["dtype"] == "image"]
        file = self._file("data_path", index, row, "data")
        names = _parquet_names(file)
        missing = [n for n in ("action", "timestamp", "task_index") if n not in names]
        if missing:
            raise FormatError(f"{file.name}: column {', '.join(missing)} is missing")
        present = [n for n in wanted if n in names]
        table = _parquet(file, present, ("episode_index", index) if self._is_v3 else None)
        return {name: table[name].to_pylist() for name in present}

    def _file(self, template: str, index: int, row: Mapping[str, Any], prefix: str) -> Path:
        """The file of an episode, by info.json's template; it must lie in the data set's folder and be there."""
        values: dict[str, Any] = {"video_key": prefix.removeprefix("videos/")}
        try:
            if self._is_v3:
                values |= {k: int(row[f"{prefix}/{k}"]) for k in ("chunk_index", "file_index")}
            else:
                values |= {"episode_index": index, "episode_chunk": index // int(self.info.get("chunks_size", 1000))}
            name = str(self.info[template]).format(**values)
        except (LookupError, ValueError, AttributeError, TypeError, ArithmeticError) as error:
            raise FormatError(f"{self.path.name}: {template}: cannot be filled for episode {index} ({error})") from None
        file = inside(self.path, name, template)
        if not file.is_file():
            raise FormatError(f"{KEY}{index:06d}: {name}: no such file")
        return file

    def _size(self, name: str) -> int | None:
        """How many numbers a vector has, where info.json says it."""
        shape = self.features.get(name, {}).get("shape")
        return shape[0] if isinstance(shape, list) and shape and isinstance(shape[0], int) else None

    def _vector(self, columns: Mapping[str, Any], name: str) -> FloatArray:
        """A column of vectors, float32 (N, size), of the size that info.json says."""
        if name not in columns:
            return np.zeros((len(columns["action"]), 0), np.float32)
        try:
            values = np.asarray(columns[name], np.float32)
        except (ValueError, TypeError):
            raise FormatError(f"{name}: rows must be numbers, as many in each") from None
        values = values[:, None] if values.ndim == 1 else values
        size = self._size(name)
        if values.ndim != 2 or size not in (None, values.shape[1]):
            raise FormatError(f"{name}: shape must be (N, {size}), got {values.shape}")
        return values

    def _check_times(self, key: str, times: npt.NDArray[np.float64]) -> None:
        if not np.isfinite(times).all():
            raise FormatError(f"{key}: timestamp: values must be finite; row {np.argmin(np.isfinite(times))} is not")
        steps, wanted = np.diff(times), 1 / float(self.info["fps"])
        if (np.abs(steps - wanted) > 0.1 * wanted).any():
            low, high = steps.min(), steps.max()
            raise FormatError(f"{key}: fps: {self.info['fps']:g} is said, but frames are {low:.4g} to {high:.4g} s apart")

    def _robocasa_order(self, size: int) -> dict[str, slice] | None:
        """Where the parts of a RoboCasa action are; None for other robots."""
        if size != robocasa.ACTION_SIZE:
            return None
        parts = self.modality["action"]
        if set(parts) == set(robocasa.ACTION):
            wrong = [n for n, s in parts.items() if s.stop - s.start != robocasa.ACTION[n] or not 0 <= s.start < s.stop <= size]
            if wrong:
                raise FormatError(f"{self.path.name}: meta/modality.json: action.{wrong[0]}: wrong columns")
            return parts
        return robocasa.COLUMNS_365 if self.info.get("robot_type") == "PandaOmron" else None

    def _widths(self, columns: Mapping[str, Any], states: FloatArray, action_size: int) -> FloatArray:
        robot, size = self.info.get("robot_type"), states.shape[1]
        part = self.modality["state"].get("gripper_qpos")
        if WIDTH in columns:
            return np.asarray(columns[WIDTH], np.float32).reshape(-1)
        if self.gripper:
            fingers = states[:, self.gripper]
        elif part is not None:
            fingers = states[:, part]
        elif robot == "PandaOmron" and size == 16:
            fingers = states[:, 14:]
        elif robot == "panda" and (size, action_size) == (8, 7):  # LIBERO: position, axis-angle, two fingers
            fingers = states[:, 6:]
        else:
            return np.full(len(states), np.nan, np.float32)
        widths: FloatArray = np.abs(fingers).sum(axis=1)
        return widths

    def _task(self, row: Mapping[str, Any], columns: Mapping[str, Any], instruction: str) -> str:
        """The simulator's name of the task where the data says it, else the instruction."""
        if row.get(TASK_COLUMN):
            return str(row[TASK_COLUMN])
        if ROBOCASA_TASK in columns:
            return self.tasks.get(columns[ROBOCASA_TASK][0]) or instruction
        return instruction

    def _frames(self, feature: str, row: Mapping[str, Any], index: int, columns: Mapping[str, Any], rows: int) -> ImageArray:
        if self.features[feature]["dtype"] == "image":
            if feature not in columns:
                raise FormatError(f"{KEY}{index:06d}: column {feature} is missing")
            pictures = [cell["bytes"] for cell in columns[feature] if isinstance(cell, dict) and cell.get("bytes")]
            if len(pictures) != rows:
                raise FormatError(f"{KEY}{index:06d}: {feature}: pictures must be in the parquet file itself")
            return np.stack([decode_image(p) for p in pictures])
        prefix = f"videos/{feature}"
        start = row.get(f"{prefix}/from_timestamp", 0.0) if self._is_v3 else 0.0
        if not isinstance(start, int | float) or not math.isfinite(start):
            raise FormatError(f"{KEY}{index:06d}: {prefix}/from_timestamp: must be seconds, got {start}")
        try:
            return read_video(self._file("video_path", index, row, prefix), rows, start, float(self.info["fps"]))
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(f"{KEY}{index:06d}: {feature}: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise FormatError(f"meta/{file.name}: is missing or not JSON") from None
    if not isinstance(content, dict):
        raise FormatError(f"meta/{file.name}: must be a JSON object")
    return content


def _json_lines(file: Path, root: Path) -> Iterator[tuple[str, Row]]:
    """(its place, content) of each line of a JSON lines file."""
    name = file.relative_to(root).as_posix()
    if not file.is_file():
        raise FormatError(f"{name}: is missing")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{name}: line {number}"
            try:
                content = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                yield place, f"{place} is not JSON; the file is truncated or damaged"
                continue
            if content is not None:
                yield place, content if isinstance(content, dict) else {}


def _episode_rows(file: Path, root: Path) -> Iterator[tuple[str, Row]]:
    """(its place, content) of each row of a parquet file of episodes, without statistics."""
    name = file.relative_to(root).as_posix()
    try:
        names = [n for n in _parquet_names(file) if not n.startswith("stats/")]
        if "episode_index" not in names:
            raise FormatError(f"{name}: column episode_index is missing")
        rows = _parquet(file, names).to_pylist()
    except ValueError as error:
        yield name, str(error)
        return
    yield from ((f"{name}: row {number}", row) for number, row in enumerate(rows))


def _by_number(rows: Iterable[tuple[str, Row]], field: str) -> dict[int | str, Row]:
    """Rows by their whole number `field`; what is wrong with others, by their place."""
    found: dict[int | str, Row] = {}
    for place, row in rows:
        value = row.get(field) if isinstance(row, dict) else None
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):  # pandas: integers beside a null
            found[int(value)] = row
        else:
            found[place] = row if isinstance(row, str) else f"{place} needs {field}, a whole number"
    return found


def _parquet(file: Path, columns: list[str], where: tuple[str, int] | None = None) -> Any:
    """A pyarrow table of `columns`, only the rows where a column has a value. Row groups that cannot have it are not read."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file, columns=columns, filters=[(where[0], "==", where[1])] if where else None)
    except (pyarrow.ArrowException, OSError) as error:
        raise FormatError(f"{file.name}: cannot be read ({_first_line(error)})") from None


def _parquet_names(file: Path) -> list[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise FormatError("pyarrow is missing: LeRobot data needs pip install 'world2act[data]'") from None
    if not file.is_file():
        raise FormatError(f"{file.parent.name}/{file.name}: is missing")
    try:
        return list(pyarrow.parquet.read_schema(file).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise FormatError(f"{file.name}: is not a parquet file, or truncated ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    """What pyarrow says, without the path that an OSError carries."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno else "truncated"
    return str(error).splitlines()[0][:120]
