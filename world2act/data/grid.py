"""Cameras stitched into one 2x2 image (paper supplement E): primary and wrist on top, bottom row black."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from world2act.types import ImageArray


def stitch(images: Mapping[str, ImageArray], cells: Mapping[str, int]) -> ImageArray:
    """Views (..., h, w, 3) uint8 -> grid (..., 2h, 2w, 3); `cells` maps camera -> 0 top-left, 1 top-right, 2, 3.

    Raises ValueError naming the camera when one is missing, unknown, or differs in dtype or shape.
    """
    if set(images) != set(cells):
        raise ValueError(f"images: cameras must be {sorted(cells)}, got {sorted(images)}")
    first = next(iter(images.values()))
    for name, image in images.items():
        if image.dtype != np.uint8:
            raise ValueError(f"images[{name!r}]: dtype must be uint8, got {image.dtype}")
        if image.shape != first.shape or image.ndim < 3 or image.shape[-1] != 3:
            raise ValueError(f"images[{name!r}]: shape must be (..., h, w, 3) and equal for all cameras, got {image.shape}")
    h, w = first.shape[-3:-1]
    grid = np.zeros((*first.shape[:-3], 2 * h, 2 * w, 3), np.uint8)
    for name, image in images.items():
        row, column = divmod(cells[name], 2)
        grid[..., row * h : (row + 1) * h, column * w : (column + 1) * w, :] = image
    return grid
