"""`world2act results`: everything that experiments have measured, as one page that nobody edits by hand.

    cells (one training seed each) + plans (which cells make which row) -> tables as JSON, plots, docs/results.md

The page is a function of those files alone: no weights, no demonstrations, no clock. What is missing is said.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table as RichTable
from scipy.stats import spearmanr

from experiments import diagnose
from experiments.catalogue import EXPERIMENTS
from experiments.cells import write_whole
from experiments.tables import Contrast, Line, Table, read_cells, tables
from world2act.console import status
from world2act.evaluation import Rate
from world2act.splits import Split

SIGNIFICANT = 0.05

Grid = tuple[str, list[str], list[list[str]]]
"""A table as text: title, header, rows."""


def grids(table: Table) -> list[Grid]:
    """Success, contrasts, rates per task and per round, for the page and the terminal."""
    shown = EXPERIMENTS[table.plan.experiment].notes
    return [grid for grid in (_success(table, shown), _differences(table), _per_task(table), _per_round(table)) if grid[2]]


def _success(table: Table, shown: Sequence[str]) -> Grid:
    header = ["variant", "success", "n", "by training seed", "sd", *(_words(name) for name in shown), "paper"]
    rows = []
    for line in table.lines:
        rate = [str(line.rate), str(line.rate.n)] if line.rate else ["missing", ""]
        seeds = " ".join(f"{rate:.3f}" for rate in line.seeds.values())
        spread = "" if line.spread is None else f"{line.spread:.3f}"
        notes = [f"{line.notes[name]:.4g}" if name in line.notes else "" for name in shown]
        rows.append([_name(line), *rate, seeds, spread, *notes, line.paper])
    return "Success, Wilson 95 %", header, rows


def _name(line: Line) -> str:
    return f"{line.label} (bound)" if line.bound else line.label


def _words(note: str) -> str:
    names = {"seconds/training": "training, s", "updates_per_second": "updates/s", "memory_mb": "memory, MB"}
    return names.get(note, note.replace("seconds/", "s, "))


def _differences(table: Table) -> Grid:
    header = ["variant", "against", "difference", "gained", "lost", "p", "Holm p", "difference by training seed"]
    rows = [
        [
            c.label,
            c.against,
            str(c.difference),
            f"+{c.gained}",
            f"-{c.lost}",
            f"{c.p:.2g}",
            f"{c.holm:.2g}",
            " ".join(f"{value:+.3f}" for value in c.seeds.values()),
        ]
        for c in table.contrasts
    ]
    return "Differences on matched scenes: Newcombe 95 %, exact McNemar, Holm over this table", header, rows


def _per_task(table: Table) -> Grid:
    tasks = sorted({task for line in table.lines for task in line.tasks})
    first = {c.label: c for c in reversed(table.contrasts)}  # against the first reference
    rows = []
    for line in table.lines:
        if line.rate is None:
            continue
        contrast = first.get(line.label)
        found = [_task_text(line.tasks.get(task), contrast.tasks.get(task) if contrast else None) for task in tasks]
        rows.append([_name(line), *found])
    return (
        "Per task (difference to the first reference; starred: Holm p < 0.05 over all tasks and rows)",
        ["variant", *tasks],
        rows,
    )


def _per_round(table: Table) -> Grid:
    rows = []
    for line in (line for line in table.lines if line.rounds):
        runs = list(line.rounds.values())
        means = [[mean(values) for values in zip(*points, strict=True)] for points in zip(*runs, strict=True)]
        ranks = " ".join(_rank(points) for points in runs)
        rows.append([_name(line), *(f"{cosine:.3f} / {rate:.3f}" for cosine, rate in means), ranks])
    rounds = [f"round {number}" for number in range(max((len(row) - 2 for row in rows), default=0))]
    title = "Cosine / success after each round, means over training seeds; rank correlation of the two in each seed's run"
    return title, ["variant", *rounds, "rank correlation by training seed"], rows


def _task_text(rate: Rate | None, contrast: Contrast | None) -> str:
    if rate is None:
        return ""
    if contrast is None:
        return f"{rate.rate:.2f}"
    return f"{rate.rate:.2f} ({contrast.difference.value:+.2f}){'*' if contrast.holm < SIGNIFICANT else ''}"


def show(table: Table, console: Console) -> None:
    """On a terminal."""
    for title, header, rows in grids(table):
        drawn = RichTable(title=title)
        for number, column in enumerate(header):
            drawn.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in rows:
            drawn.add_row(*row)
        console.print(drawn)


def section(table: Table, folder: str) -> list[str]:
    """Markdown of one experiment; its plot lies in `folder`."""
    plan, experiment = table.plan, EXPERIMENTS[table.plan.experiment]
    sizes = plan.sizes
    lines = [f"## {experiment.title}", "", experiment.about, ""]
    hours = f"{table.seconds / 3600:.2f} hours" if table.seconds >= 3600 else f"{table.seconds / 60:.1f} minutes"
    lines += [
        f"{sizes.seeds} training seeds x {sizes.trials} trials x {len(sizes.tasks)} tasks, split {sizes.split.value}; "
        f"{table.cells} of {table.wanted} cells, {hours} summed over them. Command: `{plan.command}`",
        "",
    ]
    if sizes.split is not Split.EVALUATION:
        lines += ["**Tuning scenes: for choosing hyperparameters, not a result.**", ""]
    missing = [f"{line.label} ({line.missing})" for line in table.lines if line.missing]
    if missing:
        lines += [f"**Missing:** {'; '.join(missing)}. Rows with missing seeds are compared on the seeds that both have.", ""]
    for title, header, rows in grids(table):
        lines += [f"**{title}**", "", *markdown(header, rows), ""]
    if table.cells:
        lines += [f"![{experiment.title}]({folder}/{plan.experiment}.png)", ""]
    for regime, sets in table.weights.items():
        lines += [f"- {regime}: " + ", ".join(f"{name} `{value[:12]}`" for name, value in hashes.items()) for hashes in sets]
    return [*lines, ""] if table.weights else lines


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


INTRODUCTION = """# Results

Made by `world2act results` from the cells in `{folder}/`; not edited by hand. The rows are all of those in
`experiments/catalogue.py`; what has not been measured stands there as missing.

How to read it. Success: all episodes of all training seeds, with the Wilson 95 % interval. Each training seed is evaluated in
scenes of its own, which all variants share; differences are paired by scene: Newcombe's 95 % interval for paired proportions
(method 10), exact McNemar p, and p after Holm's adjustment for all differences of the table. These treat scenes as the only
source of chance. Training is another: success and difference by training seed stand beside them, and a gain that the seeds do
not share should not be believed. A training seed is one of post-training (or of the baseline) and of its scenes; base, world
model and Stage 1 of a regime are trained once, and what another training of them would give is in no interval. The paper's
numbers (RoboCasa, GR00T-N1.6, 24 tasks) are of another benchmark, robot and model size: compare directions, not values. Wall
times are of cells that ran side by side, on machines of different speed: rates have benchmarks.
"""


def page(out: Path) -> str:
    """The whole page."""
    found = tables(out)
    lines = [INTRODUCTION.format(folder=out.name)]
    named = {name for table in found for names in table.plan.cells.values() for name in names}
    everything = {path.stem for path in (out / "cells").glob("*.json")}
    seconds = sum(result["wall_seconds"] for result in read_cells(out, sorted(named)).values())
    if found:
        lines += [f"{len(named & everything)} cells, {seconds / 3600:.2f} hours of wall time summed over them.", ""]
    absent = [name for name in EXPERIMENTS if name not in {table.plan.experiment for table in found}]
    if absent:
        lines += [f"Not run: {', '.join(absent)}.", ""]
    if extra := len(everything - named):
        lines += [f"{extra} more cells there belong to no row: of other sizes, or of weights that have been replaced since.", ""]
    for table in found:
        lines += section(table, out.name)
    lines += diagnosis(teachers(out, found), out.name)
    return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True)
class Errors:
    """What `world2act diagnose` kept of a regime: scenes or demonstrations a task; by task, its numbers by column."""

    episodes: int
    numbers: dict[str, dict[str, float]]

    def ratio(self, task: str = diagnose.ALL) -> float:
        """Error of the imagined target over the base's."""
        return self.numbers[task]["imagined"] / self.numbers[task]["base"]


@dataclass(frozen=True)
class Teacher:
    """A regime's errors where its base comes to, and on held-out demonstrations; what its post-training gained. None: not
    measured with these weights."""

    regime: str
    visited: Errors
    held_out: Errors | None
    gain: Contrast | None


def teachers(out: Path, tables: Sequence[Table]) -> list[Teacher]:
    """Every regime that was diagnosed, beside the gain with the same weights: the first table that has it."""
    found, held_out = [], diagnose.read(out, demos=True)
    for name, kept in diagnose.read(out).items():
        other = held_out.get(name, {})
        of_weights = [table for table in tables if kept["weights"] in table.weights.get(name, [])]
        gains = (c for t in of_weights for c in t.contrasts if c.label == f"world2act, {name}" and c.against.startswith("base"))
        same = _errors(other) if other.get("weights") == kept["weights"] else None
        found.append(Teacher(name, _errors(kept), same, next(gains, None)))
    return found


def _errors(kept: Mapping[str, Any]) -> Errors:
    return Errors(kept["episodes"], {task: dict(zip(kept["columns"], row, strict=True)) for task, row in kept["rows"].items()})


def _rank(pairs: Sequence[tuple[float, float]]) -> str:
    return f"{spearmanr(*zip(*pairs, strict=True)).statistic:.2f}" if len(pairs) > 2 else "too few"


def diagnosis(found: Sequence[Teacher], folder: str) -> list[str]:
    """Markdown of `teachers`: over all tasks, and task by task."""
    if not found:
        return []
    header = ["regime", "scenes a task", "base", "true video", "imagined video", "imagined / base", "latent / copy"]
    rows, by_task = [], []
    ranks: dict[str, list[tuple[float, float]]] = {"visited": [], "visited, by task": [], "held out": [], "held out, by task": []}
    for one in found:
        n, gain, other = one.visited.numbers[diagnose.ALL], one.gain, one.held_out
        shown = [f"{value:.2f}" for value in (n["base"], n["true"], n["imagined"], one.visited.ratio(), n["latent"])]
        said = f"{gain.difference} (n {gain.n})" if gain else "not measured with these weights"
        rows.append(
            [one.regime, str(one.visited.episodes), *shown, f"{other.ratio():.2f} ({other.episodes})" if other else "", said]
        )
        if gain is None:
            continue
        tasks = {task: contrast.difference.value for task, contrast in sorted(gain.tasks.items())}
        by_task.append([one.regime, *(f"{one.visited.ratio(task):.2f}: {value:+.2f}" for task, value in tasks.items())])
        for name, errors in (("visited", one.visited), ("held out", other)):
            if errors:
                ranks[name].append((errors.ratio(), gain.difference.value))
                ranks[f"{name}, by task"] += [(errors.ratio(task), value) for task, value in tasks.items()]
    title, about = DIAGNOSIS
    lines = [f"## {title}", "", about, "", *markdown([*header, "the same, held out", "post-training gains"], rows), ""]
    if by_task:
        said = "; ".join(f"{name} {_rank(pairs)} (n {len(pairs)})" for name, pairs in ranks.items())
        lines += [f"Rank correlation of imagined / base with the gain: {said}.", ""]
        lines += ["**imagined / base at visited states: gain, task by task**", ""]
        lines += [*markdown(["regime", *sorted(next(one.gain for one in found if one.gain).tasks)], by_task), ""]
    return [*lines, f"![{title}]({folder}/diagnosis.png)", ""]


DIAGNOSIS = (
    "Which part loses the gain",
    "At the states that the base visits on tuning scenes, squared errors of normalised chunks against the simulator's expert: "
    "the base's own chunk, what the adapters read from the expert's *true* video, and from the *imagined* video, which is the "
    "target. A target that is no nearer to the expert than the base's own chunk has nothing to teach. latent / copy: error of "
    "the imagined latent relative to copying the frame. held out: at the states of held-out demonstrations, half of them "
    "disturbed (how many a task), and against what was done there; needs no simulator. Commands: `world2act diagnose "
    "--regimes all --episodes N`, N scenes a task; the same with `--demos data/demos`",
)


def to_json(table: Table) -> str:
    """The table as JSON."""
    return json.dumps(asdict(table), indent=1, default=str)


def publish(out: Path) -> Path:
    """Write tables, plots and page; returns the page, `out` with suffix .md. Raises ValueError where nothing has been run."""
    from experiments import plots

    found = tables(out)
    if not found:
        raise ValueError(f"out: {out} has no results; `world2act experiment NAME` computes some")
    for table in found:
        write_whole(out / f"{table.plan.experiment}.json", to_json(table))
        if table.cells:
            plots.draw(table, out / f"{table.plan.experiment}.png")
    points = [
        (one.regime, one.visited.ratio(), one.held_out.ratio() if one.held_out else None, one.gain.difference)
        for one in teachers(out, found)
        if one.gain
    ]
    if points:
        plots.teachers(points, out / "diagnosis.png")
    path = out.with_name(f"{out.name}.md")
    write_whole(path, page(out))
    return path


@dataclass(frozen=True)
class Options:
    """out: folder with the cells; the page is written beside it, with its name."""

    out: Path = Path("docs/results")


def main() -> int:
    """Command line; see `Options`."""
    options = tyro.cli(Options, prog="world2act results", description=__doc__)
    return status(lambda: print(publish(options.out)))


if __name__ == "__main__":
    sys.exit(main())
