"""One weights file: safetensors with one JSON metadata entry, named by the sha256 of its content. Never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from world2act.signature import METADATA_KEY as KEY

# One metadata key only: safetensors orders several keys at random, which would make equal weights differ in hash.

MAX_HEADER = 16 * 1024 * 1024
"""Bytes of names, shapes and metadata; a thousand times what our largest file has. Beyond it nothing is parsed."""


class WeightsError(ValueError):
    """A weights file that is damaged, of another kind, or trained beside other weights than those in use."""


class MismatchError(WeightsError):
    """Weights that are whole, but do not belong to those in use."""


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


class Stored(nn.Module):
    """A module that is one file of `kind`: weights, configuration (a dataclass) and card. hash: sha256 of that file."""

    kind: ClassVar[str]
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.card: dict[str, Any] = {}
        self._hash: str | None = None

    @staticmethod
    @abstractmethod
    def config_from_json(values: dict[str, Any]) -> Any:
        """The configuration out of a weights file's metadata. Raises KeyError or TypeError when it is another one."""

    @property
    def hash(self) -> str:
        """sha256 of the weights file (of the file that `save` would write with an empty card, if never saved or loaded)."""
        return self._hash or content_hash(to_bytes(self.state_dict(), self._metadata({})))

    def _metadata(self, card: dict[str, Any]) -> dict[str, Any]:
        return {"kind": self.kind, "config": asdict(self.config), "card": card}

    def save(self, path: Path | str, card: dict[str, Any]) -> None:
        """Write weights, configuration and card to `path`, whole or not at all."""
        self._hash, self.card = write(path, self.state_dict(), self._metadata(card)), card

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read one in evaluation mode, gradients off. Raises WeightsError if the file holds anything else."""
        tensors, metadata, found = read(path, cls.kind)
        try:
            model = cls(cls.config_from_json(metadata["config"]))
            model.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{path}: weights and configuration do not fit ({str(error).splitlines()[0]})") from None
        model.card, model._hash = metadata.get("card", {}), found
        return model.eval().requires_grad_(False)
