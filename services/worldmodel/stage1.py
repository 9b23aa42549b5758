"""`world2act stage1 [--backbone NAME]`: the adapters on the embedded world model's latents (default), or on a large one's.

    world2act stage1 --backbone cosmos_predict2 --model FOLDER --data DEMOS --out zoo-cosmos/adapters.safetensors

The recipe is world2act/stage1.py's. Latents of all clips are held in memory (float16): twice 4.8 MB a clip of 93 frames at
480 x 832.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from services.worldmodel.backbones import load_backbone
from services.worldmodel.quality import TorchModel
from services.worldmodel.serving import check_compression
from services.worldmodel.settings import WorldModelSettings
from services.worldmodel.training import without_backbone
from services.worldmodel.windows import read_episodes
from world2act import stage1
from world2act.console import Progress, no_progress, progress_display
from world2act.data.clips import cut_clips
from world2act.presets import STAGE1, Preset
from world2act.splits import Split
from world2act.types import Clip, M


@dataclass(frozen=True)
class Arguments:
    """Train the adapters (Stage 1) on a large world model's latents."""

    backbone: str
    """A name in services/worldmodel/backbones; its other settings are W2A_BACKBONE_*, as for serving."""
    model: str
    """Its weights: a folder or a hub's id."""
    data: Path
    """Demonstrations with actions: <data>/<split>/<task>.hdf5, or anything that this project's readers know."""
    out: Path
    """Where the adapters go: adapters.safetensors in the folder that W2A_ZOO will name."""
    held_out: Path | None = None
    """Demonstrations for the metrics; by default split validation of `data`, if it has one."""
    preset: Preset = "default"
    latents: Literal["full", "one-step"] = "full"
    """full: denoised from noise (paper); one-step: the true clip noised and denoised in one step (the authors' code)."""
    episodes: int | None = None
    """Demonstrations a task at most."""
    steps: int = 0
    """Training steps; 0: the preset's."""
    seed: int = 0
    threads: int = 1


def run(arguments: Arguments, settings: WorldModelSettings, progress: Progress = no_progress) -> dict[str, Any]:
    """The command as a function; returns the card. Raises ValueError for a model or data that will not do."""
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = check_compression(load_backbone(settings, device))
    model, recipe = TorchModel(backbone), STAGE1[arguments.preset]

    def clips(data: Path, split: Split, phases: int) -> Iterator[Clip]:
        for number, episode in enumerate(read_episodes(data, split, arguments.episodes)):
            progress(f"latents of {split}", number + 1, number + 1, {})
            for clip in cut_clips(episode, phases=range(0, M, max(1, M // phases))):
                yield _shortened(clip, backbone.info.max_horizon)

    one_step = arguments.latents == "one-step"
    data = stage1.build_data(
        model, clips(arguments.data, Split.WORLDMODEL, recipe.phases), recipe.horizon, arguments.seed, one_step
    )
    recipe = replace(recipe, steps=arguments.steps or recipe.steps)
    built = time.perf_counter()
    trained, history = stage1.train(data, recipe, arguments.seed, lambda i, n, values: progress("Stage 1", i, n, values))
    held = arguments.held_out or (arguments.data if (arguments.data / Split.VALIDATION.value).is_dir() else None)
    metrics: dict[str, float] = {}
    note = ""
    if held is not None:
        unseen = stage1.build_data(model, clips(held, Split.VALIDATION, 1), recipe.horizon, arguments.seed, one_step)
        metrics, note = stage1.evaluate(trained, unseen), stage1.unmeasured(len(unseen))
    card = {
        "what": f"Stage 1 adapters on {backbone.info.name} ({arguments.latents} latents)",
        "data": f"{len(data)} skill clips",
        "settings": asdict(replace(recipe, adapters=trained.settings)),
        "metrics": metrics,
        "note": note,
        "loss": history[-1]["loss"],
        "seconds": {"latents": round(built - began, 1), "all": round(time.perf_counter() - began, 1)},
    }
    trained.save(arguments.out, card)
    return card


def _shortened(clip: Clip, longest: int) -> Clip:
    """The first `longest` chunks of a clip."""
    frames, rows = clip.frames[: 1 + M * longest], slice(longest)
    return replace(clip, frames=frames, actions=clip.actions[rows], intended=clip.intended[rows])


def main() -> None:
    """`--backbone small`, or none, is the embedded model's own Stage 1."""
    arguments = without_backbone()
    if arguments is None:
        stage1.main()
        return
    asked = tyro.cli(Arguments, args=arguments, prog="world2act stage1", description=__doc__)
    try:
        with progress_display() as progress:
            card = run(asked, WorldModelSettings(backbone=asked.backbone, backbone_model=asked.model), progress)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())[:1000]}") from None
    print(json.dumps({name: card[name] for name in ("data", "metrics", "loss", "seconds")}, indent=2))
    if card["note"]:
        print(card["note"], file=sys.stderr)


if __name__ == "__main__":
    main()
