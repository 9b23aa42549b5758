"""Segmentation scored against the truth: boundaries and labels (simulators know when a grasp was made)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from world2act.segmentation.schemas import normalise
from world2act.types import Skill


@dataclass(frozen=True)
class BoundaryScore:
    """Boundaries found and right (hits), of those found, of those true. Scores of episodes add up: sum(scores, BoundaryScore()).

    error: sum over hits of the distance to the truth, frames.
    """

    hits: int = 0
    found: int = 0
    true: int = 0
    error: int = 0

    @property
    def precision(self) -> float:
        """Share of found boundaries that are right; 1 where nothing was found and nothing is there."""
        return self.hits / self.found if self.found else float(not self.true)

    @property
    def recall(self) -> float:
        """Share of true boundaries that were found; 1 where there are none and none was found."""
        return self.hits / self.true if self.true else float(not self.found)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return 2 * self.hits / (self.found + self.true) if self.found + self.true else 1.0

    @property
    def mean_error(self) -> float:
        """Mean distance of the hits to the truth, frames; 0 without hits."""
        return self.error / self.hits if self.hits else 0.0

    def __add__(self, other: BoundaryScore) -> BoundaryScore:
        return BoundaryScore(self.hits + other.hits, self.found + other.found, self.true + other.true, self.error + other.error)


def boundary_score(found: Sequence[int], true: Sequence[int], tolerance: int) -> BoundaryScore:
    """Boundaries (frames) of one episode matched one to one within `tolerance` frames, as many as can be.

    Raises ValueError for a negative tolerance. Start and end of the episode are no boundaries: leave them out.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance: {tolerance} must be at least 0 frames")
    a, b = sorted(found), sorted(true)
    i = j = hits = error = 0
    while i < len(a) and j < len(b):  # in one dimension the earliest pair that fits belongs to a largest matching
        if abs(a[i] - b[j]) <= tolerance:
            hits, error, i, j = hits + 1, error + abs(a[i] - b[j]), i + 1, j + 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    return BoundaryScore(hits, len(a), len(b), error)


def boundaries(skills: Sequence[Skill]) -> list[int]:
    """Inner boundaries of an episode's skills: the frames at which one ends and the next begins."""
    return [s.end for s in skills[:-1]]


def label_accuracy(found: Sequence[Skill], true: Sequence[Skill]) -> float:
    """Share of the truth's actions whose prompt is the true one (wording compared without case and punctuation).

    An action that no found skill covers counts as wrong: a discarded episode has accuracy 0.
    Raises ValueError for skills that overlap or for a truth without actions.
    """
    right, actions = labels_right(found, true)
    return right / actions


def labels_right(found: Sequence[Skill], true: Sequence[Skill]) -> tuple[int, int]:
    """Of how many of the truth's actions the prompt is right, and how many there are; see `label_accuracy`."""
    labels = _labels(found, "found")
    wanted = _labels(true, "true")
    if not wanted:
        raise ValueError("true: has no actions")
    return sum(labels.get(t) == prompt for t, prompt in wanted.items()), len(wanted)


@dataclass(frozen=True)
class Score:
    """One way of segmenting, over episodes. cut: those that it did not discard. boundaries: one score for each tolerance that
    was asked for; scores add up."""

    episodes: int
    cut: int
    boundaries: tuple[BoundaryScore, ...]
    right: int
    actions: int

    @property
    def label_accuracy(self) -> float:
        """See the function of this name; 0 without actions."""
        return self.right / self.actions if self.actions else 0.0

    def __add__(self, other: Score) -> Score:
        both = tuple(a + b for a, b in zip(self.boundaries, other.boundaries, strict=True))
        counts = (self.episodes + other.episodes, self.cut + other.cut)
        return Score(*counts, both, self.right + other.right, self.actions + other.actions)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names of this class."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Score:
        """The inverse of `to_json`. Raises ValueError for fields of another version."""
        try:
            return cls(**{**content, "boundaries": tuple(BoundaryScore(**b) for b in content["boundaries"])})
        except (KeyError, TypeError):
            raise ValueError("scores: are of another version; build the skills again") from None


def score(found: Sequence[Skill], true: Sequence[Skill], tolerances: Sequence[int]) -> Score:
    """One episode's skills against the true ones; tolerances in frames. Raises ValueError as the functions above."""
    at = tuple(boundary_score(boundaries(found), boundaries(true), tolerance) for tolerance in tolerances)
    return Score(1, int(bool(found)), at, *labels_right(found, true))


def _labels(skills: Sequence[Skill], field: str) -> dict[int, str]:
    """Action -> normalised prompt."""
    labels: dict[int, str] = {}
    for s in skills:
        for t in range(s.start, s.end):
            if t in labels:
                raise ValueError(f"{field}: action {t} belongs to two skills")
            labels[t] = normalise(s.prompt)
    return labels
