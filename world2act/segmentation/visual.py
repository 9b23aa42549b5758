"""Change points of a film, for episodes without a gripper signal and as a second opinion.

The decomposition of UVD (Zhang et al., "Universal Visual Decomposer", arXiv 2310.08581, section III): the last frame is a goal;
going back from it, the distance of each frame's embedding to the goal's grows; where it stops growing, an earlier subgoal
was reached. That frame is the next goal, and so on to the start. UVD takes embeddings of a pretrained encoder (VIP, R3M);
here any will do: `pixel_features`, or a VAE's latents, flattened.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from world2act.types import ImageArray

Embeddings = npt.NDArray[np.float64]

MAX_VIDEO_FRAMES = 5_000
"""Longest film accepted: smoothing compares all pairs of frames."""


def pixel_features(frames: ImageArray, side: int = 16) -> Embeddings:
    """Frames uint8 (F, H, W, 3) as how their colours are spread: (F, 2 * side * 3).

    The picture's mean colour in [0, 1] above each of `side` lines and left of each of `side` lines, black below and right of
    them. Unlike the colours themselves, these differ the more the further a thing has moved (two spreads along a line differ by
    the distance that one is moved to make the other). Raises ValueError for frames of another shape or too small.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or min(frames.shape[1:3]) < side:
        raise ValueError(f"frames: must be uint8 (F, H, W, 3) with H and W at least {side}, got {frames.dtype} {frames.shape}")
    rows, columns = (np.linspace(0, n, side + 1).astype(int)[1:] - 1 for n in frames.shape[1:3])
    area = 255.0 * frames.shape[1] * frames.shape[2]
    above = frames.sum(2, dtype=np.float64).cumsum(1)[:, rows] / area
    left = frames.sum(1, dtype=np.float64).cumsum(1)[:, columns] / area
    features: Embeddings = np.concatenate([above, left], 1).reshape(len(frames), -1)
    return features


def change_points(embeddings: npt.ArrayLike, *, min_interval: int = 18, gamma: float = 0.08, margin: float = 0.02) -> list[int]:
    """Frames at which a subgoal is reached, in time order, without the first and the last; embeddings (F, E), one per frame.

    min_interval: least frames between two subgoals, and from the start; gamma: the smoothing kernel is exp(-gamma * frames^2)
    (both UVD's). margin: a peak must stand out from the lowest distance since the goal and from the start's side by this share
    of the curve's range, so that noise on a plateau is no peak (not in UVD, whose encoders are smoother than pixels).
    Raises ValueError naming the field.
    """
    x = np.asarray(embeddings, dtype=np.float64)
    if x.ndim != 2 or not 0 < len(x) <= MAX_VIDEO_FRAMES or not np.isfinite(x).all():
        raise ValueError(f"embeddings: must be finite numbers (F, E) with 1 to {MAX_VIDEO_FRAMES} frames, got {x.shape}")
    if min_interval < 1 or not gamma > 0 or not 0 <= margin < 1:
        raise ValueError("min_interval, gamma, margin: must be at least 1, above 0, and in [0, 1)")
    found: list[int] = []
    goal = len(x) - 1
    while goal > min_interval:
        distance = _smooth(np.linalg.norm(x[: goal + 1] - x[goal], axis=1), gamma)
        peak = _last_peak(distance, goal - min_interval, margin)
        if peak is None or peak < min_interval:
            break
        found.append(peak)
        goal = peak
    return found[::-1]


def _smooth(values: Embeddings, gamma: float) -> Embeddings:
    """Kernel regression (Nadaraya-Watson) with a Gaussian kernel; values (F,)."""
    t = np.arange(values.size)
    reach = int(np.ceil(np.sqrt(30 / gamma)))  # beyond it the kernel is below 1e-13
    kernel = np.exp(-gamma * np.arange(-reach, reach + 1) ** 2)
    smooth = np.convolve(values, kernel, "full")[reach : reach + t.size]
    weight = np.convolve(np.ones(t.size), kernel, "full")[reach : reach + t.size]
    result: Embeddings = smooth / weight
    return result


def _last_peak(distance: Embeddings, before: int, margin: float) -> int | None:
    """The last local maximum of `distance` (F,) at or before frame `before` that stands out; None if there is none."""
    inner = distance[1:-1]
    peaks = np.flatnonzero((inner > distance[:-2]) & (inner >= distance[2:])) + 1
    least = margin * float(np.ptp(distance))
    for p in peaks[peaks <= before][::-1].tolist():
        higher = np.flatnonzero(distance[:p] > distance[p])  # the dip on the start's side, up to the next higher frame
        dip = float(distance[(higher[-1] if higher.size else 0) : p].min())
        if distance[p] - dip > least:
            return int(p)
    return None
