"""Stage 2 updates a second, with the default's latent vision and the paper's pixels, on one core and on a GPU where there is one.

Random data of the embedded default's sizes: 2 tasks x 12 episodes of 12 chunks a step, VAE latents as vision.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch

from world2act.models.adapters import Adapters, AdapterSettings
from world2act.normalisation import Statistics
from world2act.presets import STAGE2, Rounds
from world2act.schedule import plan
from world2act.stage2 import Learner, Stage2Dataset, Targets
from world2act.types import D, Device, M, Trajectory

CHUNKS, STEPS = 12, 30


def make_data(vision: str, device: Device = "cpu") -> tuple[Learner, Stage2Dataset]:
    """A learner and 2 x 16 random episodes."""
    settings = dataclasses.replace(STAGE2["default"], vision=vision, plan=Rounds(base=16, perturbed=0, rounds=0))
    adapters = Adapters(AdapterSettings(), Statistics(torch.zeros(4), torch.ones(4)), "0" * 64)
    data = Stage2Dataset(adapters, settings)
    rng = np.random.default_rng(0)
    for spec in plan(settings, ["drawer-open", "reach"], 0):
        frames = rng.integers(0, 255, (CHUNKS, 128, 128, 3)).astype(np.uint8)
        states = rng.standard_normal((CHUNKS, 4)).astype(np.float32)
        base = rng.uniform(-1, 1, (CHUNKS, M, 4)).astype(np.float32)
        trajectory = Trajectory(
            task=spec.task,
            split="posttrain",
            index=spec.index,
            version=0,
            frames=frames,
            states=states,
            base=base,
            executed=base,
            prompts=("do it",) * CHUNKS,
            instruction="do it",
            key=spec.key,
        )
        visual = torch.randn(CHUNKS, 16, 8, 16)
        data.add(spec, trajectory, Targets(torch.randn(CHUNKS, D), torch.ones(CHUNKS, dtype=torch.bool), visual))
    return Learner(adapters, settings, 0, device=device), data


def rate(vision: str, steps: int, device: Device = "cpu") -> float:
    """Updates a second after two to warm up."""
    learner, data = make_data(vision, device)
    learner.train_round(data, 2)
    started = time.perf_counter()
    learner.train_round(data, steps)
    return steps / (time.perf_counter() - started)


def run() -> list[dict[str, object]]:
    """Rows for `python -m bench`."""
    torch.set_num_threads(1)
    latent, pixels = rate("latent", STEPS), rate("pixels", 2)
    rows: list[dict[str, object]] = [
        {"name": "Stage 2, latent vision", "value": latent, "unit": "updates/s", "ratio": f"{latent / pixels:.1f}x pixels"},
        {"name": "Stage 2, pixel vision (paper)", "value": pixels, "unit": "updates/s", "ratio": ""},
    ]
    if torch.cuda.is_available():
        for vision, one_core in (("latent", latent), ("pixels", pixels)):
            found = rate(vision, STEPS, "cuda")
            ratio = f"{found / one_core:.1f}x one core"
            rows.append({"name": f"Stage 2, {vision}, GPU", "value": found, "unit": "updates/s", "ratio": ratio})
    return rows
