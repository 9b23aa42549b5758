"""How often the scripted experts succeed: `python -m services.simulator.experts --simulator libero --tasks 'libero_object-*'`.

Runs each task's expert in the first scenes of a split, without drawing a frame, and prints successes with 95 % Wilson intervals.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from services.simulator.envs import base
from world2act.console import terminal
from world2act.evaluation import wilson
from world2act.splits import Split, scene_seed


@dataclass
class ExpertSettings:
    """Measure the scripted experts."""

    simulator: str = "libero"
    """Simulator."""
    tasks: tuple[str, ...] = ()
    """Tasks, or patterns such as 'libero_object-*'; none: all that the simulator has."""
    split: tyro.conf.EnumChoicesFromValues[Split] = Split.EVALUATION
    """Whose scenes to use."""
    first: int = 0
    """Index of the first scene."""
    scenes: int = 10
    """Scenes per task."""


def succeeds(env: base.Environment, task: str) -> tuple[bool, int]:
    """Whether the expert solves the scene at hand within the task's limit, and the number of actions it took."""
    limit = env.spec.task(task).max_chunks * env.spec.chunk
    for number in range(1, limit + 1):
        if env.step(env.expert_action()[None], "none").success:
            return True, number
    return False, limit


def main() -> int:
    """Console entry."""
    settings = tyro.cli(ExpertSettings)
    console, errors = terminal(), Console(stderr=True)
    table = Table(title=f"Scripted experts, {settings.simulator}, split {settings.split.value}, from scene {settings.first}")
    for column in ("task", "success", "95 %", "actions"):
        table.add_column(column, justify="left" if column == "task" else "right")
    total: list[bool] = []
    try:
        env = base.make(settings.simulator)
        for task in base.matching_tasks(env.spec, settings.tasks):
            results = []
            for index in range(settings.first, settings.first + settings.scenes):
                env.reset(task, scene_seed(settings.split, index))
                try:
                    results.append(succeeds(env, task))
                except base.InvalidInputError as error:  # the task has no expert
                    errors.print(str(error))
                    break
                errors.print(f"{task} {index}: {'solved' if results[-1][0] else 'FAILED'} after {results[-1][1]}")
            total += [solved for solved, _ in results]
            add_row(table, task, [s for s, _ in results], [n for s, n in results if s])
        env.close()
    except (ValueError, RuntimeError) as error:
        console.print(f"[red]error[/red] {error}")
        return 1
    table.add_section()
    add_row(table, "all", total, [])
    console.print(table)
    return 0


def add_row(table: Table, name: str, results: list[bool], lengths: list[int]) -> None:
    """One line; a task without an expert says so."""
    if not results:
        table.add_row(name, "no expert", "", "")
        return
    rate = wilson(sum(results), len(results))
    mean = f"{sum(lengths) / len(lengths):.0f}" if lengths else ""
    table.add_row(name, f"{sum(results)}/{len(results)}", f"{rate.low:.2f} to {rate.high:.2f}", mean)


if __name__ == "__main__":
    sys.exit(main())
