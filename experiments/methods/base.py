"""What a method gets, and what it gives back: the same base, data, scenes and budget for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from experiments.arena import Arena, Policy
from experiments.naming import InverseDynamics
from experiments.policies import Frozen, WithResidual
from world2act.models.adapters import Adapters
from world2act.models.tiny_policy import TinyPolicy
from world2act.models.worldmodel import WorldModel
from world2act.presets import Stage2Settings
from world2act.schedule import EpisodeSpec
from world2act.stage2 import Targets
from world2act.types import Episode, Trajectory

__all__ = ["Frozen", "Method", "Note", "Parts", "Shown", "WithResidual"]

Shown = tuple[EpisodeSpec, Trajectory, Targets]
"""An episode as Stage 2 takes it."""
Note = Callable[[str, float], None]
"""Records a number of a training by name (losses by round, seconds of a part); the last value stays."""


@dataclass
class Parts:
    """Everything a method may use. All are frozen; a method that trains one of them trains a copy.

    labels: the labelled demonstrations of the regime, already read: the base's own, and every one that another part has seen.
    inverse: a network that names actions, of all that the adapters have learned from (`regimes.inverse_dynamics`).
    named: the regime's unlabelled video, with the actions that `inverse` reads from it (`regimes.named_video`).
    named_clone: the base cloned from `labels` and `named` (`regimes.named_clone`).
    settings: preset of Stage 2; its plan is the budget: every method runs the same number of episodes of split posttrain.
    seed: training seed, also the seed of `schedule.plan`, so that all methods meet the same scenes.
    on_round: called by methods that train in rounds, with the round's number and the policy after it; it may evaluate, and
        its time counts as training.
    """

    base: TinyPolicy
    model: WorldModel
    adapters: Adapters
    labels: Callable[[], Sequence[Episode]]
    inverse: Callable[[], InverseDynamics]
    named: Callable[[], Iterable[Episode]]
    named_clone: Callable[[], TinyPolicy]
    tasks: tuple[str, ...]
    settings: Stage2Settings
    seed: int
    arena: Arena
    note: Note = field(default=lambda name, value: None)
    on_round: Callable[[int, Policy], None] = field(default=lambda number, policy: None)


class Method(Protocol):
    """Trains a policy. Never sees success, reward or an expert's action (oracles say so in their names)."""

    def __call__(self, parts: Parts) -> Policy: ...
