"""HDF5 read without trust: what is asked for must be there, lie in this very file, have the right dtype and a bearable size."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from world2act.data.formats import FormatError, Source, check_fps
from world2act.types import Episode

MAX_DATASET_BYTES = 2**30
"""Decompressed size of one array. A small file can declare a huge one; files come from uploads, too."""


SUFFIXES = (".hdf5", ".h5")


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """`path` opened to read. Raises FormatError if it is missing, not HDF5, truncated, or found damaged while it is read."""
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path.name}: no such file")
    if not h5py.is_hdf5(path):
        raise FormatError(f"{path.name}: is not an HDF5 file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise FormatError(f"{path.name}: cannot be opened as HDF5; it is truncated or damaged") from error
    with file:
        try:
            yield file
        except (OSError, RuntimeError, KeyError) as error:  # h5py's words for damage
            raise FormatError(f"{path.name}: is damaged: HDF5 cannot read it ({error})") from error


def demos(file: h5py.File, path: Path) -> list[str]:
    """Names of the demonstrations, /data/demo_<number>, in the order of their numbers; those that `demo` refuses come last."""
    named = {n: n.removeprefix("demo_") for n in item(file, "data", h5py.Group, path) if n.startswith("demo_")}
    return sorted(named, key=lambda n: (0, int(named[n])) if named[n].isdecimal() else (1, n))


def demo(file: h5py.File, name: str, path: Path) -> h5py.Group:
    """Demonstration `name`. Raises FormatError if it is missing or not named demo_<number>."""
    if not name.removeprefix("demo_").isdecimal():
        raise FormatError(f"{path.name}: /data/{name}: a demonstration must be named demo_<number>")
    group: h5py.Group = item(file, f"data/{name}", h5py.Group, path)
    return group


def control_hz(env_args: Mapping[str, Any], default: float, path: Path) -> float:
    """Frames a second, where robosuite's env_args say them."""
    kwargs = env_args.get("env_kwargs", {})
    if not isinstance(kwargs, dict):
        raise FormatError(f"{path.name}: /data: env_args.env_kwargs must be a JSON object")
    return check_fps(kwargs.get("control_freq", default), f"{path.name}: /data: env_args.env_kwargs.control_freq")


def attr(item: h5py.Group, name: str, path: Path) -> Any:
    """Attribute `name`, text decoded. Raises FormatError if it is missing."""
    if name not in item.attrs:
        raise FormatError(f"{path.name}: {item.name}: attribute {name} is missing")
    value = item.attrs[name]
    return value.decode() if isinstance(value, bytes) else value


def json_attr(item: h5py.Group, name: str, path: Path) -> dict[str, Any]:
    """Attribute `name`, which holds a JSON object. Raises FormatError if it is missing or no such thing."""
    try:
        content = json.loads(attr(item, name, path))
    except (TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path.name}: {item.name}: attribute {name} is not JSON") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path.name}: {item.name}: attribute {name} must be a JSON object")
    return content


def item(group: h5py.Group, key: str, kind: type, path: Path) -> Any:
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


def array(group: h5py.Group, key: str, dtype: type | str, path: Path) -> npt.NDArray[Any]:
    """Dataset `key` in memory. dtype: the dtype it must have, or "float" for any real numbers, which come back as float32."""
    dataset = item(group, key, h5py.Dataset, path)
    where = f"{path.name}: {group.name}/{key}"
    if dataset.shape is None:
        raise FormatError(f"{where}: is empty")
    if dataset.external or dataset.is_virtual:
        raise FormatError(f"{where}: is stored in another file; the data must be in the file itself")
    if dataset.dtype.kind not in "fiu" if dtype == "float" else dataset.dtype != dtype:
        wanted = "numbers" if dtype == "float" else np.dtype(dtype).name
        raise FormatError(f"{where}: dtype must be {wanted}, got {dataset.dtype}")
    if dataset.nbytes > MAX_DATASET_BYTES:
        raise FormatError(f"{where}: {dataset.nbytes} bytes, the limit is {MAX_DATASET_BYTES}")
    try:
        values = np.asarray(dataset[()])
    except OSError as error:
        raise FormatError(f"{where}: cannot be read; the file is truncated or damaged") from error
    return values.astype(np.float32) if dtype == "float" else values


def rows(group: h5py.Group, key: str, shape: tuple[int | None, ...], dtype: type | str, path: Path) -> npt.NDArray[Any]:
    """`array` of a given shape; None stands for any size."""
    values = array(group, key, dtype, path)
    if values.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, values.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise FormatError(f"{path.name}: {group.name}/{key}: shape must be ({wanted}), got {values.shape}")
    return values


class Hdf5Source(Source):
    """HDF5 with /data/demo_<number>: one file, or a folder of them at any depth. Keys are <file>:demo_<number>.

    A file of the folder that cannot be opened has one key, its name, so that it is reported as one skipped item.
    """

    @classmethod
    @abstractmethod
    def detect_file(cls, file: h5py.File) -> bool:
        """Whether the open file, which has a group /data, is of this format."""

    @abstractmethod
    def _demo(self, group: h5py.Group, path: Path, images: bool) -> Episode:
        """One demonstration."""

    @classmethod
    def detect(cls, path: Path) -> bool:
        """By the first file that can be read. Raises FormatError, naming the first, if there are files and none can."""
        damaged: FormatError | None = None
        for candidate in files(path):
            try:
                with open_file(candidate) as file:
                    here = isinstance(file.get("data", getlink=True), h5py.HardLink)
                    return here and isinstance(file["data"], h5py.Group) and cls.detect_file(file)
            except FormatError as error:
                damaged = damaged or error
        if damaged is not None:
            raise damaged
        return False

    def keys(self) -> Iterator[str]:
        for path in files(self.path):
            name = path.name if self.path.is_file() else path.relative_to(self.path).as_posix()
            try:
                with open_file(path) as file:
                    numbered = demos(file, path)
            except FormatError:
                yield name
                continue
            yield from (f"{name}:{n}" for n in numbered)

    def _read(self, key: str, images: bool) -> Episode:
        name, _, numbered = key.partition(":")
        path = self.path if self.path.is_file() else self.path / name
        with open_file(path) as file:
            if not numbered:
                demos(file, path)  # raises what `keys` met
            return self._demo(demo(file, numbered, path), path, images)


def files(path: Path) -> list[Path]:
    """`path` itself, or all files below it that are called HDF5, in sorted order."""
    if path.is_file():
        return [path] if path.suffix in SUFFIXES or h5py.is_hdf5(path) else []
    return sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
