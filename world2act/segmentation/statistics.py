"""What segmentation did to a data set (METHOD: paper section 3, points 1 and 4)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from world2act.segmentation.segment import Segmentation
from world2act.types import M


@dataclass(frozen=True)
class Statistics:
    """Counts over a data set; lengths in actions.

    sync_rate: share of episodes whose segments match the prompts one to one (the paper: 0.962 RoboCasa, 0.869 LIBERO).
    density_before, density_after: density of episode and of clip lengths at their own median, per action;
    density_gain: after / before - 1 (the paper: +17 % RoboCasa, +72 % LIBERO).
    """

    episodes: int
    synced: int
    sync_rate: float
    clips: int
    discard_reasons: dict[str, int]
    sync_rate_by_task: dict[str, float]
    median_before: float
    median_after: float
    density_before: float
    density_after: float
    density_gain: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names of this class."""
        return asdict(self)


def density(lengths: npt.ArrayLike, at: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Density of lengths at the points `at` (P,), per action: (P,); Gaussian kernel of one chunk (M actions), 0 without lengths.

    The kernel's width is fixed, so that before and after are comparable and equal lengths give a finite density.
    """
    values, counts = np.unique(np.asarray(lengths, dtype=np.float64), return_counts=True)
    away = (np.asarray(at, dtype=np.float64)[:, None] - values) / M
    found: npt.NDArray[np.float64] = np.exp(-0.5 * away**2) @ counts / (M * np.sqrt(2 * np.pi) * max(counts.sum(), 1))
    return found


def density_at_median(lengths: npt.ArrayLike) -> tuple[float, float]:
    """(median, density there per action) of lengths; (0, 0) without lengths."""
    x = np.asarray(lengths, dtype=np.float64)
    if x.size == 0:
        return 0.0, 0.0
    median = float(np.median(x))
    return median, float(density(x, [median])[0])


def summarise(segmentations: Iterable[Segmentation]) -> Statistics:
    """Statistics of segmented episodes, which may be a stream. Reasons are grouped without their numbers and quoted prompts."""
    before: list[int] = []
    clips: list[int] = []
    by_task: dict[str, list[bool]] = {}
    reasons: Counter[str] = Counter()
    for s in segmentations:
        before.append(s.length)
        by_task.setdefault(s.task or "unknown", []).append(s.discarded is None)
        if s.discarded is None:
            clips += [k.end - k.start for k in s.skills]
        else:
            reasons[re.sub(r"\d+", "N", re.sub(r"'[^']*'", "*", s.discarded))] += 1
    synced = len(before) - reasons.total()
    median_before, density_before = density_at_median(before)
    median_after, density_after = density_at_median(clips)
    return Statistics(
        episodes=len(before),
        synced=synced,
        sync_rate=synced / len(before) if before else 0.0,
        clips=len(clips),
        discard_reasons=dict(reasons.most_common()),
        sync_rate_by_task={task: sum(ok) / len(ok) for task, ok in sorted(by_task.items())},
        median_before=median_before,
        median_after=median_after,
        density_before=density_before,
        density_after=density_after,
        density_gain=density_after / density_before - 1 if density_before and density_after else 0.0,
    )
