"""Baseline (b) as a command: which labels it clones, and what it compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import more_cloning
from experiments.policies import Frozen
from tests.unit.test_robomimic import ENV_ARGS
from world2act.data.robomimic import EpisodeWriter
from world2act.evaluation import Outcome
from world2act.models.tiny_policy import TinyPolicy, TinyPolicyConfig
from world2act.splits import Split
from world2act.types import Episode


def write(root: Path, split: Split, task: str, count: int) -> None:
    with EpisodeWriter(root / split.value / f"{task}.hdf5", split=split, env_args=ENV_ARGS | {"env_name": task}) as writer:
        for index in range(count):
            images = {name: np.zeros((9, 64, 64, 3), np.uint8) for name in ENV_ARGS["cameras"]}
            states, widths = np.zeros((9, 4), np.float32), np.full(9, 0.08, np.float32)
            writer.write(Episode(task, split, index, task, images, states, widths, np.zeros((8, 4), np.float32), True))


def test_every_label_that_stage_1_has_seen_and_the_bases_own_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("lift-a", "lift-b", "other"):
        write(tmp_path / "demos", Split.BASE, task, 6)
        write(tmp_path / "demos", Split.WORLDMODEL, task, 3)
    base = TinyPolicy(TinyPolicyConfig())
    base.save(tmp_path / "base.safetensors", {})
    cloned = TinyPolicy(TinyPolicyConfig())
    seen: list[Episode] = []

    class Simulated:
        def __init__(self, spread: Any, simulator: str) -> None:
            assert simulator == "elsewhere"

        def evaluate(self, policy: Frozen, split: Split, tasks: Sequence[str], indices: Sequence[int]) -> list[Outcome]:
            return [Outcome(t, split.value, i, policy.base is cloned and i > 0) for i in indices for t in tasks]

        def close(self) -> None: ...

    def clone(episodes: Sequence[Episode], seed: int, progress: Any) -> TinyPolicy:
        seen.extend(episodes)
        return cloned

    monkeypatch.setattr(more_cloning, "Arena", Simulated)
    monkeypatch.setattr(more_cloning, "clone", clone)
    words = ["x", "--demos", str(tmp_path / "demos"), "--zoo", str(tmp_path), "--simulator", "elsewhere", "--trials", "3"]
    monkeypatch.setattr(sys, "argv", [*words, "--tasks", "lift-*", "--out", str(tmp_path / "table.json")])
    assert more_cloning.main() == 0
    count = {(e.task, e.split): 0 for e in seen}
    for e in seen:
        count[e.task, e.split] += 1
    assert count == {(t, s): n for t in ("lift-a", "lift-b") for s, n in (("worldmodel", 3), ("base", 4))}
    assert "cloned from all 14 labels" in " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "table.json").read_text())
    assert (found["labels"], found["split"], found["rows"][-1]["gained"], found["rows"][-1]["lost"]) == (14, "evaluation", 4, 0)

    monkeypatch.setattr(sys, "argv", [*words, "--tasks", "push"])
    assert more_cloning.main() == 2 and "no demonstration file of split worldmodel" in capsys.readouterr().err
