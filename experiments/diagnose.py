"""Which part loses the gain: imagined targets against the expert's own next chunk, at the states that the base visits.

    world2act diagnose [--episodes 10] [--zoo zoo]
    world2act diagnose --demos data/robot --zoo zoo-robot    without any simulator
    world2act diagnose --regimes all --episodes 5    kept for `world2act results`

Runs the base on tuning scenes to the end of each episode and asks the simulator's expert at every chunk (privileged, so for
diagnosis only); with --demos, asks nobody: the states are those of held-out demonstrations, the expert who gave them. Columns,
squared error of normalised chunks: what the base does; what D_a reads from the true video of the expert; what it reads from
the imagined video. Sizes: mean length of the arm's action; targets that are shorter than the expert's make a policy slow.
latent: error of the imagined latent relative to copying the start. ratio: imagined / base; from about 1 on a target has
nothing to teach (decision 049), and a task is better left to the base.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.arena import Arena, Run
from experiments.catalogue import LONGER, MEASURED_AT, READ, SHIPPED
from experiments.cells import write_whole
from experiments.policies import Frozen
from experiments.regimes import PARTS, Places, Regime, lacking, weights
from world2act.console import status, terminal
from world2act.data import robomimic
from world2act.data.clips import camera_grid, intended, lived_skills
from world2act.models.adapters import Adapters
from world2act.models.tiny_policy import TinyPolicy
from world2act.models.worldmodel import WorldModel
from world2act.schedule import EpisodeSpec
from world2act.splits import Split
from world2act.types import Episode, M

_BY_SIZE = (Regime(kind, count) for kind, counts in MEASURED_AT.items() for count in counts)
REGIMES = {regime.name: regime for regime in (SHIPPED, *_BY_SIZE, READ, LONGER)}
COLUMNS = ("base", "true", "imagined", "|expert|", "|base|", "|imagined|", "latent")
ALL = "all"
"""Row of all tasks, and name of all regimes."""


@dataclass(frozen=True)
class Arguments:
    """Measure imagined targets against the expert at visited states."""

    episodes: int = 10
    """Tuning scenes a task, or held-out demonstrations."""
    demos: Path | None = None
    """Folder of demonstrations: those of split validation instead of a simulator and its expert."""
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
class States:
    """n states at which somebody knows better.

    frames uint8 (n, H, W, 3); prompts: the active skills; base, expert: chunks float32 (n, M, A) in the simulator's units; seen
    uint8 (n, M, H, W, 3): what the expert's chunk looks like.
    """

    frames: Tensor
    prompts: tuple[str, ...]
    base: Tensor
    expert: Tensor
    seen: Tensor


def visited(run: Run) -> States:
    """The states of one run (with expert="video")."""
    assert run.expert is not None and run.expert_frames is not None
    frames, base, expert, seen = map(
        torch.from_numpy, (run.trajectory.frames, run.trajectory.base, run.expert, run.expert_frames)
    )
    return States(frames, run.trajectory.prompts, base, expert, seen)


def demonstrated(episode: Episode, base: TinyPolicy) -> States:
    """The chunk starts of a demonstration from which everything was intended, with the skills that a running policy would have
    been given there."""
    prompts = [skill.prompt for skill in lived_skills(episode) for _ in range(skill.start, skill.end, M)]
    wanted = intended(episode)[: M * len(prompts)].reshape(-1, M).all(axis=1)
    at = M * np.flatnonzero(wanted)
    grid, states = torch.from_numpy(camera_grid(episode)), torch.from_numpy(episode.states[at])
    following = torch.from_numpy(at)[:, None] + torch.arange(M)
    chunk = base.act(grid[at], states, [episode.instruction] * len(at))
    said = tuple(prompts[i] for i in np.flatnonzero(wanted))
    return States(grid[at], said, chunk, torch.from_numpy(episode.actions)[following], grid[following + 1])


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
def links(at: States, model: WorldModel, adapters: Adapters) -> Links:
    """Every link of the chain at some states."""
    imagined = model.imagine(at.frames, at.prompts, 1, [0] * len(at.frames))
    true = model.encode(torch.cat([at.frames[:, None], at.seen], dim=1))
    read, named = (adapters.decoder(adapters.video(latents[:, 1:]))[:, 0] for latents in (true, imagined))
    error, copied = ((x - true[:, 1]).square().mean((1, 2, 3)) for x in (imagined[:, 1], true[:, 0]))
    return Links(adapters.actions.normalise(at.expert), adapters.actions.normalise(at.base), read, named, error, copied)


def row(found: list[Links], adapters: Adapters) -> list[float]:
    """Errors of base, true and predicted; mean arm action of expert, base and predicted, in the simulator's units; latent."""
    whole = {name: torch.cat([getattr(one, name) for one in found]) for name in Links.__dataclass_fields__}
    errors = [(whole[name] - whole["expert"]).square().mean().item() for name in ("base", "true", "predicted")]
    acted = {name: adapters.actions.denormalise(whole[name]).clamp(-1, 1) for name in ("expert", "base", "predicted")}
    sizes = [acted[name][..., :3].norm(dim=-1).mean().item() for name in ("expert", "base", "predicted")]
    return [*errors, *sizes, (whole["error"].sum() / whole["copied"].sum()).item()]


def measure(paths: Mapping[str, Path], episodes: int, demos: Path | None = None) -> dict[str, list[float]]:
    """Task, or `ALL` -> numbers under COLUMNS, with the weights files `paths` of PARTS. Raises WeightsError, FormatError."""
    base = TinyPolicy.load(paths["base"])
    model = WorldModel.load(paths["worldmodel"])
    adapters = Adapters.load(paths["adapters"])
    adapters.check_worldmodel(model.hash)
    states = simulated(base, adapters, episodes) if demos is None else held_out(demos, base, episodes)
    found = {task: [links(at, model, adapters) for at in members] for task, members in states}
    if not found:
        raise ValueError(f"demos: {demos} has no chunk of {M} actions that were all intended")
    found[ALL] = [one for members in found.values() for one in members]
    return {task: row(members, adapters) for task, members in found.items()}


def simulated(base: TinyPolicy, adapters: Adapters, episodes: int) -> Iterator[tuple[str, list[States]]]:
    """Task by task, where the base comes to on tuning scenes, and what the simulator's expert would do there."""
    arena = Arena(adapters.actions.std.numpy())
    for task in (task.name for task in arena.spec.tasks):
        specs = [EpisodeSpec(0, task, index, 0.0, f"{index:x}") for index in range(episodes)]
        yield task, [visited(run) for run in arena.run(specs, Frozen(base), Split.TUNING, expert="video")]
    arena.close()


def held_out(demos: Path, base: TinyPolicy, episodes: int) -> Iterator[tuple[str, list[States]]]:
    """Task by task, `episodes` demonstrations of split validation at most. Raises FormatError where there is none."""
    for task, members in itertools.groupby(robomimic.read_root(demos, allowed=[Split.VALIDATION]), lambda e: e.task):
        found = [demonstrated(episode, base) for episode in itertools.islice(members, episodes)]
        if known := [at for at in found if len(at.frames)]:
            yield task, known


def show(title: str, rows: Mapping[str, list[float]]) -> Table:
    """For a terminal."""
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("task", *COLUMNS, "ratio"):
        table.add_column(column, justify="left" if column == "task" else "right", overflow="fold")
    for task, numbers in rows.items():
        if task == ALL:
            table.add_section()
        table.add_row(task, *(f"{value:.2f}" for value in (*numbers, numbers[2] / numbers[0])))
    return table


def verdict(demos: bool) -> str:
    """What the ratio says, as far as it was measured."""
    seen = (
        "gained 28, 17, 17 and 13 points at 0.28, 0.46, 0.49 and 0.50, next to nothing at 0.56 and 0.65, and did harm from 0.7 on"
        if demos
        else "gained below 0.75 and did harm from 0.98 on"
    )
    return (
        "ratio: error of imagined targets / error of the base. In fourteen regimes of Meta-World post-training "
        f'{seen} (docs/findings.md, "When to expect a gain"). Other columns: world2act diagnose --help.'
    )


def kept_at(out: Path, regime: str, demos: bool = False) -> Path:
    """Where what was found of a regime is kept; demos: on held-out demonstrations."""
    return out / "diagnosis" / f"{regime}{'-demonstrations' if demos else ''}.json"


def read(out: Path, demos: bool = False) -> dict[str, dict[str, Any]]:
    """What was kept under `out`, regime by regime in the catalogue's order."""
    paths = {name: kept_at(out, name, demos) for name in REGIMES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def run(arguments: Arguments, console: Console) -> None:
    """The whole command. Raises ValueError for a number out of range, an unknown regime, one whose parts are not there or no
    demonstrations, WeightsError, OSError."""
    if arguments.episodes < 1 or arguments.threads < 1:
        raise ValueError(f"episodes, threads: must be >= 1, got {arguments.episodes}, {arguments.threads}")
    torch.set_num_threads(arguments.threads)
    title = f"Targets against the expert at {'held-out demonstrations' if arguments.demos else 'states that the base visits'}"
    if not arguments.regimes:
        paths = {name: arguments.zoo / f"{name}.safetensors" for name in PARTS}
        console.print(show(title, measure(paths, arguments.episodes, arguments.demos)))
    places = Places(out=arguments.out, cache=arguments.cache, zoo=arguments.zoo)
    names = tuple(REGIMES) if arguments.regimes == (ALL,) else arguments.regimes
    for name in names:
        if name not in REGIMES:
            raise ValueError(f"regimes: {name!r} is unknown; choose {ALL} or some of {', '.join(REGIMES)}")
        if missing := lacking(REGIMES[name], places):
            raise ValueError(f"{name}: has no {' and '.join(missing)} yet; `world2act experiment regimes` builds them")
    for name in names:
        rows = measure({part: places.part(REGIMES[name], part) for part in PARTS}, arguments.episodes, arguments.demos)
        found = {"weights": weights(REGIMES[name], places), "episodes": arguments.episodes, "columns": COLUMNS, "rows": rows}
        write_whole(kept_at(arguments.out, name, arguments.demos is not None), json.dumps(found, indent=1))
        console.print(show(f"{title}, {name}", rows))
    console.print(verdict(arguments.demos is not None), highlight=False)


def main() -> int:
    """Command line; errors are one line and status 2."""
    return status(lambda: run(tyro.cli(Arguments, prog="world2act diagnose", description=__doc__), terminal()))


if __name__ == "__main__":
    sys.exit(main())
