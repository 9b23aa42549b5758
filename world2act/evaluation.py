"""Success rates that can be believed: Wilson 95 % intervals, exact McNemar on matched episodes, Holm over a table, and the
table of a run.

Two policies are compared on the same scenes (task, index) only; a scene that one of them lacks is an error, not a gap.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from scipy.stats import binomtest

from world2act.splits import Split, require


@dataclass(frozen=True)
class Outcome:
    """One evaluated episode."""

    task: str
    split: str
    index: int
    success: bool


@dataclass(frozen=True)
class Rate:
    """Successes out of n, with the Wilson 95 % interval [low, high]."""

    successes: int
    n: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Difference:
    """Success rate of one policy minus another's on the same scenes, with Newcombe's 95 % interval for paired data."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Comparison:
    """One row of the table. gained: scenes that only the post-trained policy solves; lost: only the base; p: exact McNemar."""

    name: str
    base: Rate
    post: Rate
    gained: int
    lost: int
    p: float


def wilson(successes: int, n: int) -> Rate:
    """Success rate with its Wilson 95 % interval. Raises ValueError unless 0 <= successes <= n and n >= 1."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes: must be in [0, n] with n >= 1, got {successes} of {n}")
    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(successes, n, successes / n, float(interval.low), float(interval.high))


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p value: under no effect a discordant pair falls either way with probability 1/2."""
    if gained < 0 or lost < 0:
        raise ValueError(f"gained, lost: must be >= 0, got {gained}, {lost}")
    if gained + lost == 0:
        return 1.0
    return float(binomtest(gained, gained + lost, 0.5).pvalue)


def paired_difference(row: Comparison) -> Difference:
    """post - base with its 95 % interval on matched episodes: Newcombe 1998 (Stat. Med. 17, 2635), method 10.

    Wilson limits of the two rates, joined with their correlation phi (which a continuity correction shrinks where positive).
    Unlike the normal approximation it has a width where no scene differs.
    """
    n, gained, lost = row.post.n, row.gained, row.lost
    both = row.post.successes - gained
    neither = n - both - gained - lost
    product = both * neither - gained * lost
    margins = (both + gained) * (neither + lost) * (both + lost) * (neither + gained)
    shrunk = max(product - n / 2, 0.0) if product > 0 else product
    phi = shrunk / math.sqrt(margins) if margins else 0.0
    value = row.post.rate - row.base.rate

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    low = value - reach(row.post.rate - row.post.low, row.base.high - row.base.rate)
    high = value + reach(row.post.high - row.post.rate, row.base.rate - row.base.low)
    return Difference(value, max(low, -1.0), min(high, 1.0))


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted by Holm's step-down method for all the tests of one table, in the order given."""
    from statsmodels.stats.multitest import multipletests  # slow to import, and only tables of several tests need it

    return [float(value) for value in multipletests(p, method="holm")[1]] if p else []


def spread(rates: Sequence[float]) -> float | None:
    """Standard deviation between training seeds (n - 1); None for fewer than two."""
    return statistics.stdev(rates) if len(rates) > 1 else None


def _by_scene(outcomes: Iterable[Outcome], split: Split, name: str) -> dict[tuple[str, int], bool]:
    scenes: dict[tuple[str, int], bool] = {}
    for outcome in outcomes:
        require([outcome.split], [split], f"evaluation of {name}")
        scene = (outcome.task, outcome.index)
        if scenes.setdefault(scene, outcome.success) != outcome.success:
            raise ValueError(f"{name}: scene {outcome.index} of {outcome.task} has both a success and a failure")
    if not scenes:
        raise ValueError(f"{name}: no episodes")
    return scenes


def compare(base: Iterable[Outcome], post: Iterable[Outcome], split: Split = Split.EVALUATION) -> list[Comparison]:
    """Base against post-trained policy, per task and, last, "all". An episode delivered twice counts once.

    Raises LeakageError for an episode of another split than `split`, which must be evaluation, or tuning while choosing
    hyperparameters; ValueError where the two policies were not run on the same scenes.
    """
    if split not in (Split.EVALUATION, Split.TUNING):
        raise ValueError(f"split: must be evaluation or tuning, got {split.value}")
    before, after = _by_scene(base, split, "base"), _by_scene(post, split, "post-trained")
    unmatched = sorted(before.keys() ^ after.keys())
    if unmatched:
        task, index = unmatched[0]
        raise ValueError(f"{len(unmatched)} scenes were run by one policy only, such as {task} {index}")
    tasks = sorted({task for task, _ in before})
    groups = [(task, [s for s in before if s[0] == task]) for task in tasks] + [("all", list(before))]
    return [_row(name, [(before[s], after[s]) for s in scenes]) for name, scenes in groups]


def _row(name: str, pairs: Sequence[tuple[bool, bool]]) -> Comparison:
    gained, lost = sum(b < a for b, a in pairs), sum(b > a for b, a in pairs)
    n = len(pairs)
    return Comparison(
        name, wilson(sum(b for b, _ in pairs), n), wilson(sum(a for _, a in pairs), n), gained, lost, mcnemar(gained, lost)
    )


COLUMNS = ("task", "n", "base", "post-trained", "difference", "gained / lost", "McNemar p")


def cells(row: Comparison) -> tuple[str, ...]:
    """A row as text, in the order of COLUMNS."""
    changed = str(paired_difference(row)), f"+{row.gained} / -{row.lost}"
    return row.name, str(row.base.n), str(row.base), str(row.post), *changed, f"{row.p:.2g}"


def rich_table(rows: Sequence[Comparison], title: str = "Success, Wilson 95 %", after: str = "post-trained") -> Table:
    """For a terminal. after: what is compared with the base."""
    table = Table(title=title)
    for column in (after if column == "post-trained" else column for column in COLUMNS):
        table.add_column(column, justify="left" if column == "task" else "right")
    for row in rows:
        table.add_row(*cells(row), end_section=row is rows[-2] if len(rows) > 1 else False)
    return table


def plain_table(rows: Sequence[Comparison]) -> str:
    """For a log or a file: aligned columns."""
    lines = [COLUMNS, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def to_json(rows: Sequence[Comparison], split: Split = Split.EVALUATION) -> dict[str, Any]:
    """The table as JSON values."""
    return {"split": split.value, "rows": [asdict(row) for row in rows]}


def from_json(content: Mapping[str, Any]) -> list[Comparison]:
    """Inverse of `to_json`."""
    return [
        Comparison(r["name"], Rate(**r["base"]), Rate(**r["post"]), int(r["gained"]), int(r["lost"]), float(r["p"]))
        for r in content["rows"]
    ]
