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


def density_at_median(lengths: npt.ArrayLike) -> tuple[float, float]:
    """(median, density there per action) of lengths; Gaussian kernel one chunk (M actions) wide, (0, 0) without lengths.

    The kernel's width is fixed, so that before and after are comparable and equal lengths give a finite density.
    """
    x = np.asarray(lengths, dtype=np.float64)
    if x.size == 0:
        return 0.0, 0.0
    median = float(np.median(x))
    kernel = np.exp(-0.5 * ((x - median) / M) ** 2) / (M * np.sqrt(2 * np.pi))
    return median, float(kernel.mean())


def summarise(segmentations: Iterable[Segmentation]) -> Statistics:
    """Statistics of segmented episodes. Reasons are grouped without their numbers and quoted prompts."""
    found = list(segmentations)
    synced = [s for s in found if s.discarded is None]
    by_task: dict[str, list[bool]] = {}
    for s in found:
        by_task.setdefault(s.task or "unknown", []).append(s.discarded is None)
    reasons = Counter(re.sub(r"\d+", "N", re.sub(r"'[^']*'", "*", s.discarded)) for s in found if s.discarded is not None)
    clips = [k.end - k.start for s in synced for k in s.skills]
    median_before, before = density_at_median([s.length for s in found])
    median_after, after = density_at_median(clips)
    return Statistics(
        episodes=len(found),
        synced=len(synced),
        sync_rate=len(synced) / len(found) if found else 0.0,
        clips=len(clips),
        discard_reasons=dict(reasons.most_common()),
        sync_rate_by_task={task: sum(ok) / len(ok) for task, ok in sorted(by_task.items())},
        median_before=median_before,
        median_after=median_after,
        density_before=before,
        density_after=after,
        density_gain=after / before - 1 if before and after else 0.0,
    )
