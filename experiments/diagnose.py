"""Which part loses the gain: imagined targets against the expert's own next chunk, at the states that the base visits.

    python -m experiments.diagnose [--episodes 10] [--zoo zoo]
    python -m experiments.diagnose --regimes all --episodes 5    kept for `world2act results`

Runs the base on tuning scenes to the end of each episode and asks the simulator's expert at every chunk (privileged, so for
diagnosis only). Columns, squared error of normalised chunks: what the base does; what D_a reads from the true video of the
expert; what it reads from the imagined video. Sizes: mean length of the arm's action; targets that are shorter than the
expert's make a policy slow. latent: error of the imagined latent relative to copying the start. ratio: imagined / base; from
about 1 on a target has nothing to teach (decision 049), and a task is better left to the base.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.arena import Arena, Run
from experiments.catalogue import MEASURED_AT, SHIPPED
from experiments.cells import write_whole
from experiments.policies import Frozen
from experiments.regimes import PARTS, Places, Regime, lacking, weights
from world2act.models.adapters import Adapters
from world2act.models.tiny_policy import TinyPolicy
from world2act.models.worldmodel import WorldModel
from world2act.schedule import EpisodeSpec
from world2act.splits import Split

REGIMES = {r.name: r for r in (SHIPPED, *(Regime(kind, count) for kind, counts in MEASURED_AT.items() for count in counts))}
COLUMNS = ("base", "true", "imagined", "|expert|", "|base|", "|imagined|", "latent")
ALL = "all"
"""Row of all tasks, and name of all regimes."""


@dataclass(frozen=True)
class Arguments:
    """Measure imagined targets against the expert at visited states."""

    episodes: int = 10
    """Tuning scenes a task."""
    zoo: Path = Path("zoo")
    """Folder of base, worldmodel and adapters."""
    regimes: tuple[str, ...] = ()
    """Instead of one folder: regimes as docs/results.md names them, or all; what is found is kept for that page."""
    out: Path = Places.out
    cache: Path = Places.cache
    """Folders of results and of the regimes' parts, as `experiment` has them."""
    threads: int = 1
    """CPU threads."""


@dataclass(frozen=True)
class Links:
    """Chunks of n visited states, normalised, (n, M, A) each, and latent errors (n,) of prediction and copy."""

    expert: Tensor
    base: Tensor
    true: Tensor
    predicted: Tensor
    error: Tensor
    copied: Tensor


@torch.no_grad()
def links(run: Run, model: WorldModel, adapters: Adapters) -> Links:
    """Every link of the chain at the states of one run (with expert="video")."""
    assert run.expert is not None and run.expert_frames is not None
    frames = torch.from_numpy(run.trajectory.frames)
    imagined = model.imagine(frames, run.trajectory.prompts, 1, [0] * len(frames))
    true = model.encode(torch.cat([frames[:, None], torch.from_numpy(run.expert_frames)], dim=1))
    read, named = (adapters.decoder(adapters.video(latents[:, 1:]))[:, 0] for latents in (true, imagined))
    error, copied = ((x - true[:, 1]).square().mean((1, 2, 3)) for x in (imagined[:, 1], true[:, 0]))
    expert, base = (adapters.actions.normalise(torch.from_numpy(x)) for x in (run.expert, run.trajectory.base))
    return Links(expert, base, read, named, error, copied)


def row(found: list[Links], adapters: Adapters) -> list[float]:
    """Errors of base, true and predicted; mean arm action of expert, base and predicted, in the simulator's units; latent."""
    whole = {name: torch.cat([getattr(one, name) for one in found]) for name in Links.__dataclass_fields__}
    errors = [(whole[name] - whole["expert"]).square().mean().item() for name in ("base", "true", "predicted")]
    acted = {name: adapters.actions.denormalise(whole[name]).clamp(-1, 1) for name in ("expert", "base", "predicted")}
    sizes = [acted[name][..., :3].norm(dim=-1).mean().item() for name in ("expert", "base", "predicted")]
    return [*errors, *sizes, (whole["error"].sum() / whole["copied"].sum()).item()]


def measure(paths: Mapping[str, Path], episodes: int) -> dict[str, list[float]]:
    """Task, or `ALL` -> numbers under COLUMNS, with the weights files `paths` of PARTS. Raises WeightsError."""
    base = TinyPolicy.load(paths["base"])
    model = WorldModel.load(paths["worldmodel"])
    adapters = Adapters.load(paths["adapters"])
    adapters.check_worldmodel(model.hash)
    arena = Arena(adapters.actions.std.numpy())
    found: dict[str, list[Links]] = {}
    for task in (task.name for task in arena.spec.tasks):
        specs = [EpisodeSpec(0, task, index, 0.0, f"{index:x}") for index in range(episodes)]
        found[task] = [links(run, model, adapters) for run in arena.run(specs, Frozen(base), Split.TUNING, expert="video")]
    arena.close()
    found[ALL] = [one for members in found.values() for one in members]
    return {task: row(members, adapters) for task, members in found.items()}


def show(title: str, rows: Mapping[str, list[float]]) -> Table:
    """For a terminal."""
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("task", *COLUMNS, "ratio"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, numbers in rows.items():
        if task == ALL:
            table.add_section()
        table.add_row(task, *(f"{value:.2f}" for value in (*numbers, numbers[2] / numbers[0])))
    return table


def read(out: Path) -> dict[str, dict[str, Any]]:
    """What was kept under `out`, regime by regime in the catalogue's order."""
    paths = {name: out / "diagnosis" / f"{name}.json" for name in REGIMES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def run(arguments: Arguments, console: Console) -> None:
    """The whole command. Raises ValueError for an unknown regime or one whose parts are not there, WeightsError, OSError."""
    torch.set_num_threads(arguments.threads)
    title = "Targets against the expert at states that the base visits"
    if not arguments.regimes:
        paths = {name: arguments.zoo / f"{name}.safetensors" for name in PARTS}
        console.print(show(title, measure(paths, arguments.episodes)))
    places = Places(out=arguments.out, cache=arguments.cache, zoo=arguments.zoo)
    names = tuple(REGIMES) if arguments.regimes == (ALL,) else arguments.regimes
    for name in names:
        if name not in REGIMES:
            raise ValueError(f"regimes: {name!r} is unknown; choose {ALL} or some of {', '.join(REGIMES)}")
        if missing := lacking(REGIMES[name], places):
            raise ValueError(f"{name}: has no {' and '.join(missing)} yet; `world2act experiment regimes` builds them")
    for name in names:
        rows = measure({part: places.part(REGIMES[name], part) for part in PARTS}, arguments.episodes)
        found = {"weights": weights(REGIMES[name], places), "episodes": arguments.episodes, "columns": COLUMNS, "rows": rows}
        write_whole(arguments.out / "diagnosis" / f"{name}.json", json.dumps(found, indent=1))
        console.print(show(f"{title}, {name}", rows))


def main() -> int:
    """Command line; errors are one line and status 2."""
    try:
        run(tyro.cli(Arguments), Console())
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
