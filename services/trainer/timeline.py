"""Who was busy when: seconds per part of a run, and how much the parts overlapped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Interval = tuple[float, float]
"""Start and end, Unix seconds."""


def busy(intervals: Iterable[Interval]) -> float:
    """Sum of all lengths: what the work cost, however much of it ran side by side."""
    return sum(max(end - start, 0.0) for start, end in intervals)


def active(intervals: Iterable[Interval]) -> float:
    """Seconds in which at least one interval was open."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reach:
            total += end - max(start, reach)
            reach = end
    return total


def summary(parts: Mapping[str, list[Interval]], wall: float) -> dict[str, object]:
    """`seconds`: per part the seconds in which it did anything, and the wall time; `worker_seconds`: sums over its workers.

    overlap: the parts' seconds added up, over the wall time: 1 is one part after the other without a pause, 3 all of three
    parts all the time. Episodes that run side by side within a part do not raise it.
    """
    seconds = {name: round(active(intervals), 3) for name, intervals in parts.items()}
    wall = max(wall, 1e-9)
    return {
        "seconds": {**seconds, "wall": round(wall, 3)},
        "worker_seconds": {name: round(busy(intervals), 3) for name, intervals in parts.items()},
        "overlap": round(sum(seconds.values()) / wall, 3),
    }
