"""World-model backbones: what Triton's `worldmodel` serves. A new one is one file here and one line in BACKBONES."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from services.worldmodel.settings import WorldModelSettings

Frames = npt.NDArray[np.uint8]
Latents = npt.NDArray[np.float32]

BACKBONES = {
    "small": "services.worldmodel.backbones.small",
    "cosmos_predict2": "services.worldmodel.backbones.cosmos_predict2",
    "wan22": "services.worldmodel.backbones.wan22",
    "ltx_video": "services.worldmodel.backbones.ltx_video",
    "hunyuan_video15": "services.worldmodel.backbones.hunyuan_video15",
}
"""name -> module with `load(settings, device) -> Backbone` and `weights_hash(settings, device) -> str`, which loads nothing."""


class BackboneMemoryError(RuntimeError):
    """A clip does not fit into memory. The backbone goes on working."""


@dataclass(frozen=True)
class BackboneInfo:
    """What a caller must know: weights' hash (sha256 hex), sizes, rates.

    frame_shape (H, W, 3) of start frames and decoded frames, of which the rows from `active_rows` on are constant black;
    latent_shape (C, h, w); `temporal_compression` M frames per latent, so a clip of 1 + n latents has 1 + M*n frames;
    `max_horizon` latents after latent 0; `fps` of decoded frames; `steps`, `guidance`: what a call's 0 stands for;
    `letterboxes`: start frames of any size are taken, and letterboxed; `rows`: rows of a call at most, so that it ends in time.
    """

    name: str
    hash: str
    frame_shape: tuple[int, int, int]
    active_rows: int
    latent_shape: tuple[int, int, int]
    temporal_compression: int
    max_horizon: int
    fps: float
    steps: int = 1
    guidance: float = 1.0
    letterboxes: bool = False
    rows: int = 64

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

        steps, guidance: 0 stands for the backbone's own. Raises ValueError naming the field that is out of range, and
        BackboneMemoryError.
        """
        ...

    def denoise_once(self, frames: Frames, prompts: Sequence[str], seeds: Sequence[int]) -> Latents:
        """True clips (B, 1+M*n, H, W, 3) -> latents (B, 1+n, C, h, w): noised to a random level, denoised in one step (METHOD
        section 3, the authors' code). Latent 0 is the start."""
        ...

    def encode(self, frames: Frames) -> Latents:
        """Frames (B, 1+M*n, H, W, 3) -> true latents (B, 1+n, C, h, w)."""
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


def load_backbone(settings: WorldModelSettings, device: str) -> Backbone:
    """The backbone that the settings name on a torch device. Raises ValueError for an unknown name or unusable weights."""
    backbone: Backbone = _module(settings.backbone).load(settings, device)
    return backbone


def weights_hash(settings: WorldModelSettings, device: str) -> str:
    """What `load_backbone(...).info.hash` would be, without building the network."""
    return str(_module(settings.backbone).weights_hash(settings, device))
