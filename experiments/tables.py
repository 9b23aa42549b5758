"""What experiments have measured, out of their files: plans (which cells make which row) and cells -> tables.

A function of those files alone: no weights, no demonstrations, no clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments import study
from experiments.catalogue import EXPERIMENTS, Row, rows_of
from experiments.cells import Cell, write_whole
from experiments.regimes import Regime
from experiments.study import Sizes, outcomes_of
from world2act import evaluation
from world2act.evaluation import Comparison, Difference, Outcome, Rate
from world2act.splits import Split

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What the newest run of an experiment set out to compute. cells: names by the label of their row in the catalogue,
    seed by seed; none where it was left out so far."""

    experiment: str
    command: str
    sizes: Sizes
    cells: Mapping[str, tuple[str, ...]]

    @staticmethod
    def path(out: Path, experiment: str) -> Path:
        """Where it lies, beside the cells."""
        return out / "plans" / f"{experiment}.json"

    def save(self, out: Path) -> None:
        """Write it whole or not at all."""
        write_whole(Plan.path(out, self.experiment), json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(out: Path, experiment: str) -> Plan | None:
        """The plan of `experiment`, or None if it was never run. Raises ValueError where it is not one of this version."""
        path = Plan.path(out, experiment)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            sizes = content["sizes"]
            sizes = Sizes(sizes["seeds"], sizes["trials"], tuple(sizes["tasks"]), Split(sizes["split"]))
            named = {label: tuple(names) for label, names in content["cells"].items()}
            return Plan(content["experiment"], content["command"], sizes, named)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a plan of this version ({error!r}); without it the cells are kept") from None


def planned(
    rows: Sequence[Row], cells: Mapping[str, Sequence[Cell]], earlier: Plan | None, sizes: Sizes, out: Path
) -> dict[str, tuple[str, ...]]:
    """Names of the cells of each of the catalogue's rows; one that this run leaves out keeps what an `earlier` run planned, of
    another number of seeds too once it has results under `out`, if the catalogue still asks for it: its weights may be gone."""
    found = {}
    for row in rows:
        names = earlier.cells.get(row.label, ()) if earlier else ()
        if row.label in cells:
            names = tuple(cell.name for cell in cells[row.label])
        elif results := read_cells(out, names):
            names = _again(row, results, sizes)
        elif earlier and earlier.sizes != sizes:
            names = ()
        found[row.label] = names
    return found


def _again(row: Row, results: Mapping[str, Result], sizes: Sizes) -> tuple[str, ...]:
    """Names of today's cells of the row with the weights that `results` were computed with; none if they mean something else."""
    for name, result in results.items():
        weights = {row.variant.regime: result["cell"]["what"]["weights"]}
        asked = tuple(cell.name for cell in study.cells("", [row.variant], sizes, weights.__getitem__))
        if name in asked:
            return asked
    return ()


@dataclass(frozen=True)
class Line:
    """What one row measured. seeds: success by training seed; spread: their standard deviation; notes: means over seeds;
    rounds: (cosine, success) after each round, by seed; missing: what has no result."""

    label: str
    paper: str
    bound: bool
    series: str
    x: float | None
    rate: Rate | None
    tasks: dict[str, Rate] = field(default_factory=dict)
    seeds: dict[int, float] = field(default_factory=dict)
    spread: float | None = None
    notes: dict[str, float] = field(default_factory=dict)
    rounds: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Contrast:
    """A row against another on the scenes of the seeds that both have. holm: over all contrasts of the table; for a task, over
    all tasks of all contrasts. seeds: difference by training seed."""

    label: str
    against: str
    n: int
    gained: int
    lost: int
    difference: Difference
    p: float
    holm: float
    seeds: dict[int, float]
    tasks: dict[str, Contrast] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """An experiment, measured. weights: by regime, the hashes of its parts, once for each set that cells were computed with;
    seconds: wall time summed over its cells."""

    plan: Plan
    lines: list[Line]
    contrasts: list[Contrast]
    weights: dict[str, list[dict[str, str]]]
    seconds: float
    cells: int
    wanted: int


def read_cells(out: Path, names: Iterable[str]) -> dict[str, Result]:
    """Results by cell name; those that do not exist are left out."""
    paths = {name: out / "cells" / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def measure(plan: Plan, rows: Sequence[Row], out: Path) -> Table:
    """Every row and contrast of an experiment, whose rows in the catalogue are `rows`. Raises ValueError where
    two rows do not stand on the same base or scenes."""
    named = {row.label: plan.cells.get(row.label, ()) for row in rows}
    wanted = sorted({name for names in named.values() for name in names})
    results = read_cells(out, wanted)
    by_row = {label: {r["cell"]["seed"]: r for n in names if (r := results.get(n)) is not None} for label, names in named.items()}
    lines = [_line(row, by_row[row.label], plan.sizes) for row in rows]
    weights: dict[str, list[dict[str, str]]] = {}
    for result in results.values():
        what = result["cell"]["what"]
        of_regime = weights.setdefault(Regime(**what["regime"]).name, [])
        of_regime += [what["weights"]] if what["weights"] not in of_regime else []
    seconds = sum(result["wall_seconds"] for result in results.values())
    unplanned = sum(plan.sizes.seeds for names in named.values() if not names)
    contrasts = _contrasts(rows, by_row, plan.sizes.split)
    return Table(plan, lines, contrasts, dict(sorted(weights.items())), seconds, len(results), len(wanted) + unplanned)


def _line(row: Row, results: Mapping[int, Result], sizes: Sizes) -> Line:
    line = Line(row.label, row.paper, row.bound, row.series, row.x, None)
    absent = [seed for seed in range(sizes.seeds) if seed not in results]
    if absent:
        line = replace(line, missing="all seeds" if not results else f"seeds {', '.join(map(str, absent))}")
    if not results:
        return line
    outcomes = {seed: _outcomes(result, row.tasks) for seed, result in sorted(results.items())}
    everything = [outcome for found in outcomes.values() for outcome in found]
    tasks = {task: _rate(o for o in everything if o.task == task) for task in sorted({o.task for o in everything})}
    seeds = {seed: _rate(found).rate for seed, found in outcomes.items()}
    names = set.intersection(*(set(result["notes"]) for result in results.values()))
    notes = {name: sum(result["notes"][name] for result in results.values()) / len(results) for name in sorted(names)}
    rounds = {seed: _rounds(result) for seed, result in sorted(results.items()) if "rounds" in result}
    return replace(
        line,
        rate=_rate(everything),
        tasks=tasks,
        seeds=seeds,
        spread=evaluation.spread(list(seeds.values())),
        notes=notes,
        rounds=rounds,
    )


def _outcomes(result: Result, tasks: Sequence[str] | None) -> list[Outcome]:
    return [outcome for outcome in outcomes_of(result) if tasks is None or outcome.task in tasks]


def _rate(outcomes: Iterable[Outcome]) -> Rate:
    marks = [outcome.success for outcome in outcomes]
    return evaluation.wilson(sum(marks), len(marks))


def _rounds(result: Result) -> list[tuple[float, float]]:
    marks = ["".join(outcomes.values()) for outcomes in result["rounds"]]
    return [(result["notes"][f"round_{i}/positive_cosine"], m.count("1") / len(m)) for i, m in enumerate(marks)]


def _contrasts(rows: Sequence[Row], by_row: Mapping[str, Mapping[int, Result]], split: Split) -> list[Contrast]:
    found = []
    for row in rows:
        for against in row.against:
            seeds = sorted(set(by_row[row.label]) & set(by_row.get(against, {})))
            if seeds:
                ours, theirs = ([by_row[name][seed] for seed in seeds] for name in (row.label, against))
                found.append(_contrast(row, against, ours, theirs, split))
    overall = evaluation.holm([contrast.p for contrast in found])
    by_task = iter(evaluation.holm([task.p for contrast in found for task in contrast.tasks.values()]))
    return [
        replace(c, holm=holm, tasks={name: replace(task, holm=next(by_task)) for name, task in c.tasks.items()})
        for c, holm in zip(found, overall, strict=True)
    ]


def _contrast(row: Row, against: str, ours: Sequence[Result], theirs: Sequence[Result], split: Split) -> Contrast:
    bases = {result["cell"]["what"]["weights"]["base"] for result in (*ours, *theirs)}
    if len(bases) > 1:
        raise ValueError(f"{row.label}, {against}: stand on {len(bases)} different base policies; run the experiment again")
    seeds, pairs = {}, []
    for one, other in zip(ours, theirs, strict=True):
        pair = _outcomes(other, row.tasks), _outcomes(one, row.tasks)
        seeds[one["cell"]["seed"]] = round(_rate(pair[1]).rate - _rate(pair[0]).rate, 6)
        pairs.append(pair)
    before, after = ([o for pair in pairs for o in pair[side]] for side in (0, 1))
    *tasks, whole = (_of(row.label, against, c) for c in evaluation.compare(before, after, split))
    return replace(whole[1], seeds=seeds, tasks=dict(tasks))


def _of(label: str, against: str, row: Comparison) -> tuple[str, Contrast]:
    difference = evaluation.paired_difference(row)
    return row.name, Contrast(label, against, row.post.n, row.gained, row.lost, difference, row.p, row.p, {})


def tables(out: Path) -> list[Table]:
    """Every experiment that has a plan under `out`, in the catalogue's order."""
    plans = [plan for name in EXPERIMENTS if (plan := Plan.load(out, name)) is not None]
    return [measure(plan, rows_of(plan.experiment, plan.sizes.tasks), out) for plan in plans]
