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
    """`seconds`: busy seconds per part and the wall time; `active`: seconds in which a part did anything.

    overlap: sum of busy seconds over wall time (what one after the other would have taken, relative to what it took);
    parts_overlap: the same with `active`, so that parallel episodes of one part do not count as overlap.
    """
    seconds = {name: round(busy(intervals), 3) for name, intervals in parts.items()}
    alone = {name: round(active(intervals), 3) for name, intervals in parts.items()}
    wall = max(wall, 1e-9)
    return {
        "seconds": {**seconds, "wall": round(wall, 3)},
        "active": alone,
        "overlap": round(sum(seconds.values()) / wall, 3),
        "parts_overlap": round(sum(alone.values()) / wall, 3),
    }
