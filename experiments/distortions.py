"""What cameras suffer: the paper argues that latents ignore what pixels show too much of, so methods are compared under it too.

Each maps a camera grid uint8 (H, W, 3), numbers that name the episode, and the chunk to what is seen; black rows (cells without a
camera) stay black. New textures are drawn by the simulator instead (`Environment.paint`): of table, floor and walls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.arena import Distortion
from world2act.types import ImageArray

NOISE = 20.0  # grey levels
PATCHES, PATCH = 3, 8  # distracting squares per view, pixels
VIEW = 64


def noise(grid: ImageArray, episode: Sequence[int], chunk: int) -> ImageArray:
    """Sensor noise: independent normal noise of 20 grey levels in every pixel and frame."""
    rng = np.random.default_rng((*episode, chunk))
    noisy = (grid + rng.normal(0.0, NOISE, grid.shape)).clip(0, 255).astype(np.uint8)
    return _where_seen(grid, noisy)


def light(grid: ImageArray, episode: Sequence[int], chunk: int) -> ImageArray:
    """New light: each episode has its own gain (0.6 to 1.4) per colour channel."""
    rng = np.random.default_rng(episode)
    tinted = (grid * rng.uniform(0.6, 1.4, 3)).clip(0, 255).astype(np.uint8)
    return _where_seen(grid, tinted)


def distractors(grid: ImageArray, episode: Sequence[int], chunk: int) -> ImageArray:
    """Three coloured squares of 8 pixels in each view, new places in every frame."""
    rng = np.random.default_rng((*episode, chunk))
    out = grid.copy()
    for left in (0, VIEW):
        for _ in range(PATCHES):
            y, x = rng.integers(0, VIEW - PATCH, 2)
            out[y : y + PATCH, left + x : left + x + PATCH] = rng.integers(0, 256, 3)
    return out


def _where_seen(grid: ImageArray, changed: ImageArray) -> ImageArray:
    seen = grid.reshape(len(grid), -1).any(axis=1)[:, None, None]
    return np.where(seen, changed, grid)


TEXTURES = "textures"
DISTORTIONS: dict[str, Distortion | None] = {
    "none": None,
    "noise": noise,
    "light": light,
    "distractors": distractors,
    TEXTURES: None,
}
