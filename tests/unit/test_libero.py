"""What is LIBERO's own: shipped initial states by index, soft resets, tasks without an expert. The rest is in conformance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from services.simulator.envs import base, libero_files
from world2act.splits import Split, scene_seed

BOWL = "libero_spatial-pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"


@pytest.fixture(scope="module")
def env() -> Iterator[base.Environment]:
    if reason := libero_files.missing():
        pytest.skip(f"libero: {reason}")
    environment = base.make("libero")
    yield environment
    environment.close()


def joints_and_bowl(env: base.Environment) -> tuple[np.ndarray, np.ndarray]:
    """The arm's seven joints and the bowl's position."""
    data = env._scenes[BOWL].data  # type: ignore[attr-defined]
    return data.qpos[:7].copy(), data.body("akita_black_bowl_1_main").xpos.copy()


def test_the_first_evaluation_scenes_are_the_shipped_ones(env: base.Environment) -> None:
    shipped = libero_files.initial_states(BOWL)
    for index in (0, 49):
        env.reset(BOWL, scene_seed(Split.EVALUATION, index))
        joints, _ = joints_and_bowl(env)
        distances = np.abs(shipped[:, 1:8] - joints).max(axis=1)
        assert distances.argmin() == index and distances[index] < 0.02, "the arm sags a little while the scene rests"
    for split, index in ((Split.EVALUATION, 50), (Split.TUNING, 0), (Split.WORLDMODEL, 0)):
        env.reset(BOWL, scene_seed(split, index))
        joints, _ = joints_and_bowl(env)
        assert np.abs(shipped[:, 1:8] - joints).max(axis=1).min() > 0.004, "a shipped state outside its split"


def test_soft_resets_put_things_on_their_fixtures(env: base.Environment) -> None:
    """Upstream's second reset counts a fixture's position twice; and nothing of NumPy's global generator changes."""
    kept = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    for index in range(4):
        env.reset(BOWL, scene_seed(Split.TUNING, index))
        _, bowl = joints_and_bowl(env)
        burner = env._scenes[BOWL].data.site("flat_stove_1_cook_region").xpos  # type: ignore[attr-defined]
        assert np.linalg.norm(bowl[:2] - burner[:2]) < 0.08 and 0 < bowl[2] - burner[2] < 0.08
    assert (np.random.get_state()[1] == kept).all()


def test_a_task_without_expert_says_so(env: base.Environment) -> None:
    task = "libero_goal-open_the_middle_drawer_of_the_cabinet"
    env.reset(task, 0)
    with pytest.raises(base.InvalidInputError, match=f"task: {task} has no scripted expert"):
        env.expert_action()


@pytest.mark.parametrize(
    "task", ["libero_object-pick_up_the_milk_and_place_it_in_the_basket", "libero_goal-push_the_plate_to_the_front_of_the_stove"]
)
def test_an_expert_that_let_go_too_early_plans_anew(env: base.Environment, task: str) -> None:
    """A disturbed hand may open anywhere: the retreat then ends without success."""
    env.reset(task, scene_seed(Split.TUNING, 0))
    env.expert_action()
    memory = env._expert.memory  # type: ignore[attr-defined]
    memory.stage, memory.ticks = "retreat", 1000
    assert np.isfinite(env.expert_action()).all() and memory.stage == "plan"
    env.expert_action()
    assert memory.stage == "hover" and len(memory.tried) == 2


def test_patterns_of_tasks(env: base.Environment) -> None:
    assert len(base.matching_tasks(env.spec, ["libero_object-*"])) == 10
    assert base.matching_tasks(env.spec, [BOWL, "libero_spatial-*stove*"]) == [BOWL]
    with pytest.raises(base.InvalidInputError, match="task: 'libero_90-\\*' is unknown"):
        base.matching_tasks(env.spec, ["libero_90-*"])
