"""RoboCasa's adapters on stand-ins (tests/stand_ins): orders, switches, scenes, words, and the errors where it is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.arena import Arena
from services.simulator import collect
from services.simulator.envs import base, robocasa
from tests.stand_ins import packages
from world2act.data import robocasa as data
from world2act.data.grid import stitch
from world2act.schedule import EpisodeSpec
from world2act.segmentation import load_schemas
from world2act.splits import Split, scene_seed

TASKS = {"robocasa": "PnPCounterToCab", "robocasa365": "PickPlaceCounterToCabinet"}
TUNING, EVALUATION = scene_seed(Split.TUNING, 0), scene_seed(Split.EVALUATION, 0)


@pytest.fixture(params=sorted(TASKS))
def env(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[robocasa.KitchenEnvironment]:
    monkeypatch.setenv("W2A_ROBOCASA_IMAGE_SIZE", "32")
    with packages.installed(request.param):
        environment = base.make(request.param)
        assert isinstance(environment, robocasa.KitchenEnvironment)
        yield environment
        environment.close()


def kitchen(env: robocasa.KitchenEnvironment):
    """The stand-in's innards: its model, its scene and every action that it executed."""
    return env._kitchen.unwrapped.env if env.simulator == "robocasa365" else env._kitchen


def test_the_tasks_are_those_that_the_schemas_know() -> None:
    known = {suite.name: set(suite.instructions) for suite in load_schemas().suites}
    assert set(robocasa.LIMITS) == known["robocasa"] and len(robocasa.LIMITS) == 24
    assert set(robocasa.LIMITS_365) == known["robocasa365"]
    assert all(limit % 4 == 0 for limit in (*robocasa.LIMITS.values(), *robocasa.LIMITS_365.values()))


def test_both_orders_of_an_action() -> None:
    """365's LeRobot files: base 0:4, mode 4, position 5:8, rotation 8:11, gripper 11. v0.x: position first, mode last."""
    v0 = np.arange(12, dtype=np.float32)
    assert data.to_365(v0).tolist() == [7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6]
    assert data.from_365(v0).tolist() == [5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4]
    chunks = np.random.default_rng(0).normal(size=(3, 4, 12)).astype(np.float32)
    assert (data.from_365(data.to_365(chunks)) == chunks).all() and (data.to_365(data.from_365(chunks)) == chunks).all()


def test_actions_arrive_in_the_simulators_order(env: robocasa.KitchenEnvironment) -> None:
    """What v0.x reads by sign, 365 reads against 0.5: a weak "close" closes in both."""
    env.reset(TASKS[env.simulator], TUNING)
    actions = np.linspace(-0.9, 0.9, 48, dtype=np.float32).reshape(4, 12)
    actions[:, 6], actions[:, 11] = (0.1, -0.1, 0.4, -1.0), (-1.0, 0.2, -0.3, 1.0)
    env.step(actions, "none")
    executed = np.stack(kitchen(env).rows)
    assert np.allclose(np.delete(executed, [6, 11], axis=1), np.delete(actions, [6, 11], axis=1))
    assert (np.sign(executed[:, [6, 11]]) == np.sign(actions[:, [6, 11]])).all()


def test_an_observation_is_that_after_the_action(env: robocasa.KitchenEnvironment) -> None:
    """robosuite's own is almost an action old (the stand-in serves it so, too)."""
    env.reset(TASKS[env.simulator], TUNING)
    actions = np.zeros((4, 12), np.float32)
    actions[:, 2], actions[:, 6] = -1.0, 1.0
    result = env.step(actions, "last")
    inner = kitchen(env)
    now = inner._get_observations(force_update=True)
    assert np.allclose(result.states[-1, 7:10], now["robot0_base_to_eef_pos"], atol=1e-6)
    assert abs(result.states[-1, 16] - np.abs(now["robot0_gripper_qpos"]).sum()) < 1e-6
    assert (np.diff(result.states[:, 9]) < 0).all() and (np.diff(result.states[:, 16]) < 0).all()
    upright = inner.sim.render(32, 32, camera_name="robot0_agentview_left")[::-1]
    assert (result.images["left"][0] == upright).all()


def test_states_are_those_of_the_data_sets_and_a_width(env: robocasa.KitchenEnvironment) -> None:
    observation = env.reset(TASKS[env.simulator], TUNING)
    names = [axis.name for axis in env.spec.state]
    assert len(names) == 17 and names[14:] == ["gripper_qpos_left", "gripper_qpos_right", "gripper_width"]
    parts = [name for name, (_, size) in data.STATE.items() for _ in range(size)]
    assert all(name.startswith(part) for name, part in zip(names, parts, strict=False))
    assert observation.state[16] == pytest.approx(observation.state[14] - observation.state[15])


def test_the_papers_grid(env: robocasa.KitchenEnvironment) -> None:
    """Left and right on top, wrist below, bottom right black (supplement E); LIBERO's two cameras leave the bottom black."""
    observation = env.reset(TASKS[env.simulator], TUNING)
    grid = stitch(observation.images, {camera.name: camera.cell for camera in env.spec.cameras})
    corners = {"left": grid[:32, :32], "right": grid[:32, 32:], "wrist": grid[32:, :32]}
    assert all((corners[name] == image).all() for name, image in observation.images.items())
    assert not grid[32:, 32:].any()


def test_splits_have_other_kitchens_and_objects(env: robocasa.KitchenEnvironment) -> None:
    task = TASKS[env.simulator]
    evaluated, trained = set(), set()
    for index in range(6):
        env.reset(task, EVALUATION + index)
        evaluated.add(kitchen(env).scene)
    objects = kitchen(env).obj_instance_split
    for index in range(6):
        env.reset(task, TUNING + index)
        trained.add(kitchen(env).scene)
    assert not evaluated & trained and len(evaluated) > 1 and len(trained) > 3
    assert (objects, kitchen(env).obj_instance_split) == {"robocasa": ("B", "A"), "robocasa365": ("target", "pretrain")}[
        env.simulator
    ]
    if env.simulator == "robocasa":
        assert evaluated <= set(robocasa.EVALUATION_KITCHENS) and len(robocasa.TRAINING_KITCHENS) == 115


def test_words_differ_from_scene_to_scene_and_success_is_the_simulators(env: robocasa.KitchenEnvironment) -> None:
    task = TASKS[env.simulator]
    told = {env.reset(task, TUNING + index).instruction for index in range(8)}
    assert len(told) > 1 and all(words.endswith("block from the counter and place it in the cabinet") for words in told)
    success = False
    for _ in range(40):
        thing, hand = (kitchen(env).data.body(name).xpos[:2] for name in ("thing", "hand"))
        actions = np.zeros((4, 12), np.float32)
        actions[:, :2] = np.clip((thing - hand) * 5, -1, 1)
        success = env.step(actions, "none").success
        if success:
            break
    assert success


def test_every_scene_is_told_in_its_own_words(env: robocasa.KitchenEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    task, told = TASKS[env.simulator], []

    class Standing:
        version = 0

        def act(self, frames: Tensor, states: Tensor, instructions: list[str], prompts: list[str]) -> tuple[Tensor, Tensor]:
            told.extend(instructions)
            return torch.zeros(1, 4, 12), torch.zeros(1, 4, 12)

    monkeypatch.setitem(robocasa.LIMITS if env.simulator == "robocasa" else robocasa.LIMITS_365, task, 4)
    arena = Arena(np.ones(12, np.float32), env.simulator)
    runs = arena.run([EpisodeSpec(0, task, i, 0.0, str(i)) for i in range(4)], Standing(), Split.TUNING)
    arena.close()
    assert [run.trajectory.instruction for run in runs] == told == [env.reset(task, TUNING + i).instruction for i in range(4)]
    assert len(set(told)) > 1
    monkeypatch.setattr(env, "expert_action", lambda: np.zeros(12, np.float32))
    assert collect.record(env, task, Split.TUNING, 1).instruction == told[1]


def test_numpys_generator_is_left_as_it_was(env: robocasa.KitchenEnvironment) -> None:
    np.random.seed(1)
    expected = np.random.random()
    np.random.seed(1)
    env.reset(TASKS[env.simulator], TUNING)
    assert np.random.random() == expected


@pytest.mark.parametrize("simulator", sorted(TASKS))
def test_without_robocasa_the_error_says_what_to_do(simulator: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = base.make(simulator)
    version = {"robocasa": "0.1 or 0.2", "robocasa365": "1"}[simulator]
    with pytest.raises(base.InvalidInputError, match=f"simulator: {simulator} needs RoboCasa {version}, which is not installed"):
        environment.describe()
    (tmp_path / "robocasa/models/assets/textures").mkdir(parents=True)
    init = tmp_path / "robocasa/__init__.py"
    init.write_text('__version__ = "0.9"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(base.InvalidInputError, match=r"textures, fixtures, objects/objaverse are missing in .*5 GB"):
            environment.describe()
        for folder in robocasa.ASSETS:
            (tmp_path / "robocasa/models/assets" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / "robocasa/models/assets" / folder / "a.xml").touch()
        task = environment.spec.tasks[0].name
        with pytest.raises(base.InvalidInputError, match=f"{simulator} needs RoboCasa {version}, 0.9 is installed"):
            environment.reset(task, 0)
        sys.modules.pop("robocasa")
        init.write_text('assert False, "MuJoCo version must be 3.1.1"\n')
        with pytest.raises(base.InvalidInputError, match="RoboCasa does not import: MuJoCo version"):
            environment.reset(task, 0)
    finally:
        sys.modules.pop("robocasa", None)
