"""Demonstrations in HDF5, in robomimic's layout. One file per task and split: <root>/<split>/<task>.hdf5.

/data            attrs: split, total (actions in all demonstrations), env_args (JSON: env_name, simulator, control_hz, chunk,
                 cameras {name: cell}, gripper_open_width, gripper_width_index)
/data/demo_<i>   attrs: num_samples T (a multiple of M), index i of the scene in its split, task, instruction, success,
                 perturbed;
                 actions (T, A) f32; obs/<camera>_image (T, H, W, 3) u8; obs/state (T, S) f32; obs/gripper_width (T,) f32, metres;
                 final_obs/<the same keys>: the observation after the last action, without the T axis

obs[t] is seen *before* actions[t] (robomimic's convention; LIBERO's files record it after).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from world2act import splits
from world2act.splits import Split
from world2act.types import Episode, ImageArray

MAX_WIDTH = 0.5
"""Metres. A wider gripper means that the file's widths are in another unit, most likely millimetres."""

MAX_DATASET_BYTES = 2**30
"""Decompressed size of one array. A small file can declare a huge one; files come from uploads, too."""

ENV_ARGS = ("env_name", "simulator", "control_hz", "chunk", "cameras", "gripper_open_width", "gripper_width_index")
IMAGE_SUFFIX = "_image"


class FormatError(ValueError):
    """A file that is not what this module writes; the message names the file, the item and what was expected."""


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


def check_episode(episode: Episode, chunk: int, cameras: Collection[str]) -> None:
    """Raise ValueError, naming the field, unless shapes, dtypes and units are those of `Episode` and `chunk` divides T."""
    steps = len(episode.actions)
    if steps == 0 or steps % chunk:
        raise ValueError(f"actions: {steps} actions; the number must be a positive multiple of {chunk}")
    if set(episode.images) != set(cameras):
        raise ValueError(f"images: cameras must be {sorted(cameras)}, got {sorted(episode.images)}")
    for name, image in episode.images.items():
        if image.dtype != np.uint8 or image.ndim != 4 or image.shape[0] != steps + 1 or image.shape[-1] != 3:
            raise ValueError(f"images[{name!r}]: must be uint8 ({steps + 1}, H, W, 3), got {image.dtype} {image.shape}")
    for field, values, rows, ndim in (
        ("actions", episode.actions, steps, 2),
        ("states", episode.states, steps + 1, 2),
        ("widths", episode.widths, steps + 1, 1),
    ):
        if values.dtype != np.float32 or values.ndim != ndim or len(values) != rows:
            raise ValueError(f"{field}: must be float32 with {ndim} axes and {rows} rows, got {values.dtype} {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{field}: values must be finite")
    if episode.intended is not None and episode.intended.shape != (steps,):
        raise ValueError(f"intended: must be ({steps},), one per action, got {episode.intended.shape}")
    if episode.widths.min() < 0 or episode.widths.max() > MAX_WIDTH:
        raise ValueError(
            f"widths: must lie in [0, {MAX_WIDTH}] metres, got up to {episode.widths.max():g}; is the unit millimetres?"
        )


def read_env_args(path: Path) -> dict[str, Any]:
    """The env_args of a demonstration file. Raises FormatError."""
    with _open(path) as file:
        return _env_args(file, path)


def count_episodes(path: Path) -> int:
    """How many demonstrations a file holds. Raises FormatError."""
    with _open(path) as file:
        return len(_demos(file, path))


def read_episodes(path: Path, *, allowed: Collection[Split]) -> Iterator[Episode]:
    """Episodes of one file in order of their scene index, one in memory at a time.

    `episode.meta` holds perturbed ("true" or "false") and env_args (JSON). Raises LeakageError when the file's split is not
    in `allowed`, FormatError naming the file and item when it is not HDF5, is truncated, lacks something or has a wrong
    shape, dtype or unit.
    """
    path = Path(path)
    with _open(path) as file:
        env_args = _env_args(file, path)
        split = str(_attr(file["data"], "split", path))
        splits.require([split], allowed, path.name)
        for name in _demos(file, path):
            yield _read_demo(_item(file, f"data/{name}", h5py.Group, path), split, env_args, path)


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


def _open(path: Path) -> h5py.File:
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path.name}: no such file")
    if not h5py.is_hdf5(path):
        raise FormatError(f"{path.name}: is not an HDF5 file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise FormatError(f"{path.name}: cannot be opened as HDF5; it is truncated or damaged") from error


def _open_partial(path: Path, resume: bool) -> h5py.File:
    """A partial file to write into; a damaged one (its writer was killed) is started anew."""
    if resume and path.exists():
        try:
            return h5py.File(path, "a")
        except OSError:
            path.unlink()
    return h5py.File(path, "w")


def _env_args(file: h5py.File, path: Path) -> dict[str, Any]:
    text = _attr(_item(file, "data", h5py.Group, path), "env_args", path)
    try:
        args = json.loads(text)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path.name}: /data: attribute env_args is not JSON") from error
    missing = [key for key in ENV_ARGS if key not in args] if isinstance(args, dict) else list(ENV_ARGS)
    if missing:
        raise FormatError(f"{path.name}: /data: env_args lacks {', '.join(missing)}")
    if not isinstance(args["cameras"], dict) or not args["cameras"]:
        raise FormatError(f"{path.name}: /data: env_args.cameras must map camera names to cells of the grid")
    if not isinstance(args["chunk"], int) or args["chunk"] < 1:
        raise FormatError(f"{path.name}: /data: env_args.chunk must be a positive integer, got {str(args['chunk'])[:40]}")
    return dict(args)


def _demos(file: h5py.File, path: Path) -> list[str]:
    data = _item(file, "data", h5py.Group, path)
    try:
        return sorted((n for n in data if n.startswith("demo_")), key=lambda n: int(n.removeprefix("demo_")))
    except ValueError as error:
        raise FormatError(f"{path.name}: /data: demonstrations must be named demo_<number>") from error


def _attr(item: h5py.Group, name: str, path: Path) -> Any:
    if name not in item.attrs:
        raise FormatError(f"{path.name}: {item.name}: attribute {name} is missing")
    value = item.attrs[name]
    return value.decode() if isinstance(value, bytes) else value


def _item(group: h5py.Group, key: str, kind: type, path: Path) -> Any:
    """The group or dataset at `key`, which must lie in this very file: links can lead anywhere on the machine."""
    item = group
    for part in key.split("/"):
        link = item.get(part, getlink=True) if isinstance(item, h5py.Group) else None
        if link is not None and not isinstance(link, h5py.HardLink):
            raise FormatError(f"{path.name}: {group.name}: {key} is a link; the data must be in the file itself")
        item = item[part] if link is not None else None
    if not isinstance(item, kind):
        name = "group /data" if key == "data" else f"{group.name}: {'dataset' if kind is h5py.Dataset else 'group'} {key}"
        raise FormatError(f"{path.name}: {name} is missing")
    return item


def _array(group: h5py.Group, key: str, dtype: type, path: Path) -> npt.NDArray[Any]:
    dataset = _item(group, key, h5py.Dataset, path)
    if dataset.external or dataset.is_virtual:
        raise FormatError(f"{path.name}: {group.name}/{key}: is stored in another file; the data must be in the file itself")
    if dataset.dtype != dtype:
        raise FormatError(f"{path.name}: {group.name}/{key}: dtype must be {np.dtype(dtype).name}, got {dataset.dtype}")
    if dataset.nbytes > MAX_DATASET_BYTES:
        raise FormatError(f"{path.name}: {group.name}/{key}: {dataset.nbytes} bytes, the limit is {MAX_DATASET_BYTES}")
    try:
        return np.asarray(dataset[()])
    except OSError as error:
        raise FormatError(f"{path.name}: {group.name}/{key}: cannot be read; the file is truncated or damaged") from error


def _with_final(group: h5py.Group, key: str, dtype: type, path: Path) -> npt.NDArray[Any]:
    """obs/<key> (T, ...) and final_obs/<key> (...) as one array (T + 1, ...)."""
    series, last = _array(group, f"obs/{key}", dtype, path), _array(group, f"final_obs/{key}", dtype, path)
    if series.shape[1:] != last.shape:
        raise FormatError(f"{path.name}: {group.name}/final_obs/{key}: shape must be {series.shape[1:]}, got {last.shape}")
    return np.concatenate([series, last[None]])


def _read_demo(group: h5py.Group, split: str, env_args: dict[str, Any], path: Path) -> Episode:
    cameras: dict[str, ImageArray] = {
        camera: _with_final(group, camera + IMAGE_SUFFIX, np.uint8, path) for camera in env_args["cameras"]
    }
    perturbed = bool(_attr(group, "perturbed", path))
    episode = Episode(
        task=str(_attr(group, "task", path)),
        split=split,
        index=int(_attr(group, "index", path)),
        instruction=str(_attr(group, "instruction", path)),
        images=cameras,
        states=_with_final(group, "state", np.float32, path),
        widths=_with_final(group, "gripper_width", np.float32, path),
        actions=_array(group, "actions", np.float32, path),
        success=bool(_attr(group, "success", path)),
        intended=_array(group, "intended", np.uint8, path).astype(np.bool_) if "intended" in group else None,
        meta={"perturbed": str(perturbed).lower(), "env_args": json.dumps(env_args, sort_keys=True)},
    )
    if int(_attr(group, "num_samples", path)) != len(episode.actions):
        raise FormatError(f"{path.name}: {group.name}: num_samples differs from the {len(episode.actions)} actions stored")
    try:
        check_episode(episode, int(env_args["chunk"]), env_args["cameras"])
    except ValueError as error:
        raise FormatError(f"{path.name}: {group.name}: {error}") from error
    return episode


def _put_images(group: h5py.Group, key: str, images: ImageArray) -> None:
    """(T+1, H, W, 3) -> obs/<key> compressed, final_obs/<key>."""
    chunk = (min(16, len(images) - 1), *images.shape[1:])
    group.create_dataset(f"obs/{key}", data=images[:-1], compression="gzip", compression_opts=4, chunks=chunk)
    group[f"final_obs/{key}"] = images[-1]
