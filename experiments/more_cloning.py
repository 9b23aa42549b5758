"""Baseline (b) on any simulator: what the base would do had it been cloned from every label that Stage 1 has seen.

    python -m experiments.more_cloning --simulator libero --demos DEMOS --zoo ZOO --trials 10

Both act on the evaluation scenes of `world2act demo` and `world2act evaluate` (split and index say which), so that post-training
with the same labels can be held against them: a gain over a base that has seen few of them says little by itself.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import tyro
from rich.console import Console

from experiments.arena import Arena
from experiments.cells import write_whole
from experiments.policies import Frozen
from experiments.regimes import clone
from world2act import evaluation
from world2act.console import progress_display, status, terminal
from world2act.data import robomimic
from world2act.models.tiny_policy import TinyPolicy
from world2act.splits import Split


@dataclass(frozen=True)
class Arguments:
    """Clone the base from every label, and compare both on evaluation scenes."""

    demos: Path
    """Folder of demonstrations: those of split worldmodel, and the base's own few of split base."""
    zoo: Path = Path("zoo")
    """Folder of base.safetensors."""
    simulator: str = "metaworld"
    tasks: tuple[str, ...] = ()
    """Tasks, or patterns such as 'libero_object-*'; none: all that have demonstrations."""
    trials: int = 20
    """Evaluation scenes a task, the first ones."""
    per_task: int = 4
    """Demonstrations of split base that the base has seen, a task."""
    seed: int = 0
    threads: int = 1
    """CPU threads."""
    out: Path | None = None
    """Where the table goes as JSON."""


def run(arguments: Arguments, console: Console) -> None:
    """The whole command. Raises ValueError without demonstrations of a task, WeightsError, OSError."""
    torch.set_num_threads(arguments.threads)
    base = TinyPolicy.load(arguments.zoo / "base.safetensors")
    paths = sorted((arguments.demos / Split.WORLDMODEL.value).glob("*.hdf5"))
    tasks = [p.stem for p in paths if not arguments.tasks or any(fnmatchcase(p.stem, t) for t in arguments.tasks)]
    labels = list(robomimic.read_root(arguments.demos, allowed=[Split.WORLDMODEL], tasks=tasks))
    for task in tasks:
        own = (e for e in robomimic.read_root(arguments.demos, allowed=[Split.BASE], tasks=[task]))
        labels += [episode for _, episode in zip(range(arguments.per_task), own, strict=False)]
    with progress_display() as progress:
        cloned = clone(labels, arguments.seed, progress=progress)
    arena = Arena(base.action_std.numpy(), arguments.simulator)
    scenes = range(arguments.trials)
    before, after = (arena.evaluate(Frozen(policy), Split.EVALUATION, tasks, scenes) for policy in (base, cloned))
    arena.close()
    rows = evaluation.compare(before, after)
    console.print(evaluation.rich_table(rows, f"Base, and cloned from all {len(labels)} labels: success, Wilson 95 %", "cloned"))
    if arguments.out:
        write_whole(arguments.out, json.dumps({"labels": len(labels), **evaluation.to_json(rows)}, indent=1))


def main() -> int:
    """Command line; errors are one line and status 2."""
    return status(lambda: run(tyro.cli(Arguments, description=__doc__), terminal()))


if __name__ == "__main__":
    sys.exit(main())
