"""Demonstrations in HDF5, in robomimic's layout. One file per task and split: <root>/<split>/<task>.hdf5.

/data            attrs: split, total (actions in all demonstrations), env_args (JSON: env_name, simulator, control_hz, chunk,
                 cameras {name: cell}, gripper_open_width, gripper_width_index)
/data/demo_<i>   attrs: num_samples T (a multiple of M), index i of the scene in its split, task, instruction, success,
                 perturbed;
                 actions (T, A) f32; obs/<camera>_image (T, H, W, 3) u8; obs/state (T, S) f32; obs/gripper_width (T,) f32, metres;
                 final_obs/<the same keys>: the observation after the last action, without the T axis;
                 truth/<touch, height or joint>/<body> (T+1,) f32: optional, what the simulator knew at each frame

obs[t] is seen *before* actions[t] (robomimic's convention; LIBERO's files record it after).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from world2act import splits
from world2act.data import hdf5
from world2act.data.formats import FormatError as FormatError
from world2act.data.formats import check_episode, check_fps, require_split
from world2act.data.hdf5 import Hdf5Source
from world2act.splits import Split
from world2act.types import Episode, FloatArray, ImageArray

ENV_ARGS = ("env_name", "simulator", "control_hz", "chunk", "cameras", "gripper_open_width", "gripper_width_index")
IMAGE_SUFFIX = "_image"
TRUTH = "truth"


class EpisodeWriter:
    """Writes episodes one by one to a temporary file, which takes the final name on a clean exit of the `with` block.

    After an exception the temporary file stays, for `resume=True` to go on with; the final name never holds half a file.
    """

    def __init__(self, path: Path, *, split: Split, env_args: dict[str, Any], resume: bool = False) -> None:
        missing = [key for key in ENV_ARGS if key not in env_args]
        if missing:
            raise ValueError(f"env_args: {', '.join(missing)} missing")
        self.path = Path(path)
        self._temporary = self.path.with_name(self.path.name + ".partial")
        self._env_args = json.dumps(env_args, sort_keys=True)
        self._chunk = int(env_args["chunk"])
        self._cameras = set(env_args["cameras"])
        self._split = split
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.path.exists() and not self._temporary.exists():
            shutil.copyfile(self.path, self._temporary)  # readers of the final name are not disturbed
        self._file = _open_partial(self._temporary, resume)
        group = self._file.require_group("data")
        if group.attrs.get("env_args", self._env_args) != self._env_args:
            self._file.close()
            raise FormatError(f"{self._temporary.name}: /data: env_args differ from those of the file to go on with; remove it")
        group.attrs.update({"env_args": self._env_args, "split": split.value, "total": group.attrs.get("total", 0)})

    @property
    def indices(self) -> dict[int, bool]:
        """Scene index -> perturbed, of the episodes already written."""
        return {int(demo.attrs["index"]): bool(demo.attrs["perturbed"]) for demo in self._file["data"].values()}

    def write(self, episode: Episode, *, perturbed: bool = False) -> None:
        """Append `episode`. Raises ValueError where it breaks the layout (see `check_episode`) or its scene is there already."""
        check_episode(episode, self._chunk, self._cameras)
        if episode.split != self._split.value:
            raise splits.LeakageError(f"{self.path.name}: holds episodes of split {self._split.value}, got {episode.split}")
        data = self._file["data"]
        name = f"demo_{episode.index}"
        if name in data:
            raise ValueError(f"index: scene {episode.index} is in {self.path.name} already")
        building = f"building_{name}"  # renamed when whole, so that a killed process leaves no half demonstration to resume
        if building in data:
            del data[building]
        group = data.create_group(building)
        group.attrs.update(
            {
                "num_samples": len(episode.actions),
                "index": episode.index,
                "task": episode.task,
                "instruction": episode.instruction,
                "success": episode.success,
                "perturbed": perturbed,
            }
        )
        group["actions"] = episode.actions
        if episode.intended is not None:
            group["intended"] = episode.intended.astype(np.uint8)
        for key, values in (episode.truth or {}).items():
            group[f"{TRUTH}/{key}"] = values
        for name_, image in episode.images.items():
            _put_images(group, name_ + IMAGE_SUFFIX, image)
        for key, values in (("state", episode.states), ("gripper_width", episode.widths)):
            group[f"obs/{key}"] = values[:-1]
            group[f"final_obs/{key}"] = values[-1]
        data.move(building, name)
        data.attrs["total"] = int(data.attrs["total"]) + len(episode.actions)
        self._file.flush()

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            self._temporary.replace(self.path)


def read_env_args(path: Path) -> dict[str, Any]:
    """The env_args of a demonstration file. Raises FormatError."""
    with hdf5.open_file(path) as file:
        return _env_args(file, path)


def count_episodes(path: Path) -> int:
    """How many demonstrations a file holds. Raises FormatError."""
    with hdf5.open_file(path) as file:
        return len(hdf5.demos(file, path))


def read_episodes(path: Path, *, allowed: Collection[Split]) -> Iterator[Episode]:
    """Episodes of one file in order of their scene index, one in memory at a time.

    `episode.meta` holds perturbed ("true" or "false"), robot and env_args (JSON).
    Raises LeakageError when the file's split is not in `allowed`, FormatError naming the file and item when it is not HDF5, is
    truncated, lacks something or has a wrong shape, dtype or unit.
    """
    path = Path(path)
    with hdf5.open_file(path) as file:
        env_args = _env_args(file, path)
        split = str(hdf5.attr(file["data"], "split", path))
        splits.require([split], allowed, path.name)
        for name in hdf5.demos(file, path):
            yield _read_demo(hdf5.demo(file, name, path), split, env_args, path)


def read_root(root: Path, *, allowed: Collection[Split], tasks: Collection[str] | None = None) -> Iterator[Episode]:
    """Episodes of every <root>/<split>/<task>.hdf5 of the `allowed` splits (and `tasks`, if given), in sorted order."""
    found = False
    for split in sorted(allowed):
        for path in sorted((Path(root) / split.value).glob("*.hdf5")):
            if tasks is None or path.stem in tasks:
                found = True
                yield from read_episodes(path, allowed=[split])
    if not found:
        wanted = ", ".join(sorted(s.value for s in allowed))
        raise FormatError(f"{Path(root).name}: no demonstration file of split {wanted} for the tasks asked")


class RobomimicSource(Hdf5Source):
    """Our own files as a `Source`. They say their split: of a folder that holds several, the one that the caller gives is read.
    Where no file is of that split, reading raises LeakageError.
    """

    name = "world2act"
    signs = "HDF5 whose /data has the attributes split and env_args"
    own_split = True

    @classmethod
    def detect_file(cls, file: h5py.File) -> bool:
        return {"split", "env_args"} <= set(file["data"].attrs)

    @cached_property
    def robot(self) -> str:
        """The simulator of the first file that can be read."""
        for path in hdf5.files(self.path):
            with suppress(FormatError):
                return str(read_env_args(path)["simulator"])
        return self.name

    @cached_property
    def splits(self) -> dict[Path, str]:
        """File -> its split, of all files that can be read."""
        found = {}
        for path in hdf5.files(self.path):
            with suppress(FormatError), hdf5.open_file(path) as file:
                found[path] = str(hdf5.attr(hdf5.item(file, "data", h5py.Group, path), "split", path))
        return found

    def keys(self) -> Iterator[str]:
        there = self.splits if self.split is not None else {}
        others = {path for path, split in there.items() if split != self.split} if self.split in there.values() else set()
        for key in super().keys():  # noqa: SIM118  (a Source, no mapping)
            if self.path / key.partition(":")[0] not in others:
                yield key

    def _demo(self, group: h5py.Group, path: Path, images: bool) -> Episode:
        env_args = _env_args(group.file, path)
        split = str(hdf5.attr(group.parent, "split", path))
        require_split(split, self.split, path.name)
        episode = _read_demo(group, split, env_args, path, images)
        fps = check_fps(env_args["control_hz"], f"{path.name}: /data: env_args.control_hz")
        return replace(episode, meta={**episode.meta, "fps": f"{fps:g}"})


def _open_partial(path: Path, resume: bool) -> h5py.File:
    """A partial file to write into; a damaged one (its writer was killed) is started anew."""
    if resume and path.exists():
        try:
            return h5py.File(path, "a")
        except OSError:
            path.unlink()
    return h5py.File(path, "w")


def _env_args(file: h5py.File, path: Path) -> dict[str, Any]:
    args = hdf5.json_attr(hdf5.item(file, "data", h5py.Group, path), "env_args", path)
    missing = [key for key in ENV_ARGS if key not in args]
    if missing:
        raise FormatError(f"{path.name}: /data: env_args lacks {', '.join(missing)}")
    if not isinstance(args["cameras"], dict) or not args["cameras"]:
        raise FormatError(f"{path.name}: /data: env_args.cameras must map camera names to cells of the grid")
    if not isinstance(args["chunk"], int) or args["chunk"] < 1:
        raise FormatError(f"{path.name}: /data: env_args.chunk must be a positive integer, got {str(args['chunk'])[:40]}")
    return args


def _with_final(group: h5py.Group, key: str, dtype: type, path: Path) -> npt.NDArray[Any]:
    """obs/<key> (T, ...) and final_obs/<key> (...) as one array (T + 1, ...)."""
    series, last = hdf5.array(group, f"obs/{key}", dtype, path), hdf5.array(group, f"final_obs/{key}", dtype, path)
    if series.shape[1:] != last.shape:
        raise FormatError(f"{path.name}: {group.name}/final_obs/{key}: shape must be {series.shape[1:]}, got {last.shape}")
    return np.concatenate([series, last[None]])


def _read_demo(group: h5py.Group, split: str, env_args: dict[str, Any], path: Path, images: bool = True) -> Episode:
    names = env_args["cameras"] if images else ()
    cameras: dict[str, ImageArray] = {camera: _with_final(group, camera + IMAGE_SUFFIX, np.uint8, path) for camera in names}
    perturbed = bool(hdf5.attr(group, "perturbed", path))
    episode = Episode(
        task=str(hdf5.attr(group, "task", path)),
        split=split,
        index=int(hdf5.attr(group, "index", path)),
        instruction=str(hdf5.attr(group, "instruction", path)),
        images=cameras,
        states=_with_final(group, "state", np.float32, path),
        widths=_with_final(group, "gripper_width", np.float32, path),
        actions=hdf5.array(group, "actions", np.float32, path),
        success=bool(hdf5.attr(group, "success", path)),
        intended=hdf5.array(group, "intended", np.uint8, path).astype(np.bool_) if "intended" in group else None,
        truth=_truth(group, path),
        meta={
            "perturbed": str(perturbed).lower(),
            "robot": str(env_args["simulator"]),
            "env_args": json.dumps(env_args, sort_keys=True),
        },
    )
    if int(hdf5.attr(group, "num_samples", path)) != len(episode.actions):
        raise FormatError(f"{path.name}: {group.name}: num_samples differs from the {len(episode.actions)} actions stored")
    try:
        check_episode(episode, int(env_args["chunk"]), names)
    except ValueError as error:
        raise FormatError(f"{path.name}: {group.name}: {error}") from error
    return episode


def _truth(group: h5py.Group, path: Path) -> dict[str, FloatArray] | None:
    """The simulator's knowledge, if the file has it."""
    if TRUTH not in group:
        return None
    known = hdf5.item(group, TRUTH, h5py.Group, path)
    names = [f"{kind}/{body}" for kind in known for body in hdf5.item(known, kind, h5py.Group, path)]
    return {name: hdf5.array(known, name, np.float32, path) for name in names}


def _put_images(group: h5py.Group, key: str, images: ImageArray) -> None:
    """(T+1, H, W, 3) -> obs/<key> compressed, final_obs/<key>."""
    chunk = (min(16, len(images) - 1), *images.shape[1:])
    group.create_dataset(f"obs/{key}", data=images[:-1], compression="gzip", compression_opts=4, chunks=chunk)
    group[f"final_obs/{key}"] = images[-1]
