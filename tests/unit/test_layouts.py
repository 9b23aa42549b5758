"""The tables between our robots and other policies: forms there and back, pictures, presets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from openpi_client import image_tools

from services.vla.policies import layouts
from world2act.data import robocasa

PRESETS = json.loads(layouts.PRESETS.read_text())
ALL = [(policy, robot) for policy, known in PRESETS["policies"].items() for robot in known]


@pytest.mark.parametrize(("policy", "robot"), ALL)
def test_every_preset_there_and_back(policy: str, robot: str) -> None:
    layout = layouts.load(robot, policy)
    rng = np.random.default_rng(0)
    side = 32
    ramp = np.linspace(0, 255, side)
    view = np.stack([np.tile(ramp, (side, 1)), np.tile(ramp, (side, 1)).T, np.full((side, side), 50.0)], axis=-1).astype(np.uint8)
    images = layout.images(np.tile(view, (2, 2, 1)))
    assert {name: image.shape[:2] for name, image in images.items()} == {
        name: (camera.height, camera.width) for name, camera in layout.policy.cameras.items()
    }
    back = layout.our_images(images, side, side)
    for camera, image in back.items():
        error = np.abs(image.astype(int) - view)
        assert error.max() <= 8, camera  # neither mirrored nor upside down
    state = rng.uniform(0.01, 0.5, layout.robot.state).astype(np.float32)
    if robot == "libero":
        state[3:6] = [2.5, -1.5, 1.0]  # more than half a turn: published policies are fed with angles up to a whole one
    if robot == "robocasa":
        for start in (3, 10):
            state[start : start + 4] /= np.linalg.norm(state[start : start + 4])
        state[15] = -state[14]
    if (policy, robot) != ("cosmos_policy", "robocasa"):
        layout.check_reversible()
        assert np.allclose(layout.our_state(layout.states(state)), state, atol=1e-5)
    actions = rng.uniform(-1, 1, (5, layout.size)).astype(np.float32)
    moved = sorted({i for parts in layout.policy.actions.values() for p in parts for i in range(p.start, p.start + p.size)})
    signs = {p.start for parts in layout.policy.actions.values() for p in parts if p.form != "as_is"}
    again = layout.our_actions(layout.their_actions(actions))
    for i in range(layout.size):
        if i in signs:
            assert np.array_equal(again[:, i], np.sign(actions[:, i]))
        elif i in moved:
            assert np.allclose(again[:, i], actions[:, i], atol=1e-6)
        else:
            assert (again[:, i] == layout.robot.rest[i]).all()


def test_robocasa_is_the_datas_robocasa() -> None:
    """One truth about columns: world2act/data/robocasa.py and the tables agree."""
    robot = layouts.load("robocasa", "gr00t").robot
    assert list(robot.cameras) == list(robocasa.CAMERAS)
    assert robot.state == sum(size for _, size in robocasa.STATE.values()) and len(robot.low) == robocasa.ACTION_SIZE
    starts, at = {}, 0
    for name, (_, size) in robocasa.STATE.items():
        starts[name], at = (at, size), at + size
    table = layouts.load("robocasa", "gr00t").policy
    assert {name: (parts[0].start, parts[0].size) for name, parts in table.state.items()} == starts
    starts, at = {}, 0
    for name, size in robocasa.ACTION.items():
        starts[name], at = (at, size), at + size
    assert {name: (parts[0].start, parts[0].size) for name, parts in table.actions.items()} == starts


def test_pictures_are_fitted_as_openpi_fits_them() -> None:
    """Their own resize_with_pad: the same picture, whatever the shape."""
    rng = np.random.default_rng(0)
    for height, width in ((64, 64), (48, 64), (128, 100)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        theirs = image_tools.resize_with_pad(image, 224, 224).astype(int)
        ours = layouts.fit(image, 224, 224).astype(int)
        assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 1.0, (height, width)


def test_a_gripper_that_points_down_keeps_its_angle() -> None:
    """Angles of robosuite's quat2axisangle lie in [0, 2 pi]; a quaternion (x, y, z, w) with w < 0 is one above pi."""
    vector = np.array([3.5, 0.2, 0.0], np.float32)
    assert layouts.quaternion(vector)[3] < 0 and np.allclose(layouts.axis_angle(layouts.quaternion(vector)), vector, atol=1e-5)
    assert np.array_equal(layouts.axis_angle(layouts.quaternion(np.zeros(3, np.float32))), np.zeros(3))


def test_what_a_client_sends_is_named_when_it_does_not_fit() -> None:
    layout = layouts.load("libero", "openpi")
    image = np.zeros((224, 224, 3), np.uint8)
    with pytest.raises(ValueError, match="camera 'observation/wrist_image' is missing; needed are"):
        layout.our_images({"observation/image": image}, 64, 64)
    for bad in (
        image.astype(np.float32),
        image[0],
        np.zeros((3, 224, 224), np.uint8),
        "picture",
        np.zeros((4, 9000, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="camera 'observation/image': must"):
            layout.our_images({"observation/image": bad, "observation/wrist_image": image}, 64, 64)  # type: ignore[dict-item]
    for bad in (np.zeros(7), np.zeros((1, 8)), np.array(["a"] * 8), [0.0] * 8):
        with pytest.raises(ValueError, match="state 'observation/state': must be 8 numbers"):
            layout.our_state({"observation/state": bad})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="state 'observation/state' is missing"):
        layout.our_state({})
    with pytest.raises(ValueError, match=r"clients would say nothing of cameras \[\] and state columns"):
        layouts.load("robocasa", "cosmos_policy").check_reversible()
