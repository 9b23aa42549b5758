"""What one cell computes: prepare a regime's parts, train a method on them, evaluate it on matched scenes."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments import distortions, practice, wording
from experiments.arena import Arena, Policy
from experiments.cells import Cell, processes
from experiments.methods import METHODS
from experiments.methods.base import Parts
from experiments.naming import InverseDynamics
from experiments.regimes import Places, Regime, inverse_dynamics, labels, lacking, named_clone, named_video, prepare
from world2act.console import Progress, no_progress
from world2act.evaluation import Outcome
from world2act.models.adapters import Adapters
from world2act.models.tiny_policy import TinyPolicy
from world2act.models.worldmodel import WorldModel
from world2act.presets import STAGE2, Preset, Stage2Settings, changed
from world2act.splits import Split

TASKS = ("button-press", "door-open", "drawer-close", "drawer-open", "pick-place", "push", "reach")
"""All tasks of the simulator; none is left out of a table."""


@dataclass(frozen=True)
class Sizes:
    """How much an experiment computes. The paper: 5 seeds x 50 trials a task."""

    seeds: int = 5
    trials: int = 50
    tasks: tuple[str, ...] = TASKS
    split: Split = Split.EVALUATION

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.trials < 1 or not self.tasks:
            raise ValueError(f"seeds, trials, tasks: need at least one each, got {self.seeds}, {self.trials}, {len(self.tasks)}")
        if self.seeds > practice.SEED:
            raise ValueError(f"seeds: at most {practice.SEED}, for the next are those of practice and play; got {self.seeds}")
        if self.split not in (Split.EVALUATION, Split.TUNING):
            raise ValueError(f"split: must be evaluation or tuning, got {self.split.value}")


@dataclass(frozen=True)
class Variant:
    """One row of a table: a method in a regime. settings: fields of Stage2Settings that differ from the preset's.

    distortion: what the cameras suffer, by name; train_tasks: tasks that are post-trained, None for all that are evaluated;
    every_round: evaluate after each round too; other_words: evaluate with other instructions than those of training. Variants of
    one name and content share their cells.
    """

    name: str
    method: str = "world2act"
    regime: Regime = field(default_factory=Regime)
    preset: Preset = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    distortion: str = "none"
    train_tasks: tuple[str, ...] | None = None
    every_round: bool = False
    other_words: bool = False

    def stage2(self) -> Stage2Settings:
        """The preset with the variant's own fields. Raises ValueError, TypeError for a field that is unknown or out of range."""
        return changed(STAGE2[self.preset], self.settings)


def cells(experiment: str, variants: Sequence[Variant], sizes: Sizes, hashes: Callable[[Regime], dict[str, str]]) -> list[Cell]:
    """One cell per variant and seed. The regime's weights are part of what a cell is: other weights are other cells."""
    found = []
    for variant in variants:
        what: dict[str, Any] = {
            "method": variant.method,
            "regime": asdict(variant.regime),
            "weights": hashes(variant.regime),
            "stage2": asdict(variant.stage2()) if variant.method != "base" else {},
            "distortion": variant.distortion,
            "trials": sizes.trials,
            "tasks": list(sizes.tasks),
            "split": sizes.split.value,
        }
        if variant.train_tasks is not None:
            what["train_tasks"] = list(variant.train_tasks)
        if variant.every_round:
            what["every_round"] = True
        if variant.other_words:
            what["other_words"] = True
        found += [Cell(experiment, variant.name, seed, what) for seed in range(sizes.seeds)]
    return found


def prepare_all(
    variants: Sequence[Variant], places: Places, tasks: Sequence[str], workers: int = 1, progress: Progress = no_progress
) -> Callable[[Regime], dict[str, str]]:
    """Build the parts of every regime; returns the look-up of their hashes. Raises RuntimeError naming a part that failed.

    Regimes whose bases are one, or are built on one, are built in turn, others side by side, in processes of their own.
    """
    regimes = list(dict.fromkeys(variant.regime for variant in variants))
    groups: dict[str, list[Regime]] = {}
    for regime in regimes:
        if lacking(regime, places):
            groups.setdefault(f"cloned-{regime.demonstrations}", []).append(regime)
    calls = {name: (_prepare, (members, places, tuple(tasks))) for name, members in groups.items()}
    failures = []
    if calls:
        progress("parts", 0, len(calls), {})
    for done, (name, error) in enumerate(processes(calls, workers, places.cache / "logs", progress), 1):
        progress("parts", done, len(calls), {})
        failures += [f"{name}: {error}"] if error else []
    if failures:
        raise RuntimeError(f"parts could not be built: {'; '.join(failures)}")
    return {regime: prepare(regime, places, tasks) for regime in regimes}.__getitem__


def _prepare(regimes: Sequence[Regime], places: Places, tasks: Sequence[str], progress: Progress) -> None:
    torch.set_num_threads(1)
    for regime in regimes:
        prepare(regime, places, tasks, progress)


def stage2_of(values: Mapping[str, Any]) -> Stage2Settings:
    """Inverse of `asdict(Stage2Settings)` after a round through JSON."""
    from world2act.objectives import Contrastive
    from world2act.optimiser import Optimiser
    from world2act.presets import Rounds

    optimiser = Optimiser(**{**values["optimiser"], "betas": tuple(values["optimiser"]["betas"])})
    inner = {"optimiser": optimiser, "contrastive": Contrastive(**values["contrastive"]), "plan": Rounds(**values["plan"])}
    return Stage2Settings(**{**values, **inner})


def scenes(seed: int, trials: int) -> range:
    """The scenes of a training seed: each seed has its own, the same for every variant."""
    return range(seed * trials, (seed + 1) * trials)


def compute(cell: Cell, places: Places, progress: Progress = no_progress) -> dict[str, Any]:
    """Train and evaluate one cell. Returns outcomes per task as a string of 0 and 1 in scene order, and what was noted."""
    what = cell.what
    regime = Regime(**what["regime"])
    tasks = tuple(what["tasks"])
    base = TinyPolicy.load(places.part(regime, "base"))
    model = WorldModel.load(places.part(regime, "worldmodel"))
    adapters = Adapters.load(places.part(regime, "adapters"))
    adapters.check_worldmodel(model.hash)
    arena = Arena(
        adapters.actions.std.numpy(),
        distortion=distortions.DISTORTIONS[what["distortion"]],
        segmented=regime.worldmodel != "base",
        textures=what["distortion"] == distortions.TEXTURES,
    )
    notes: dict[str, float] = {}
    rounds: list[dict[str, str]] = []

    def outcomes(policy: Policy) -> dict[str, str]:
        words = wording.other if what.get("other_words") else None
        found = arena.evaluate(policy, Split(what["split"]), tasks, scenes(cell.seed, what["trials"]), words)
        return {task: "".join(str(int(o.success)) for o in found if o.task == task) for task in tasks}

    def inverse() -> InverseDynamics:
        began = time.monotonic()
        network, seconds = inverse_dynamics(regime, places, TASKS, cell.seed)
        notes["seconds/inverse"] = round(seconds, 1)
        notes["seconds/kept"] = notes["seconds/inverse"] - (time.monotonic() - began)
        return network

    def clone() -> TinyPolicy:
        inverse()
        began = time.monotonic()
        policy, seconds = named_clone(regime, places, TASKS, cell.seed)
        notes["seconds/kept"] += seconds - (time.monotonic() - began)
        return policy

    parts = Parts(
        base,
        model,
        adapters,
        lambda: labels(regime, places, TASKS),
        inverse,
        lambda: named_video(regime, places, TASKS, inverse()),
        clone,
        tuple(what.get("train_tasks", tasks)),
        stage2_of(what["stage2"]) if what["stage2"] else STAGE2["default"],
        cell.seed,
        arena,
        lambda name, value: notes.__setitem__(name, round(value, 5)),
    )

    def on_round(number: int, policy: Policy) -> None:
        progress("rounds", number + 1, parts.settings.plan.rounds + 1, {})
        if what.get("every_round"):
            rounds.append(outcomes(policy))

    parts.on_round = on_round
    started = time.monotonic()
    policy = METHODS[what["method"]](parts)
    trained = time.monotonic()
    notes["memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)  # peak of the whole process
    result: dict[str, Any] = {"outcomes": outcomes(policy), "notes": notes}
    # What another cell has computed and kept counts too: a method costs the same whichever cell came first.
    notes["seconds/training"] = round(trained - started + notes.pop("seconds/kept", 0.0), 1)
    notes["seconds/evaluation"] = round(time.monotonic() - trained, 1)
    arena.close()
    return result | ({"rounds": rounds} if rounds else {})


def outcomes_of(result: Mapping[str, Any]) -> list[Outcome]:
    """The episodes of a cell's result."""
    what, seed = result["cell"]["what"], result["cell"]["seed"]
    indices = scenes(seed, what["trials"])
    return [
        Outcome(task, what["split"], index, mark == "1")
        for task, marks in result["outcomes"].items()
        for index, mark in zip(indices, marks, strict=True)
    ]


@dataclass(frozen=True)
class Work:
    """`compute` for worker processes."""

    places: Places

    def __call__(self, cell: Cell, folder: Path, progress: Progress) -> dict[str, Any]:
        torch.set_num_threads(1)
        return compute(cell, self.places, progress)
