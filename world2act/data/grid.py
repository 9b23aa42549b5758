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


def letterbox(images: ImageArray, height: int, width: int) -> ImageArray:
    """Images (..., h, w, 3) uint8 -> (..., height, width, 3): scaled to fit, centred on black, never cropped (the authors' code).
    Images of that size are returned as they are."""
    h, w = images.shape[-3:-1]
    if (h, w) == (height, width):
        return images
    import torch  # the segmenter stitches too, and has no torch

    scale = min(height / h, width / w)
    size = (max(1, round(h * scale)), max(1, round(w * scale)))
    flat = torch.from_numpy(np.ascontiguousarray(images)).reshape(-1, h, w, 3).permute(0, 3, 1, 2).float()
    scaled = torch.nn.functional.interpolate(flat, size, mode="bilinear", antialias=True, align_corners=False)
    out = np.zeros((len(flat), height, width, 3), np.uint8)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    out[:, top : top + size[0], left : left + size[1]] = scaled.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return out.reshape(*images.shape[:-3], height, width, 3)
