"""Names, shapes and units that every part shares.

Symbols (METHOD: paper section 3): M actions per chunk = temporal compression of the video VAE; A action size;
S proprioception size; D shared latent size; T actions in an episode; K latents in a clip = 1 + T / M.

Chunk alignment. The VAE is causal: latent 0 holds frame 0 alone; latent k >= 1 holds frames M(k-1)+1 .. Mk, the result
of actions M(k-1) .. Mk-1, that is of action chunk k-1. `chunk_of_latent` is the one place that knows this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

M = 4
"""Actions per chunk and temporal compression of the video VAE."""

D = 32
"""Size of the shared latent space."""

FloatArray = npt.NDArray[np.float32]
ImageArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

Device = Literal["auto", "cpu", "cuda"]
"""Where a training runs; auto: the GPU where torch sees one."""


def chunk_of_latent(k: int) -> int:
    """The action chunk whose result latent `k` >= 1 shows: k - 1. Latent 0 is conditioning only."""
    if k < 1:
        raise ValueError("latent 0 holds the start frame alone and pairs with no action chunk")
    return k - 1


@dataclass(frozen=True)
class Episode:
    """One recorded demonstration.

    cues: what else the source knows of contact, for segmentation: "command" (T+1,), the gripper command of the action that led to
    each frame, -1 open to +1 close; "hand" (T+1, 3), "object/<name>" (T+1, 3), metres; "force" (T+1, 3) on the hand, newtons.
    images: camera -> uint8 (T+1, H, W, 3), frame t before action t, the last one after the last action; none where a reader
    was asked for none. states: float32 (T+1, S) proprioception; widths: float32 (T+1,) gripper opening in metres, all NaN where
    the source has none; actions: float32 (T, A), A = 0 where it has none. meta: world2act/data/formats.py says what is in it.
    intended: bool (T,), False where the action is not what the demonstrator wanted (a disturbance was added); None: all are.
    truth: what the simulator knew, name -> float32 (T+1,), as `Environment.truth` names it (touch/<body>, height/<body>,
    joint/<body>); None where nobody knows. For scores only: no policy or model may see it.
    """

    task: str
    split: str
    index: int
    instruction: str
    images: dict[str, ImageArray]
    states: FloatArray
    widths: FloatArray
    actions: FloatArray
    success: bool
    intended: BoolArray | None = None
    truth: dict[str, FloatArray] | None = None
    meta: dict[str, str] = field(default_factory=dict)
    cues: dict[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True)
class Skill:
    """One atomic skill of a segmented episode: actions `start` .. `end`-1, frames `start` .. `end` (both inclusive)."""

    prompt: str
    start: int
    end: int
    reason: str = ""


@dataclass(frozen=True)
class Clip:
    """A skill cut out of an episode, in whole chunks.

    frames: uint8 (1 + M*n, H, W, 3) camera grid; actions: float32 (n, M, A); intended: bool (n,), False where a disturbance
    acted: the frames show it, but no model can foresee it.
    """

    task: str
    prompt: str
    frames: ImageArray
    actions: FloatArray
    intended: BoolArray
    split: str
    index: int


@dataclass(frozen=True)
class Trajectory:
    """One executed episode, as Stage 2 sees it: what was seen and done at each of n chunk starts. No reward, no success.

    frames: uint8 (n, H, W, 3) camera grid at each chunk start; states: float32 (n, S); base, executed: float32 (n, M, A)
    in the simulator's action units; prompts: the active skill at each chunk start; version: the acting policy's.
    """

    task: str
    split: str
    index: int
    version: int
    frames: ImageArray
    states: FloatArray
    base: FloatArray
    executed: FloatArray
    prompts: tuple[str, ...]
    instruction: str
    key: str = ""
