"""Weights files: one safetensors file with its configuration and card inside; its hash is its identity.

All JSON goes under one metadata key, so that equal weights give equal bytes and therefore equal hashes. Never a pickle.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

KEY = "world2act"


class WeightsError(ValueError):
    """A weights file that is damaged, of another kind, or that does not fit its own configuration."""


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds: tensors by name, configuration, card (free JSON), sha256 of the whole file."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    card: dict[str, Any]
    hash: str


def serialise(kind: str, tensors: dict[str, torch.Tensor], config: dict[str, Any], card: dict[str, Any]) -> bytes:
    """The bytes of a weights file of this kind ('worldmodel', 'base', ...)."""
    header = json.dumps({"kind": kind, "config": config, "card": card}, sort_keys=True, allow_nan=False)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata={KEY: header})


def digest(data: bytes) -> str:
    """The identity of a weights file: sha256 of its content."""
    return hashlib.sha256(data).hexdigest()


def write(path: Path, data: bytes) -> str:
    """Write a file whole or not at all (temporary name, then rename); returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    temporary.replace(path)
    return digest(data)


def read(path: Path, kind: str) -> WeightsFile:
    """Read a weights file. Raises FileNotFoundError, or WeightsError naming the file and what is wrong with it."""
    data = path.read_bytes()
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][KEY])
        tensors = safetensors.torch.load(data)
        found, config, card = header["kind"], header["config"], header["card"]
    except (KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: not a weights file of this project ({type(error).__name__})") from None
    if found != kind:
        raise WeightsError(f"{path}: holds {found!r} weights, expected {kind!r}")
    return WeightsFile(tensors, config, card, digest(data))


def fill(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path | str) -> None:
    """Load tensors into a model. Raises WeightsError naming the file when names or shapes differ."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise WeightsError(f"{path}: weights do not fit the configuration beside them ({reason})") from None
