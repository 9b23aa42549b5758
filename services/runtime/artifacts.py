"""The artifact store: content-addressed, write once, checked on read.

Streams carry names (`sha256-<hex>.<suffix>`), never tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy.typing as npt

from services.runtime.tensors import pack, unpack, unpack_metadata

PIECE = 4 * 1024 * 1024
NAME = re.compile(r"^sha256-([0-9a-f]{64})\.([a-z0-9]{1,16})$")


class ArtifactError(ValueError):
    """A name that is no artifact's, a missing artifact, or bytes that do not match their name."""


def content_key(*parts: object) -> str:
    """sha256 (hex) of the canonical JSON of `parts`: the key of a cached computation."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


class ArtifactStore:
    """Artifacts under an fsspec URL. Safe for many writers: bytes go to a temporary name and are renamed."""

    def __init__(self, url: str) -> None:
        if url.startswith("file://"):
            url = str(Path(url.removeprefix("file://")).resolve())
        self.fs, self.root = fsspec.core.url_to_fs(url)
        self.fs.makedirs(self.root, exist_ok=True)

    def _write(self, path: str, data: bytes) -> None:
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        with self.fs.open(temporary, "wb") as f:
            f.write(data)
        self.fs.mv(temporary, path)

    def path(self, name: str) -> str:
        """Where artifact `name` lies. Raises ArtifactError for anything that is not an artifact's name."""
        if not NAME.match(name):
            raise ArtifactError(f"artifact: {name[:80]!r} is not of the form sha256-<64 hex>.<suffix>")
        return f"{self.root}/{name[7:9]}/{name}"

    def put(self, data: bytes, suffix: str) -> str:
        """Store bytes; the same bytes give the same name and are written once."""
        name = f"sha256-{hashlib.sha256(data).hexdigest()}.{suffix}"
        path = self.path(name)
        if not self.fs.exists(path):
            self._write(path, data)
        return name

    def put_file(self, source: IO[bytes], suffix: str) -> str:
        """`put` of all that `source` holds from where it is, a piece at a time: memory does not grow with it."""
        temporary = f"{self.root}/incoming/{uuid.uuid4().hex}.tmp"
        self.fs.makedirs(f"{self.root}/incoming", exist_ok=True)
        digest = hashlib.sha256()
        try:
            with self.fs.open(temporary, "wb") as f:
                while piece := source.read(PIECE):
                    digest.update(piece)
                    f.write(piece)
            name = f"sha256-{digest.hexdigest()}.{suffix}"
            path = self.path(name)
            if not self.fs.exists(path):
                self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                self.fs.mv(temporary, path)
        finally:
            if self.fs.exists(temporary):
                self.fs.rm(temporary)
        return name

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """`name` as a file of this machine, checked; memory does not grow with it. Raises ArtifactError as `get`."""
        path = self.path(name)
        with tempfile.NamedTemporaryFile(suffix=f".{name.rsplit('.', 1)[1]}") as copy:
            here = "file" in self.fs.protocol
            digest = hashlib.sha256()
            try:
                with self.fs.open(path, "rb") as f:
                    while piece := f.read(PIECE):
                        digest.update(piece)
                        if not here:
                            copy.write(piece)
            except FileNotFoundError:
                raise ArtifactError(f"artifact: {name} is not in the store") from None
            if f"sha256-{digest.hexdigest()}" != name.rsplit(".", 1)[0]:
                raise ArtifactError(f"artifact: {name} is corrupt: its bytes do not match its name")
            copy.flush()
            yield Path(path) if here else Path(copy.name)

    def get(self, name: str) -> bytes:
        """The bytes of `name`, checked against it. Raises ArtifactError when missing or corrupt."""
        path = self.path(name)
        try:
            with self.fs.open(path, "rb") as f:
                data = bytes(f.read())
        except FileNotFoundError:
            raise ArtifactError(f"artifact: {name} is not in the store") from None
        if f"sha256-{hashlib.sha256(data).hexdigest()}" != name.rsplit(".", 1)[0]:
            raise ArtifactError(f"artifact: {name} is corrupt: its bytes do not match its name")
        return data

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.path(name)))

    def put_tensors(self, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None) -> str:
        """Store named arrays (and text) as safetensors."""
        return self.put(pack(arrays, metadata), "safetensors")

    def get_tensors(self, name: str) -> dict[str, npt.NDArray[Any]]:
        return unpack(self.get(name))

    def get_metadata(self, name: str) -> dict[str, str]:
        return unpack_metadata(self.get(name))

    def remember(self, key: str, value: str) -> None:
        """Cache entry: `key` (from `content_key`) -> a short JSON text, such as an artifact's name."""
        self._write(f"{self.root}/keys/{key[:2]}/{key}", value.encode())

    def recall(self, key: str) -> str | None:
        """The text remembered under `key`, or None."""
        try:
            with self.fs.open(f"{self.root}/keys/{key[:2]}/{key}", "rb") as f:
                return bytes(f.read()).decode()
        except FileNotFoundError:
            return None
