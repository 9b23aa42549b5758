"""What Stage 2 executes, in which order, and how stale the acting policy may be (METHOD section 4)."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from world2act import splits
from world2act.presets import Stage2Settings
from world2act.types import FloatArray

INDICES_PER_SEED = 10_000
"""Scenes per task that one seed of `plan` may use; seeds 0 .. 99 own disjoint ones."""


@dataclass(frozen=True, order=True)
class EpisodeSpec:
    """One episode to execute: scene `index` of split posttrain, with `noise` (0: none). Ordered as data is read.

    key: names this episode in queues, artifacts and checkpoints; equal for equal plans.
    """

    round: int
    task: str
    index: int
    noise: float
    key: str


def plan(settings: Stage2Settings, tasks: Sequence[str], seed: int) -> list[EpisodeSpec]:
    """Every episode of every round, in order: round 0 base and perturbed, then on-policy rounds. No scene occurs twice."""
    rounds = settings.plan
    # Counted before any list is made; a round without episodes counts too.
    episodes = rounds.base + rounds.perturbed + rounds.rounds * max(1, rounds.on_policy)
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks: need at least one, each once, got {list(tasks)}")
    if not 0 <= seed < splits.INDICES_PER_SPLIT // INDICES_PER_SEED or episodes > INDICES_PER_SEED:
        raise ValueError(f"seed: {seed} is outside [0, 100), or the plan has over {INDICES_PER_SEED} episodes a task")
    kinds = [[0.0] * rounds.base + [rounds.perturbed_noise] * rounds.perturbed]
    kinds += [[rounds.on_policy_noise] * rounds.on_policy] * rounds.rounds
    specs = []
    for task in sorted(tasks):
        number = itertools.count(seed * INDICES_PER_SEED)
        for round_, noises in enumerate(kinds):
            for noise in noises:
                index = next(number)
                name = f"{seed}/{round_}/{task}/{index}/{noise}"
                specs.append(EpisodeSpec(round_, task, index, noise, hashlib.blake2b(name.encode(), digest_size=16).hexdigest()))
    return sorted(specs)


def rounds(specs: Iterable[EpisodeSpec]) -> Iterator[tuple[int, list[EpisodeSpec]]]:
    """A plan's episodes by round, in order."""
    for number, members in itertools.groupby(sorted(specs), key=lambda spec: spec.round):
        yield number, list(members)


def steps_of(round_: int, settings: Stage2Settings) -> int:
    """Training steps after `round_`."""
    return settings.plan.first_steps if round_ == 0 else settings.plan.steps


def perturbation(spec: EpisodeSpec, chunks: int, std: FloatArray) -> FloatArray:
    """Offsets (chunks, A) in the simulator's units, one per chunk, to add to the combined chunk before it is executed.

    Normal with spread noise * std on the first three components (the arm's motion), 0 on the others; a function of the key.
    """
    rng = np.random.default_rng(int(spec.key, 16))
    offsets = rng.standard_normal((chunks, len(std))) * spec.noise * np.asarray(std)
    offsets[:, 3:] = 0.0
    return offsets.astype(np.float32)


@dataclass
class StalenessManager:
    """Bounds how old the policy behind an episode may be.

        staleness(round, version) = round - version        (version: training rounds the acting policy has been through)
        an episode may start, and is accepted, while staleness <= eta

    Round r wants the policy of r training rounds: eta = 0 is synchronous (collect, then train, in turn); eta = 1 collects
    round r while the learner still trains on round r - 1. A policy newer than the round asks for has negative staleness.
    """

    eta: int

    def __post_init__(self) -> None:
        if self.eta < 0:
            raise ValueError(f"eta: must be >= 0, got {self.eta}")
        self.accepted: Counter[int] = Counter()
        self.rejected: Counter[int] = Counter()

    def may_start(self, round_: int, version: int) -> bool:
        """May an episode of `round_` start with the newest policy `version`?"""
        return round_ - version <= self.eta

    def accept(self, round_: int, version: int) -> bool:
        """Is an episode of `round_` that policy `version` executed fresh enough? Counts the answer by staleness."""
        fresh = self.may_start(round_, version)
        (self.accepted if fresh else self.rejected)[round_ - version] += 1
        return fresh
