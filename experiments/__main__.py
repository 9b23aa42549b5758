"""`world2act experiment NAME`: compute the cells of an experiment that have no result yet, then show its table.

Ctrl-C loses the cells that are running and keeps the others; the same command goes on. `world2act results` makes the page.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from experiments import cells, results, study, tables
from experiments.catalogue import EXPERIMENTS, Row, problems, rows_of
from experiments.methods import METHODS
from experiments.regimes import Places
from experiments.study import TASKS, Sizes
from experiments.tables import Plan
from world2act.console import Progress, progress_display, terminal
from world2act.splits import LeakageError, Split

Name = Literal[
    "main",
    "methods",
    "worldmodel",
    "objectives",
    "adapters",
    "scaling",
    "cross-task",
    "regimes",
    "similarity-vs-success",
]


@dataclass(frozen=True)
class Options:
    """What to run."""

    name: Positional[Name]
    seeds: Annotated[int, arg(help="training seeds")] = 5
    trials: Annotated[int, arg(help="scenes a task and training seed")] = 50
    tasks: Annotated[tuple[str, ...], arg(help="tasks that are trained and evaluated")] = TASKS
    split: Annotated[Literal["evaluation", "tuning"], arg(help="scenes of which success is measured")] = "evaluation"
    only: Annotated[tuple[str, ...], arg(help="rows to compute now, by label; the table keeps and names the others")] = ()
    settings: Annotated[tuple[str, ...], arg(help="Stage 2 settings as KEY=VALUE, on tuning scenes only")] = ()
    workers: Annotated[int, arg(help="cells at a time; 0: as many as there are cores")] = 0
    out: Annotated[Path | None, arg(help="results; default docs/results, for tuning CACHE/tuning")] = None
    cache: Annotated[Path, arg(help="weights of the regimes, built where they are missing")] = Path("data/experiments")
    demos: Annotated[Path, arg(help="demonstrations, <split>/<task>.hdf5")] = Path("data/demos")
    zoo: Annotated[Path, arg(help="shipped weights")] = Path("zoo")
    more: Annotated[Path, arg(help="video of other tasks, for regime pretrained")] = Path("data/more")

    def places(self) -> Places:
        """Folders. Tuning results never lie beside those that are reported."""
        default = Path("docs/results") if self.split == "evaluation" else self.cache / "tuning"
        return Places(self.out or default, self.cache, self.demos, self.zoo, self.more)

    def command(self) -> str:
        """The command line that gives the same cells; folders are left out."""
        words = ["world2act", "experiment", self.name, "--seeds", str(self.seeds), "--trials", str(self.trials)]
        words += ["--tasks", *self.tasks] if self.tasks != TASKS else []
        words += ["--split", self.split] if self.split != "evaluation" else []
        return shlex.join(words + (["--settings", *self.settings] if self.settings else []))


def overrides(texts: Sequence[str], split: Split) -> dict[str, Any]:
    """KEY=VALUE texts as settings. Raises LeakageError on evaluation scenes, where presets are measured as they stand."""
    if texts and split is not Split.TUNING:
        raise LeakageError(
            f"settings: hyperparameters are tuned on tuning scenes (--split tuning), never on those of split {split.value}, "
            "whose success is reported; there the presets are measured as they stand"
        )
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"settings: must be KEY=VALUE, got {text!r}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value  # a word
    return found


def chosen(options: Options, rows: Sequence[Row]) -> list[Row]:
    """The rows to compute now. Raises ValueError naming everything that stands in the way."""
    unknown = [label for label in options.only if label not in {row.label for row in rows}]
    if unknown:
        raise ValueError(f"only: {', '.join(unknown)} is no row of {options.name}; rows: {'; '.join(row.label for row in rows)}")
    wanted = [row for row in rows if not options.only or row.label in options.only]
    if found := problems(wanted, list(METHODS)):
        raise ValueError(f"{options.name}: {'; '.join(found)}")
    return wanted


def tuned(rows: Sequence[Row], values: Mapping[str, Any]) -> list[Row]:
    """`rows` with other Stage 2 settings on top of their own."""
    return [replace(row, variant=replace(row.variant, settings={**row.variant.settings, **values})) for row in rows]


def run(options: Options, progress: Progress, work: cells.Work | None = None) -> tuple[Plan, list[str]]:
    """Build parts, write the plan, compute what is missing. Returns the plan and what failed, one line each."""
    sizes = Sizes(options.seeds, options.trials, options.tasks, Split(options.split))
    unknown = [task for task in options.tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"tasks: {', '.join(unknown)}: unknown; choose out of {', '.join(TASKS)}")
    if len(set(options.tasks)) < len(options.tasks):
        raise ValueError(f"tasks: each once, got {', '.join(options.tasks)}")
    if options.workers < 0:
        raise ValueError(f"workers: must be >= 0, got {options.workers}")
    places = options.places()
    rows = tuned(rows_of(options.name, options.tasks), overrides(options.settings, sizes.split))
    wanted = chosen(options, rows)
    workers = options.workers or os.cpu_count() or 1
    variants = [row.variant for row in wanted]
    hashes = study.prepare_all(variants, places, TASKS, workers, progress)  # parts know all tasks, whichever are measured
    of_row = {row.label: study.cells(options.name, [row.variant], sizes, hashes) for row in wanted}
    earlier = Plan.load(places.out, options.name)
    plan = Plan(options.name, options.command(), sizes, tables.planned(rows, of_row, earlier, sizes, places.out))
    plan.save(places.out)
    # Seed by seed, so that a table exists early.
    in_order = sorted((cell for members in of_row.values() for cell in members), key=lambda cell: cell.seed)
    return plan, cells.run(in_order, work or study.Work(places), places.out, workers, progress)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status: 0 whole, 1 some cells failed, 2 nothing could be run, 130 interrupted."""
    options = tyro.cli(Options, prog="world2act experiment", description=__doc__, args=arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the running cells too
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the cells' processes: one core each
    started = time.monotonic()
    console = terminal()
    try:
        with progress_display() as progress:
            plan, failures = run(options, progress)
        results.show(tables.measure(plan, rows_of(plan.experiment, options.tasks), options.places().out), console)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished cells are kept; the same command goes on", file=sys.stderr)
        return 130
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    console.print(f"{EXPERIMENTS[options.name].title}: {time.monotonic() - started:.0f} s. `world2act results` makes the page.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
