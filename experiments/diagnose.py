"""Which part loses the gain: imagined targets against the expert's own next chunk, at the states that the base visits.

    python -m experiments.diagnose [--episodes 10] [--zoo zoo]

Runs the base on tuning scenes to the end of each episode and asks the simulator's expert at every chunk (privileged, so for
diagnosis only). Columns, squared error of normalised chunks: what the base does; what D_a reads from the true video of the
expert; what it reads from the imagined video. Sizes: mean length of the arm's action; targets that are shorter than the
expert's make a policy slow. latent: error of the imagined latent relative to copying the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.arena import Arena, Run
from experiments.policies import Frozen
from world2act.models.adapters import Adapters
from world2act.models.tiny_policy import TinyPolicy
from world2act.models.worldmodel import WorldModel
from world2act.schedule import EpisodeSpec
from world2act.splits import Split


@dataclass(frozen=True)
class Arguments:
    """Measure imagined targets against the expert at visited states."""

    episodes: int = 10
    """Tuning scenes a task."""
    zoo: Path = Path("zoo")
    """Folder of base, worldmodel and adapters."""
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


def main() -> None:
    """Command line."""
    arguments = tyro.cli(Arguments)
    torch.set_num_threads(arguments.threads)
    base = TinyPolicy.load(arguments.zoo / "base.safetensors")
    model = WorldModel.load(arguments.zoo / "worldmodel.safetensors")
    adapters = Adapters.load(arguments.zoo / "adapters.safetensors")
    adapters.check_worldmodel(model.hash)
    arena = Arena(adapters.actions.std.numpy())
    table = Table(title="Targets against the expert at states that the base visits")
    for column in ("task", "base", "true", "pred", "|expert|", "|base|", "|pred|", "latent"):
        table.add_column(column, justify="left" if column == "task" else "right")
    everything = []
    for task in (task.name for task in arena.spec.tasks):
        specs = [EpisodeSpec(0, task, index, 0.0, f"{index:x}") for index in range(arguments.episodes)]
        found = [links(run, model, adapters) for run in arena.run(specs, Frozen(base), Split.TUNING, expert="video")]
        everything += found
        table.add_row(task, *(f"{value:.2f}" for value in row(found, adapters)))
    table.add_section()
    table.add_row("all", *(f"{value:.2f}" for value in row(everything, adapters)))
    arena.close()
    Console().print(table)


if __name__ == "__main__":
    main()
