"""Residual against LoRA (paper: 2.25x): Stage 2 updates a second and the trainer's peak memory, same base, same batch, one run.

Rates: in this process, per second of CPU time of one thread, in alternating rounds. LoRA's updates include their recipe's image
shift, and its network computes in half precision where the CPU can, the residual's never. Memory: each case in a process of its
own, the growth of its peak resident size over what imports and recorded data need: weights (for LoRA the base's too, which the
residual's trainer never loads), gradients, optimiser, activations. Data: 2 tasks x 12 random episodes of 12 chunks, the default's
batch. The tiny base is smaller than any VLA, so the same is measured on wider ones (all widths times 2 and 4, random weights).
Executing and imagining, which both need before they train, are not counted.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from bench.learner import make_data
from experiments.methods.lora import LoraLearner
from world2act.models.tiny_policy import TinyPolicy, TinyPolicyConfig
from world2act.stage2 import Batch, Learner

FACTORS = (1, 2, 4)
CASES = ("residual", "residual, pixels (paper)", "LoRA r16", "LoRA r32")
ROUNDS, SECONDS = 2, 1.0
"""Rounds of every case, and how long one lasts; at least one update."""
STEPS = 1000
"""Length of the round that the optimiser believes in: only its rate depends on it."""
RETURNED = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Freed arrays go back to the system at once, so that the resident size is what is in use; slower, so not where time counts."""

Case = tuple[str, int]


def make_batch(case: str) -> tuple[Learner, Batch]:
    """The residual's learner and a batch of what the case looks at: latents or frames."""
    learner, data = make_data("latent" if case == "residual" else "pixels")
    return learner, data.draw(torch.Generator().manual_seed(0))


def make_learner(case: str, factor: int, like: Learner) -> Learner:
    """A fresh learner of the case; factor: how many times as wide as the tiny base its base is."""
    if case.startswith("residual"):
        return Learner(like.adapters, like.settings, 0)
    plain = TinyPolicyConfig()
    a, b, c = (factor * width for width in plain.channels)
    wide = dataclasses.replace(plain, channels=(a, b, c), hidden=factor * plain.hidden)
    return LoraLearner(TinyPolicy(wide).eval(), like.adapters, like.settings, 0, int(case.removeprefix("LoRA r")))


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM the peak (Linux)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def memory(case: str, factor: int) -> float:
    """MiB at the peak of two updates, in a fresh process."""
    torch.set_num_threads(1)
    like, batch = make_batch(case)
    make_learner(case, 1, like).step(batch, STEPS)  # libraries load and allocate on first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = resident("VmRSS")
    learner = make_learner(case, factor, like)
    for _ in range(2):
        learner.step(batch, STEPS)
    return resident("VmHWM") - before


def rates(cases: list[Case]) -> tuple[dict[Case, float], dict[Case, int]]:
    """Updates a second and numbers of trained parameters."""
    learners: dict[Case, tuple[Learner, Batch]] = {}
    for case, factor in cases:
        like, batch = make_batch(case)
        learners[case, factor] = make_learner(case, factor, like), batch
    steps, seconds = dict.fromkeys(cases, 0), dict.fromkeys(cases, 0.0)
    for number in range(1 + ROUNDS):
        for key, (learner, batch) in learners.items():
            started, done = time.process_time(), 0
            while done == 0 or (number > 0 and time.process_time() - started < SECONDS):
                learner.step(batch, STEPS)
                done += 1
            if number > 0:  # round 0 warms up
                steps[key] += done
                seconds[key] += time.process_time() - started
    trained = {
        key: sum(p.numel() for p in learner.policy.parameters() if p.requires_grad) for key, (learner, _) in learners.items()
    }
    return {key: steps[key] / seconds[key] for key in cases}, trained


def run() -> list[dict[str, object]]:
    """Rows for `python -m bench`; one to two minutes if idle. The residual does not see the base, so it is measured once."""
    cases = [(case, factor) for factor in FACTORS for case in CASES if factor == 1 or case.startswith("LoRA")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    speed, trained = rates(cases)
    torch.set_num_threads(threads)
    size: dict[Case, float] = {}
    with mock.patch.dict(os.environ, RETURNED):
        for case, factor in cases:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                size[case, factor] = pool.submit(memory, case, factor).result()
    ours: Case = ("residual", 1)
    rows: list[dict[str, object]] = []
    for key in cases:
        case, factor = key
        label = f"{case} ({trained[key] / 1e3:.0f}k trained)" + (f", base {factor}x wide" if case.startswith("LoRA") else "")
        faster = "" if key == ours else f"residual {speed[ours] / speed[key]:.2f}x as fast"
        smaller = "" if key == ours else f"{size[key] / size[ours]:.2f}x the residual's"
        rows.append({"name": f"{label}: training", "value": speed[key], "unit": "updates/CPU s", "ratio": faster})
        rows.append({"name": f"{label}: peak memory", "value": size[key], "unit": "MiB", "ratio": smaller})
    return rows
