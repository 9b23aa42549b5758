"""Meta-World's scenes: what is left out of a step changes nothing that anybody reads."""

from __future__ import annotations

import numpy as np
import pytest

from services.simulator.envs import metaworld
from world2act.splits import Split, scene_seed
from world2act.types import FloatArray

UNREAD = slice(7, 11), slice(25, 29)  # of Meta-World's observation: the object's orientation, now and a step ago


@pytest.mark.parametrize("task", [task.name for task in metaworld.TASKS])
def test_what_a_step_leaves_out_changes_nothing_that_is_read(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lean = played(task)
    monkeypatch.setattr(metaworld, "leave_out_unread", lambda env: None)
    full = played(task)
    assert any(success for *_, success in full)
    for ours, theirs in zip(lean, full, strict=True):
        for part, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(part, other)


def played(task: str) -> list[tuple[FloatArray, FloatArray, FloatArray, bool]]:
    """The expert's episode, disturbed a little: actions, states, the rest of Meta-World's observation, success, by chunk."""
    env, rng = metaworld.MetaworldEnvironment(), np.random.default_rng(0)
    env.reset(task, scene_seed(Split.TUNING, 0))
    played = []
    for _ in range(env.spec.task(task).max_chunks):
        actions, _ = env.expert_preview(frames=False)
        result = env.step(np.clip(actions + rng.normal(0.0, 0.1, actions.shape), -1, 1).astype(np.float32), "none")
        seen = env._raw.copy()
        for part in UNREAD:
            seen[part] = 0.0
        played.append((actions, result.states, seen, result.success))
    env.close()
    return played
