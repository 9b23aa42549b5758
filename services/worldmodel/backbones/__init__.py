"""World-model backbones: what Triton's `worldmodel` serves. A new one is one file here and one line in BACKBONES."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
Latents = npt.NDArray[np.float32]

BACKBONES = {
    "small": "services.worldmodel.backbones.small",
}
"""name -> module with `load(zoo: Path, device: str) -> Backbone` and `weights_hash(zoo: Path) -> str`, which loads no network."""


@dataclass(frozen=True)
class BackboneInfo:
    """What a caller must know: weights' hash (sha256 hex), sizes, rates.

    frame_shape (H, W, 3) of start frames and decoded frames, of which the rows from `active_rows` on are constant black;
    latent_shape (C, h, w); `temporal_compression` M frames per latent, so a clip of 1 + n latents has 1 + M*n frames;
    `max_horizon` latents after latent 0; `fps` of decoded frames.
    """

    name: str
    hash: str
    frame_shape: tuple[int, int, int]
    active_rows: int
    latent_shape: tuple[int, int, int]
    temporal_compression: int
    max_horizon: int
    fps: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BackboneInfo:
        return cls(**{**values, "frame_shape": tuple(values["frame_shape"]), "latent_shape": tuple(values["latent_shape"])})


class Backbone(Protocol):
    """A frozen world model. Rows do not depend on the rows beside them; a row's result is a function of its own arguments."""

    info: BackboneInfo

    def imagine(
        self, start: Frames, prompts: Sequence[str], seeds: Sequence[int], horizon: int, steps: int, guidance: float
    ) -> Latents:
        """Start frames (B, H, W, 3), a prompt and a seed a row -> latents (B, 1+horizon, C, h, w); latent 0 is the start.

        Raises ValueError naming the field that is out of range.
        """
        ...

    def decode(self, latents: Latents) -> Frames:
        """(B, 1+n, C, h, w) -> frames (B, 1+M*n, H, W, 3)."""
        ...

    def last_frame(self, latents: Latents) -> Frames:
        """(B, 1+n, C, h, w) -> the last decoded frame (B, H, W, 3), without decoding the others where the decoder allows it."""
        ...


def _module(name: str) -> Any:
    if name not in BACKBONES:
        raise ValueError(f"backbone: {name!r} is unknown; choose one of {', '.join(sorted(BACKBONES))}")
    return importlib.import_module(BACKBONES[name])


def load_backbone(name: str, zoo: Path, device: str) -> Backbone:
    """The backbone `name` with weights from the folder `zoo` on a torch device. Raises ValueError for an unknown name."""
    backbone: Backbone = _module(name).load(zoo, device)
    return backbone


def weights_hash(name: str, zoo: Path) -> str:
    """What `load_backbone(name, zoo, ...).info.hash` would be, without building the network."""
    return str(_module(name).weights_hash(zoo))
