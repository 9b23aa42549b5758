"""The stage1 job: world2act.stage1 on demonstrations inside the data folder; the adapters become an artifact."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from services.trainer.context import JobContext
from services.trainer.params import Stage1Params
from world2act import stage1
from world2act.presets import STAGE1
from world2act.splits import Split
from world2act.types import Clip


def inside(root: Path, relative: str) -> Path:
    """The folder `relative` to `root`. Raises ValueError when it lies outside, also through a link, or does not exist."""
    root = root.resolve()
    path = (root / relative).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"demos: {relative[:200]!r} is outside the data folder")
    if not path.is_dir():
        raise ValueError(f"demos: {relative[:200]!r} is no folder in the data folder")
    return path


def run(context: JobContext, params: Stage1Params) -> dict[str, Any]:
    """Latents, training, held-out metrics. Result: `artifact` (adapters), `metrics`, `history`, `seconds`."""
    from world2act.models.worldmodel import WorldModel  # diffusers takes seconds to import

    root = inside(context.settings.data_root, params.demos)
    settings = STAGE1[params.preset]
    if params.steps is not None:
        settings = replace(settings, steps=params.steps)
    began = time.monotonic()
    weights = context.settings.zoo / "worldmodel.safetensors"
    if not weights.is_file():
        raise ValueError(f"worldmodel: {weights} is missing; train or download it first")
    model = WorldModel.load(weights)

    def clips(split: Split) -> Iterator[Clip]:
        for number, clip in enumerate(stage1.read_clips(root, split)):
            context.check()
            if number % 20 == 0:
                context.progress(0.1, f"encoding clip {number} of split {split.value}")
            yield clip

    data, held_out = (
        stage1.build_data(model, clips(split), settings.horizon, params.seed) for split in (Split.WORLDMODEL, Split.VALIDATION)
    )
    built = time.monotonic()
    every = max(1, settings.steps // 200)

    def progress(step: int, steps: int, values: dict[str, float]) -> None:
        context.check()
        if step % every == 0:
            context.event("metrics", f"step-{step}", {"step": step, **{k: round(v, 6) for k, v in values.items()}})
            context.progress(0.3 + 0.7 * step / steps, f"step {step} of {steps}")

    adapters, history = stage1.train(data, settings, params.seed, progress)
    metrics = stage1.evaluate(adapters, held_out, params.seed)
    seconds = {"latents": round(built - began, 1), "training": round(time.monotonic() - built, 1)}
    card = {
        "what": "Stage 1 adapters: E_v, E_a, D_a",
        "data": f"{len(data)} skill clips of split worldmodel; metrics on {len(held_out)} of split validation",
        "command": f"stage1 job {context.id}: {params.model_dump_json()}",
        "seed": params.seed,
        "settings": asdict(settings),
        "metrics": metrics,
        "seconds": seconds,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapters.safetensors"
        adapters.save(path, card)
        artifact = context.artifacts.put(path.read_bytes(), "safetensors")
    shown = [{"step": i + 1, **{k: round(v, 6) for k, v in history[i].items()}} for i in range(every - 1, len(history), every)]
    return {
        "artifact": artifact,
        "hash": adapters.hash,
        "worldmodel_hash": adapters.worldmodel_hash,
        "metrics": metrics,
        "clips": {"worldmodel": len(data), "validation": len(held_out)},
        "history": shown,
        "seconds": seconds,
    }
