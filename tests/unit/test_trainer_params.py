"""What jobs accept, how the preset is overridden, noise, skills, the time line."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.artifacts import ArtifactStore
from services.trainer import jobs, timeline
from services.trainer.episode import Perturbation, closed_loop, closed_loop_starts
from services.trainer.params import EvaluateParams, PosttrainParams, parse
from services.trainer.posttrain import stage2_settings
from services.trainer.rollouts import planned_skills
from services.trainer.settings import TrainerSettings
from services.trainer.stage1 import inside
from world2act.presets import STAGE2
from world2act.schedule import perturbation, plan


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("posttrain", {"tasks": []}, "tasks: "),
        ("posttrain", {"tasks": ["reach", "reach"]}, "listed twice"),
        ("posttrain", {"tasks": ["../etc"]}, "no task's name"),
        ("posttrain", {"tasks": ["reach"], "split": "evaluation"}, "split: "),
        ("posttrain", {"tasks": ["reach"], "mode": "async", "eta": 0}, "eta"),
        ("posttrain", {"tasks": ["reach"], "mode": "serial", "eta": 1}, "eta"),
        ("posttrain", {"tasks": ["reach"], "mode": "fast"}, "mode: "),
        ("posttrain", {"tasks": ["reach"], "namespace": "a/b"}, "namespace: "),
        ("posttrain", {"tasks": ["reach"], "step": 3}, "step: "),
        ("posttrain", {"tasks": ["reach"], "settings": {"bond": 1.0}}, "settings: bond: no such setting"),
        ("posttrain", {"tasks": ["reach"], "settings": {"bound": "wide"}}, "settings: bound: must be float"),
        ("posttrain", {"tasks": ["reach"], "settings": {"closed_loop_every": 17}}, "closed_loop_every: must be in [1, 16]"),
        ("posttrain", {"tasks": ["reach"], "settings": {"alignment": "monotone"}}, "monotone is for target open-loop"),
        ("evaluate", {"tasks": ["reach"], "split": "posttrain"}, "split: "),
        ("evaluate", {"tasks": ["reach"], "first_index": 999_999}, "first_index"),
        ("evaluate", {"tasks": ["reach"], "versions": [["a", -2]]}, "versions.0.version: "),
        ("rollout", {"task": "reach", "indices": [1_000_000]}, "indices.0: "),
        ("rollout", {"task": "reach", "indices": [], "mode": "execute"}, "indices: "),
        ("imagine", {"task": "reach", "instruction": ""}, "instruction: "),
        ("imagine", {"task": "reach", "instruction": "go", "skills": [{"prompt": "go", "chunks": 1}]}, "one of them"),
        ("imagine", {"task": "reach", "skills": [{"prompt": "go", "chunks": 99}]}, "skills.0.chunks: "),
        ("stage1", {"steps": 0}, "steps: "),
    ],
)
def test_wrong_params_are_named(kind: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        parse(kind, params)


def test_modes_and_their_bounds() -> None:
    def bound(**changes: Any) -> int:
        return PosttrainParams.model_validate({"tasks": ["reach"], **changes}).staleness_bound()

    assert bound() == 1 and bound(mode="async", eta=3) == 3
    assert bound(mode="sync") == bound(mode="synchronous") == bound(mode="serial") == 0


def test_overrides_change_the_plan_and_nothing_else() -> None:
    params = PosttrainParams(tasks=["reach", "push"], episodes=7, rounds=1, steps=9)
    settings = stage2_settings(params)
    assert settings.plan.base + settings.plan.perturbed == 7 == settings.plan.on_policy
    assert settings.plan.base >= 1 and (settings.plan.first_steps, settings.plan.steps) == (9, 9)
    assert len(plan(settings, params.tasks, 0)) == 2 * 2 * 7
    named = PosttrainParams(tasks=["reach"], rounds=1, settings={"plan.rounds": 4, "contrastive.form": "single", "bound": 1})
    found = stage2_settings(named)
    assert (found.plan.rounds, found.contrastive.form, found.bound) == (4, "single", 1.0)
    assert stage2_settings(PosttrainParams(tasks=["reach"])) == STAGE2["default"]
    assert stage2_settings(PosttrainParams(tasks=["reach"], preset="paper")) == STAGE2["paper"]


def test_policies_to_compare() -> None:
    assert [p.version for p in EvaluateParams(tasks=["reach"], namespace="n").policies()] == [0, -1]
    given_ = EvaluateParams.model_validate({"tasks": ["reach"], "versions": [["a", 0], {"namespace": "b", "version": 2}]})
    assert [(p.namespace, p.version) for p in given_.policies()] == [("a", 0), ("b", 2)]


def test_noise_equals_the_library_s() -> None:
    """One process or many: an episode of the plan is perturbed the same."""
    std = np.array([0.3, 0.4, 0.5, 0.9], np.float32)
    spec = next(s for s in plan(STAGE2["default"], ["reach"], 3) if s.noise > 0)
    expected = perturbation(spec, 5, std)
    noise = Perturbation(int(spec.key, 16), spec.noise, std)
    wide = np.full(4, 9, np.float32)
    mine = np.stack([noise(np.zeros((4, 4), np.float32), -wide, wide) for _ in range(5)])
    assert np.array_equal(mine, np.repeat(expected[:, None], 4, axis=1)) and np.abs(expected[:, :3]).max() > 0


def test_closed_loop_requests_have_content_keys() -> None:
    one = closed_loop("a", "sha256-1", ["p", "q"], 1)
    assert one.id == closed_loop("b", "sha256-1", ["p", "q"], 1).id and one.latents
    assert len({one.id, closed_loop("a", "sha256-1", ["q", "p"], 1).id, closed_loop("a", "sha256-2", ["p", "q"], 1).id}) == 3


def test_clips_of_several_chunks_start_at_every_so_manieth_frame(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(2, axis=1)
    assert closed_loop_starts(store, "sha256-1", list(frames), "abcde", 1) == ("sha256-1", ["a", "b", "c", "d", "e"])
    starts, prompts = closed_loop_starts(store, "sha256-1", list(frames), "abcde", 2)
    assert prompts == ["a", "c", "e"] and store.get_tensors(starts)["frames"][:, 0, 0, 0].tolist() == [0, 2, 4]
    request = closed_loop("a", starts, prompts, 2)
    assert [row[0].chunks for row in request.skills] == [2, 2, 2] and not request.latents


def test_planned_skills_share_the_episode() -> None:
    row = planned_skills("pick up the puck and place it at the green goal", "pick-place", 13)
    assert [s["chunks"] for s in row] == [7, 6] and row[0]["prompt"].startswith("pick")


def test_stage1_reads_only_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / "data" / "demos").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    assert inside(tmp_path / "data", "demos").name == "demos"
    for wrong in ("../secret", str(tmp_path / "secret"), "link", "demos/../../secret"):
        with pytest.raises(ValueError, match="outside the data folder"):
            inside(tmp_path / "data", wrong)
    with pytest.raises(ValueError, match="no folder"):
        inside(tmp_path / "data", "none")


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=8))
def test_active_seconds_are_those_in_which_something_ran(spans: list[tuple[int, int]]) -> None:
    intervals = [(float(a), float(a + length)) for a, length in spans]
    covered = {second for a, length in spans for second in range(a, a + length)}
    assert timeline.active(intervals) == len(covered)
    assert timeline.busy(intervals) == sum(length for _, length in spans)


def test_overlap_of_parts() -> None:
    found = timeline.summary({"execution": [(0, 4), (0, 4)], "optimisation": [(2, 6)]}, 6.0)
    assert found["overlap"] == round(8 / 6, 3) and found["worker_seconds"] == {"execution": 8, "optimisation": 4}
    assert found["seconds"] == {"execution": 4, "optimisation": 4, "wall": 6.0}


def test_the_rollout_coordinator_needs_no_torch() -> None:
    code = "import services.trainer.rollout, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_gpu_that_is_not_there_stops_the_trainer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device: cuda was asked for"):
        jobs.serve(TrainerSettings(trainer_device="cuda"), threading.Event())


def test_a_signing_key_that_is_none_is_named(tmp_path: Path) -> None:
    assert TrainerSettings().signer() is None
    with pytest.raises(ValueError, match=r"trainer_signing_key_file: cannot read .*none.pem: No such file"):
        TrainerSettings(trainer_signing_key_file=tmp_path / "none.pem").signer()
    (tmp_path / "bad.pem").write_text("hunter2")
    with pytest.raises(ValueError, match="trainer_signing_key_file: holds no private key") as caught:
        TrainerSettings(trainer_signing_key_file=tmp_path / "bad.pem").signer()
    assert "hunter2" not in str(caught.value)
