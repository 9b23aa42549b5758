"""Episode files from outside: the checks that one passes before it becomes an artifact. All raise ProblemError."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import h5py

from services.gateway.problems import ProblemError, invalid
from services.gateway.settings import GatewaySettings
from services.runtime.paths import below

MAGIC = b"\x89HDF\r\n\x1a\n"
MAX_OBJECTS = 1_000_000
MAX_EXPANSION = 64
"""Uncompressed bytes allowed per byte of the file: images of a simulator compress about tenfold."""


def inside(settings: GatewaySettings, name: str, field: str) -> Path:
    """The path that `name` means in the data folder. 400 when it leaves the folder."""
    try:
        return below(settings.data_root, name, field, "W2A_DATA_ROOT")
    except ValueError as error:
        raise ProblemError(400, str(error)) from None


def stamp(settings: GatewaySettings, episode: str) -> str:
    """What changes when the file or folder that `episode` names does: how many files, their bytes, when the newest was written.

    400 when it leaves the data folder, 404 when it is not there.
    """
    path = inside(settings, episode, "episode")
    if not path.exists():
        raise ProblemError(404, f"episode: {episode[:200]!r} is not in the data folder (W2A_DATA_ROOT)")
    files = [path] if path.is_file() else [Path(at) / name for at, _, names in os.walk(path) for name in names]
    stats = [file.stat() for file in files if file.exists()]
    return f"{len(stats)}-{sum(s.st_size for s in stats)}-{max((s.st_mtime_ns for s in stats), default=0)}"


def too_large(field: str, settings: GatewaySettings) -> ProblemError:
    """413 that names the limit."""
    return ProblemError(413, f"{field}: larger than the limit of {settings.upload_limit_bytes} bytes (W2A_UPLOAD_LIMIT_BYTES)")


def check_bundle(content: bytes) -> None:
    """422 unless `content` starts as a safetensors file does: what is plainly something else is not stored. The policy server
    checks the rest."""
    size = int.from_bytes(content[:8], "little")
    if not 2 <= size <= len(content) - 8 or content[8:9] != b"{":
        raise invalid("file", "is not a safetensors file, or is truncated")


def check_episode(upload: IO[bytes], demo: str | None, field: str = "file") -> None:
    """422 unless `upload` is a whole HDF5 file in the robomimic layout that refers to no other file and holds `demo`.

    Its values are not read: it may be larger than the memory.
    """
    size = upload.seek(0, os.SEEK_END)
    upload.seek(0)
    if upload.read(len(MAGIC)) != MAGIC:
        raise invalid(field, "is not an HDF5 file (its first 8 bytes are not the HDF5 signature)")
    try:
        with h5py.File(upload, "r") as file:
            _check_closed(file, size, field)
            if not isinstance(file.get("data"), h5py.Group):
                raise invalid(field, "has no group /data (robomimic layout)")
            demos = [name for name in file["data"] if name.startswith("demo_")]
            if not demos:
                raise invalid(field, "has no demonstration /data/demo_<n>")
            if demo is not None and demo not in demos:
                raise invalid(
                    "demo", f"{demo!r} is not in the file, which has {len(demos)} demonstrations, the first {demos[0]!r}"
                )
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = "is truncated" if "truncated" in str(error) else "is damaged: HDF5 cannot read it"
        raise invalid(field, f"{reason} ({str(error)[:150]})") from None


def _check_closed(file: h5py.File, size: int, field: str) -> None:
    """Refuse whatever makes a reader open another file, and sizes made to exhaust memory."""
    groups, seen, expanded = [file["/"]], 0, 0
    visited: set[object] = set()
    while groups:
        group = groups.pop()
        for name in group:
            seen += 1
            if seen > MAX_OBJECTS:
                raise invalid(field, f"holds more than {MAX_OBJECTS} objects")
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise invalid(field, f"{group.name}/{name} is a link to another file")
            if isinstance(link, h5py.SoftLink):
                raise invalid(field, f"{group.name}/{name} is a soft link; store the object itself")
            found = group[name]
            if isinstance(found, h5py.Dataset):
                if found.external or found.is_virtual:
                    raise invalid(field, f"{found.name} keeps its values in another file")
                expanded += found.nbytes
            elif isinstance(found, h5py.Group):
                key = h5py.h5o.get_info(found.id).addr
                if key not in visited:  # hard links may form a circle
                    visited.add(key)
                    groups.append(found)
    if expanded > max(size, 1024 * 1024) * MAX_EXPANSION:
        raise invalid(field, f"expands to {expanded} bytes, more than {MAX_EXPANSION} times its size")
