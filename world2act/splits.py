"""Scenes by split. A scene's seed is a function of (split, index) alone, and splits own disjoint ranges of seeds.

Nothing in this project resets a simulator by a bare seed: every door takes a split and an index, and every recorded
episode carries its split. So a consumer can state which splits it may see (`require`), and leakage is an error, not an accident.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

INDICES_PER_SPLIT = 1_000_000


class Split(StrEnum):
    """What a scene may be used for; each value owns its own million initial states per task."""

    BASE = "base"  # the base policy's labelled demonstrations
    WORLDMODEL = "worldmodel"  # world model and Stage 1
    VALIDATION = "validation"  # held-out clips: world model and Stage 1 metrics
    POSTTRAIN = "posttrain"  # Stage 2 rollouts: no labels
    TUNING = "tuning"  # choosing hyperparameters
    EVALUATION = "evaluation"  # success rates that are reported


class LeakageError(ValueError):
    """Data of one split was offered where another is required."""


def parse_split(name: str) -> Split:
    """`name` as a Split. Raises ValueError naming the field and the choices."""
    try:
        return Split(name)
    except ValueError:
        raise ValueError(f"split: {name!r} is unknown; choose one of {', '.join(s.value for s in Split)}") from None


def scene_seed(split: Split, index: int) -> int:
    """The simulator seed of initial state `index` (0 <= index < 1,000,000) of `split`; disjoint between splits."""
    if not 0 <= index < INDICES_PER_SPLIT:
        raise ValueError(f"index: {index} is outside [0, {INDICES_PER_SPLIT})")
    return list(Split).index(split) * INDICES_PER_SPLIT + index


def split_of_seed(seed: int) -> tuple[Split | None, int]:
    """The inverse of `scene_seed`; None for seeds beyond all splits (tests use them)."""
    number, index = divmod(seed, INDICES_PER_SPLIT)
    splits = list(Split)
    return (splits[number] if number < len(splits) else None), index


def require(found: Iterable[str], allowed: Iterable[Split], where: str) -> None:
    """Raise LeakageError unless every split in `found` is allowed at `where` (a short name for the message)."""
    permitted = set(allowed)
    wrong = sorted({parse_split(f).value for f in found} - {p.value for p in permitted})
    if wrong:
        names = ", ".join(sorted(p.value for p in permitted))
        raise LeakageError(f"{where}: takes episodes of split {names} only, got {', '.join(wrong)}")
