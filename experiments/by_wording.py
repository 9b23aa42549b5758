"""What `world2act experiment cross-task` has measured, kind of wording by kind: `python -m experiments.by_wording`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from experiments.study import outcomes_of
from experiments.tables import Plan, read_cells
from experiments.wording import KINDS
from world2act.console import status, terminal
from world2act.evaluation import Outcome, wilson

LABELS = ("base", "base, other words", "post-trained on all", "post-trained on all, other words")


def _rates(outcomes: Sequence[Outcome]) -> list[str]:
    """By kind; a row in its own words is counted in the same scenes."""
    found = []
    for kind in range(len(KINDS)):
        marks = [outcome.success for outcome in outcomes if outcome.index % len(KINDS) == kind]
        rate = wilson(sum(marks), len(marks))
        found.append(f"{rate.rate:.2f} [{rate.low:.2f}, {rate.high:.2f}]")
    return found


def table(out: Path) -> Table:
    """Success by row, task and kind. out: plans and cells. Raises ValueError where a row was not measured, OSError."""
    plan = Plan.load(out, "cross-task")
    shown = Table("row", "task", *KINDS, title="Success, Wilson 95 %", title_justify="left")
    for label in LABELS:
        results = read_cells(out, plan.cells.get(label, ()) if plan else ())
        outcomes = [outcome for result in results.values() for outcome in outcomes_of(result)]
        if not outcomes:
            raise ValueError(f"{out}: row {label!r} has no cell; run world2act experiment cross-task")
        shown.add_row(label, "all", *_rates(outcomes))
        for task in dict.fromkeys(outcome.task for outcome in outcomes):
            shown.add_row("", task, *_rates([outcome for outcome in outcomes if outcome.task == task]))
    return shown


def main(out: Path = Path("docs/results")) -> int:
    """Command line; errors are one line and status 2."""
    return status(lambda: terminal().print(table(out)))


if __name__ == "__main__":
    sys.exit(main())
