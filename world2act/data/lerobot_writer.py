"""LeRobot v3.0 data sets: parquet + mp4, with the skills as language. Needs the extra `data` (pyarrow, pandas).

Shard n is data/chunk-CCC/file-FFF.parquet (a row group an episode), videos/<feature>/chunk-CCC/file-FFF.mp4 and
meta/episodes/chunk-CCC/file-FFF.parquet, CCC and FFF being n by chunks_size; a new one begins once a file is large. The last of
the three is renamed into place last: a shard is there when it is. Everything is under <out>.partial until `close`.

A row is what is seen before an action and that action; the frame after the last action has no row (LeRobot has no place for it).

Skills stand twice: as `subtask_index` into meta/subtasks.parquet, which LeRobot 0.4 shows as item["subtask"], and, with
`language`, as rows of style `subtask` in the column language_persistent (LeRobot >= 0.6: a state that holds from its timestamp
until the next one; every frame of an episode carries all rows of the episode). LeRobot 0.4 cannot open a data set that has
the language columns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from world2act.data.formats import check_episode, no_widths
from world2act.data.lerobot import SUCCESS, TASK_COLUMN, WIDTH
from world2act.data.video import VideoWriter
from world2act.types import Episode, Skill

CHUNKS_SIZE = 1000
FILE_BYTES = 100 * 2**20
STATS_FRAMES = 16
"""Frames an episode that the statistics of images look at."""
PATHS = {
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
KEY_COLUMN = "source_key"
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index", "subtask_index")
_ROW = {"role": pa.string(), "content": pa.string(), "style": pa.string(), "camera": pa.null(), "tool_calls": pa.null()}
EVENTS_TYPE = pa.list_(pa.struct(_ROW))
PERSISTENT_TYPE = pa.list_(pa.struct({**_ROW, "timestamp": pa.float32()}))


class LeRobotWriter:
    """Writes episodes of one robot, one by one; see the module. After an exception `resume=True` goes on after the last shard.

    fps: frames a second, whole. state, action: names of the columns, or none. Raises FileExistsError if `out` is there, or left
    from an earlier run that is not resumed.
    """

    def __init__(
        self, out: Path, *, fps: int, robot: str, language: bool = True, resume: bool = False, file_bytes: int = FILE_BYTES
    ) -> None:
        if fps != int(fps) or fps < 1:
            raise ValueError(f"fps: {fps} must be a whole number of frames a second; LeRobot takes no other")
        self.out, self.language, self.file_bytes = Path(out), language, file_bytes
        self._folder = self.out.with_name(self.out.name + ".partial")
        if self.out.exists():
            raise FileExistsError(f"out: {self.out.name} exists already")
        if not resume and self._folder.exists():
            raise FileExistsError(f"out: {self._folder.name} is left from an earlier run; resume it or remove it")
        self.info: dict[str, Any] = {
            "codebase_version": "v3.0",
            "robot_type": robot,
            "fps": int(fps),
            "chunks_size": CHUNKS_SIZE,
            "data_files_size_in_mb": file_bytes // 2**20,
            "video_files_size_in_mb": file_bytes // 2**20,
            **PATHS,
            "total_episodes": 0,
            "total_frames": 0,
            "features": {},
        }
        self.tasks: dict[str, int] = {}
        self.subtasks: dict[str, int] = {}
        self.stats: dict[str, Moments] = {}
        self.written: set[str] = set()
        """Keys of the episodes in whole shards."""
        self._shards = 0
        self._shard: _Shard | None = None
        if self._folder.exists():
            self._resume()

    def write(self, key: str, episode: Episode, skills: Sequence[Skill] = ()) -> None:
        """Append `episode`, named `key`. Raises ValueError where it is unlike the first one, or a skill is out of its bounds."""
        check_episode(episode)
        if key in self.written:
            raise ValueError(f"key: {key[:80]!r} is in the data set already")
        if no_widths(episode):
            raise ValueError("widths: a data set to train on needs gripper widths; these are NaN")
        features = self._features(episode)
        known = self.info["features"] = self.info["features"] or features
        for name in {*features, *known}:
            mine, theirs = features.get(name, {}).get("shape"), known.get(name, {}).get("shape")
            if mine != theirs:
                raise ValueError(f"{name}: shape is {mine}, of the episodes before {theirs}")
        if self._shard is None:
            self._shard = _Shard(self._folder, self._shards, self.info)
        columns = self._columns(episode, skills)
        frames = {f"observation.images.{c}": image[:-1] for c, image in episode.images.items()}
        row = {"episode_index": self.info["total_episodes"], "tasks": [episode.instruction], "length": len(episode.actions)}
        row |= {TASK_COLUMN: episode.task, KEY_COLUMN: key, "success": episode.success}
        self._shard.write(row, columns, frames, self.info["total_frames"])
        self._count(columns, frames)
        self.info["total_episodes"] += 1
        self.info["total_frames"] += len(episode.actions)
        if self._shard.bytes >= self.file_bytes:
            self._commit()

    def close(self) -> None:
        """Finish the last shard, write what describes all, and give the folder its name."""
        self._commit()
        self._metadata()
        for state in self._folder.glob("meta/state-*.json"):
            state.unlink()
        self._folder.replace(self.out)

    def _features(self, episode: Episode) -> dict[str, Any]:
        """meta/info.json's description of the columns."""
        found: dict[str, Any] = {}
        for camera, image in episode.images.items():
            height, width = image.shape[1:3]
            if height % 2 or width % 2:
                raise ValueError(f"images[{camera!r}]: height and width must be even for H.264, got {height} x {width}")
            video = {"video.height": height, "video.width": width, "video.codec": "h264", "video.pix_fmt": "yuv420p"}
            video |= {"video.is_depth_map": False, "video.fps": self.info["fps"], "video.channels": 3, "has_audio": False}
            shape = {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"]}
            found[f"observation.images.{camera}"] = {**shape, "info": video}
        for name, size in (("observation.state", episode.states.shape[1]), ("action", episode.actions.shape[1]), (WIDTH, 1)):
            found[name] = {"dtype": "float32", "shape": [size], "names": None}
        for name, dtype in ((SUCCESS, "bool"), ("next.done", "bool"), ("timestamp", "float32")):
            found[name] = {"dtype": dtype, "shape": [1], "names": None}
        for name in BOOKKEEPING[1:]:
            found[name] = {"dtype": "int64", "shape": [1], "names": None}
        for name in ("language_persistent", "language_events") if self.language else ():
            found[name] = {"dtype": "language", "shape": [1], "names": None}
        return found

    def _columns(self, episode: Episode, skills: Sequence[Skill]) -> dict[str, Any]:
        """The episode's rows, one an action, as columns."""
        rows, fps = len(episode.actions), self.info["fps"]
        prompts = [""] * rows
        for skill in skills:
            if not 0 <= skill.start < skill.end <= rows:
                raise ValueError(f"skills: {skill.start} to {skill.end} is not within the episode's {rows} actions")
            prompts[skill.start : skill.end] = [skill.prompt] * (skill.end - skill.start)
        last = np.arange(rows) == rows - 1
        times = (np.arange(rows) / fps).astype(np.float32)
        task = self.tasks.setdefault(episode.instruction, len(self.tasks))
        columns: dict[str, Any] = {
            "observation.state": episode.states[:-1],
            "action": episode.actions,
            WIDTH: episode.widths[:-1],
            SUCCESS: last & episode.success,
            "next.done": last,
            "timestamp": times,
            "frame_index": np.arange(rows),
            "episode_index": np.full(rows, self.info["total_episodes"]),
            "index": self.info["total_frames"] + np.arange(rows),
            "task_index": np.full(rows, task),
            "subtask_index": np.array([self.subtasks.setdefault(p, len(self.subtasks)) for p in prompts]),
        }
        if self.language:
            said = {"role": "assistant", "style": "subtask", "camera": None, "tool_calls": None}
            held = [{**said, "content": s.prompt, "timestamp": float(times[s.start])} for s in skills]
            columns["language_persistent"] = pa.array([held] * rows, PERSISTENT_TYPE)
            columns["language_events"] = pa.array([[]] * rows, EVENTS_TYPE)
        return columns

    def _count(self, columns: dict[str, Any], frames: dict[str, Any]) -> None:
        for name, values in columns.items():
            if name in self.info["features"] and isinstance(values, np.ndarray):
                self.stats.setdefault(name, Moments()).add(values.reshape(len(values), -1))
        for name, images in frames.items():
            seen = images[np.unique(np.linspace(0, len(images) - 1, STATS_FRAMES).astype(int))]
            self.stats.setdefault(name, Moments()).add(seen.reshape(-1, 3) / 255.0)

    def _commit(self) -> None:
        """Close the open shard. Its state is written before the file that makes it count."""
        if self._shard is None:
            return
        episodes = self._shard.close()
        state = {"info": self.info, "tasks": self.tasks, "subtasks": self.subtasks}
        state["stats"] = {name: moments.to_json() for name, moments in self.stats.items()}
        final = self._folder / EPISODES.format(**_place(self._shards))
        final.parent.mkdir(parents=True, exist_ok=True)
        (self._folder / f"meta/state-{self._shards}.json").write_text(json.dumps(state), encoding="utf-8")
        partial = final.with_suffix(".partial")
        pq.write_table(pa.Table.from_pylist(episodes), partial)
        partial.replace(final)
        self.written.update(row[KEY_COLUMN] for row in episodes)
        self._shards += 1
        self._shard = None

    def _resume(self) -> None:
        """Take up the state of the last whole shard, and remove what came after it."""
        whole = sorted(self._folder.glob("meta/episodes/*/*.parquet"))
        self._shards = len(whole)
        for template in PATHS.values():
            for file in self._folder.glob(template.format(video_key="*", **_place(self._shards))):
                file.unlink()
        for file in whole:
            self.written.update(pq.read_table(file, columns=[KEY_COLUMN])[KEY_COLUMN].to_pylist())
        if not whole:
            shutil.rmtree(self._folder)
            return
        state = json.loads((self._folder / f"meta/state-{self._shards - 1}.json").read_text(encoding="utf-8"))
        if any(state["info"][k] != self.info[k] for k in ("fps", "robot_type")) or self.language != _has_language(state["info"]):
            raise ValueError(f"out: {self._folder.name} was begun with another fps, robot or language; remove it")
        self.info, self.tasks, self.subtasks = state["info"], state["tasks"], state["subtasks"]
        self.stats = {name: Moments.from_json(content) for name, content in state["stats"].items()}

    def _metadata(self) -> None:
        """meta/info.json, stats.json, tasks.parquet, subtasks.parquet."""
        import pandas as pd

        meta = self._folder / "meta"
        meta.mkdir(parents=True, exist_ok=True)
        self.info |= {"total_tasks": len(self.tasks), "splits": {"train": f"0:{self.info['total_episodes']}"}}
        (meta / "info.json").write_text(json.dumps(self.info, indent=4), encoding="utf-8")
        stats = {name: moments.summary(self.info["features"][name]["dtype"] == "video") for name, moments in self.stats.items()}
        (meta / "stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")
        for name, column, rows in (("tasks", "task", self.tasks), ("subtasks", "subtask", self.subtasks)):
            index = pd.Index(list(rows), name=column, dtype="object")
            pd.DataFrame({f"{column}_index": list(rows.values())}, index=index).to_parquet(meta / f"{name}.parquet")

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.abandon()


class _Shard:
    """The open files of shard `number`."""

    def __init__(self, folder: Path, number: int, info: dict[str, Any]) -> None:
        self._folder, self._place, self._fps = folder, _place(number), info["fps"]
        self._data = folder / PATHS["data_path"].format(**self._place)
        self._data.parent.mkdir(parents=True, exist_ok=True)
        self._writer: pq.ParquetWriter | None = None
        self._videos: dict[str, tuple[Path, VideoWriter]] = {}
        self._episodes: list[dict[str, Any]] = []
        self.bytes = 0

    def write(self, row: dict[str, Any], columns: dict[str, Any], frames: dict[str, Any], at: int) -> None:
        """One episode: its metadata, columns and frames; `at`: how many rows are before it in the whole data set."""
        table = pa.table({name: _arrow(values) for name, values in columns.items()})
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._data, table.schema)
        self._writer.write_table(table, row_group_size=max(1, len(table)))
        row |= {f"data/{k}": v for k, v in self._place.items()} | {f"meta/episodes/{k}": v for k, v in self._place.items()}
        row |= {"dataset_from_index": at, "dataset_to_index": at + row["length"]}
        for name, images in frames.items():
            if name not in self._videos:
                path = self._folder / PATHS["video_path"].format(video_key=name, **self._place)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._videos[name] = path, VideoWriter(path, self._fps, images.shape[1:3], keyframe_every=2)
            video = self._videos[name][1]
            row |= {f"videos/{name}/{k}": v for k, v in self._place.items()}
            row[f"videos/{name}/from_timestamp"] = video.frames / self._fps
            video.write(images)
            row[f"videos/{name}/to_timestamp"] = video.frames / self._fps
        self._episodes.append(row)
        self.bytes = max(path.stat().st_size for path in self._files())

    def _files(self) -> Iterator[Path]:
        yield self._data
        yield from (path for path, _ in self._videos.values())

    def close(self) -> list[dict[str, Any]]:
        """Finish the files; the metadata of the shard's episodes."""
        assert self._writer is not None
        self._writer.close()
        for _, video in self._videos.values():
            video.close()
        return self._episodes

    def abandon(self) -> None:
        """Remove what was written."""
        if self._writer is not None:
            self._writer.close()
        for path in [*self._files()]:
            path.unlink(missing_ok=True)


class Moments:
    """Count, least, most, mean and spread of rows (N, size) that come in batches (Chan's way of adding variances)."""

    def __init__(self) -> None:
        self.count = 0
        self.least = self.most = self.mean = self.squares = np.zeros(0)

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Rows (N, size), N >= 1."""
        values = rows.astype(np.float64)
        number, mean = len(values), values.mean(axis=0)
        squares = ((values - mean) ** 2).sum(axis=0)
        if self.count == 0:
            self.least, self.most, self.mean, self.squares = values.min(axis=0), values.max(axis=0), mean, squares
        else:
            self.least, self.most = np.minimum(self.least, values.min(axis=0)), np.maximum(self.most, values.max(axis=0))
            total, apart = self.count + number, mean - self.mean
            self.squares = self.squares + squares + apart**2 * self.count * number / total
            self.mean = self.mean + apart * number / total
        self.count += number

    def summary(self, image: bool) -> dict[str, Any]:
        """As in stats.json; of an image a channel each, (3, 1, 1)."""
        spread = np.sqrt(self.squares / max(self.count, 1))
        found = {"min": self.least, "max": self.most, "mean": self.mean, "std": spread}
        return {k: (v[:, None, None] if image else v).tolist() for k, v in found.items()} | {"count": [self.count]}

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Moments:
        """The inverse of `to_json`."""
        moments = cls()
        vars(moments).update({k: v if k == "count" else np.asarray(v) for k, v in content.items()})
        return moments


def _place(shard: int) -> dict[str, int]:
    return {"chunk_index": shard // CHUNKS_SIZE, "file_index": shard % CHUNKS_SIZE}


def _has_language(info: dict[str, Any]) -> bool:
    return "language_persistent" in info["features"]


def _arrow(values: Any) -> Any:
    """A column: vectors as lists of fixed size."""
    if not isinstance(values, np.ndarray):
        return values
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel()), values.shape[1])
