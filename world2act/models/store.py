"""One weights file: safetensors with one JSON metadata entry, named by the sha256 of its content. Never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from world2act.signature import METADATA_KEY as KEY

# One metadata key only: safetensors orders several keys at random, which would make equal weights differ in hash.

MAX_HEADER = 16 * 1024 * 1024
"""Bytes of names, shapes and metadata; a thousand times what our largest file has. Beyond it nothing is parsed."""


class WeightsError(ValueError):
    """A weights file that is damaged, of another kind, or trained beside other weights than those in use."""


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The file content of `tensors` and `metadata`; equal input gives equal bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content: bytes = save_bytes(contiguous, {KEY: json.dumps(metadata, sort_keys=True)})
    return content


def content_hash(content: bytes) -> str:
    """sha256 in hexadecimal: the name that other weights refer to."""
    return hashlib.sha256(content).hexdigest()


def write(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write the file whole or not at all; returns its hash."""
    content = to_bytes(tensors, metadata)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
    return content_hash(content)


def read(path: Path | str, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors, metadata and hash of a file of `kind` (metadata["kind"]). Raises WeightsError or FileNotFoundError."""
    return parse(Path(path).read_bytes(), kind, str(path))


def parse(content: bytes, kind: str, name: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """`read` of bytes in memory; `name` stands in the error."""
    size = int.from_bytes(content[:8], "little")
    if size > MAX_HEADER:
        raise WeightsError(f"{name}: not a safetensors file of ours: its header claims {size} bytes, the limit is {MAX_HEADER}")
    try:
        tensors = load_bytes(content)
        metadata = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][KEY])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{name}: not a safetensors file with World2Act metadata ({error})") from None
    if not isinstance(metadata, dict):
        raise WeightsError(f"{name}: not a safetensors file with World2Act metadata (it must be a JSON object)")
    if metadata.get("kind") != kind:
        raise WeightsError(f"{name}: kind must be {kind!r}, got {metadata.get('kind')!r}")
    return tensors, metadata, content_hash(content)
