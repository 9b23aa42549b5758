"""LIBERO (`hf-libero` 0.1.4 on robosuite 1.4.0, MuJoCo): a Panda arm over a table or floor, four suites of ten tasks.

Control: 20 actions a second, robosuite's OSC_POSE controller: three position deltas of up to 0.05 m, three rotation deltas of
up to 0.5 rad, and the gripper (+1 closes, -1 opens), all in [-1, 1]. Tasks are called `<suite>-<LIBERO's own task name>`.

Scenes (docs/decisions/013-libero-scenes.md): the first 50 scenes of split "evaluation" are LIBERO's 50 shipped initial states of
the task; every other scene is drawn from the regions of its BDDL file under the seed. Either way the scene first rests for
SETTLE actions, as published evaluations do. Robosuite draws from NumPy's global generator: it is seeded here and put back.

Images are upright and not mirrored. Published policies see LIBERO's raw images turned by half a turn; those are upside down, not
turned, so what such policies know is mirrored left to right: an adapter for them flips the columns.

LIBERO needs meshes that its package does not hold: see libero_files.py. Each task's simulator takes 2 s to build and about
0.3 GB; the MOST_SCENES last used are kept.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
from dataclasses import dataclass, field
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

from services.simulator.envs import libero_files as files
from services.simulator.envs.base import (
    Axis,
    Camera,
    Environment,
    EnvironmentSpec,
    Frames,
    InvalidInputError,
    Observation,
    scene_draw,
    seeded,
    stack_frames,
)
from services.simulator.envs.libero_expert import Expert
from services.simulator.envs.rendering import close_renderer, first_frames, open_renderer, touch_and_joints
from services.simulator.settings import SimulatorSettings
from world2act.splits import Split, split_of_seed
from world2act.types import FloatArray, ImageArray, M

OPEN_WIDTH = 0.0775  # metres between the fingers after reset, always; held open, they creep on to 0.080
SETTLE = 10  # actions before an episode, as in published evaluations: objects are placed a little above what they stand on
REST = np.array([0, 0, 0, 0, 0, 0, -1.0])
MOST_SCENES = 3
PLACEMENT_ATTEMPTS = 20
VIEWS = {"primary": "agentview", "wrist": "robot0_eye_in_hand"}  # ours -> LIBERO's
COLLISION_GROUP = 0  # robosuite keeps collision shapes here and what is drawn in group 1
LEFT = ("gripper0_leftfinger", "gripper0_finger_joint1_tip")
RIGHT = ("gripper0_rightfinger", "gripper0_finger_joint2_tip")
STATE = (
    *(Axis(f"ee_pos_{axis}", "m", low, high) for axis, low, high in (("x", -0.8, 0.8), ("y", -0.8, 0.8), ("z", -0.1, 1.8))),
    *(Axis(f"ee_axis_angle_{axis}", "rad", -6.3, 6.3) for axis in "xyz"),
    Axis("gripper_width", "m", 0.0, 0.09),
)
ACTION = tuple(Axis(name, "normalised", -1.0, 1.0) for name in ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"))


@dataclass
class Scene:
    """One task's simulator and renderer, kept between episodes."""

    env: Any
    shipped: npt.NDArray[np.float64]
    renderer: mujoco.Renderer | None = None
    option: mujoco.MjvOption = field(default_factory=mujoco.MjvOption)

    @property
    def model(self) -> Any:
        return self.env.sim.model._model

    @property
    def data(self) -> Any:
        return self.env.sim.data._data


class LiberoEnvironment(Environment):
    """See the module's docstring."""

    def __init__(self) -> None:
        self._settings = SimulatorSettings()
        self._scenes: dict[str, Scene] = {}  # least recently used first
        self._task = ""
        self._success = False
        self._expert: Expert | None = None

    def describe(self) -> EnvironmentSpec:
        size = self._settings.libero_image_size
        return EnvironmentSpec(
            simulator="libero",
            cameras=(Camera("primary", size, size, 0), Camera("wrist", size, size, 1)),
            state=STATE,
            action=ACTION,
            chunk=M,
            control_hz=20.0,
            gripper_open_width=OPEN_WIDTH,
            gripper_width_index=6,
            tasks=files.tasks(),
        )

    def _reset(self, task: str, seed: int) -> Observation:
        self._task = ""
        scene = self._scene(task)
        split, index = split_of_seed(seed)
        with seeded(scene_draw(task, seed)):
            place(scene.env)
        if split is Split.EVALUATION and index < len(scene.shipped):
            scene.env.sim.set_state_from_flattened(scene.shipped[index])
            scene.env.sim.forward()
        robot = scene.env.robots[0]
        robot.gripper.current_action = np.zeros(robot.gripper.dof)
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        for _ in range(SETTLE):
            scene.env.step(REST)
        scene.env.timestep = 0
        self._task, self._success, self._expert = task, False, None
        return Observation(self._render(), self._state())

    def _step(self, actions: FloatArray, frames: Frames) -> tuple[dict[str, ImageArray], FloatArray, bool]:
        env = self._scenes[self._task].env
        states, shown = [], []
        for number, action in enumerate(actions):
            env.step(action.astype(np.float64))
            self._success |= bool(env._check_success())
            states.append(self._state())
            if frames == "all" or (frames == "last" and number == len(actions) - 1):
                shown.append(self._render())
        return stack_frames(shown, self.spec.cameras), np.stack(states), self._success

    def close(self) -> None:
        for scene in self._scenes.values():
            dispose(scene)
        self._scenes.clear()
        self._task, self._actions_left = "", None

    def truth(self) -> dict[str, float]:
        """See the base class."""
        scene = self._running()
        left, right = ({scene.model.body(name).id for name in names} for names in (LEFT, RIGHT))
        return touch_and_joints(scene.model, scene.data, left, right)

    def expert_action(self) -> FloatArray:
        """Our scripted expert (libero_expert.py) on privileged poses; float32 (7,). libero_10 has none: InvalidInputError."""
        scene = self._running()
        if self._expert is None:
            self._expert = Expert(scene.env, self._task)
        return self._expert.act()

    def expert_preview(self, frames: bool = True) -> tuple[FloatArray, dict[str, ImageArray]]:
        """See the base class. It plays on a copy of MuJoCo's data, then puts back the little that robosuite keeps itself."""
        scene = self._running()
        if self._expert is None:
            self._expert = Expert(scene.env, self._task)
        actions: list[FloatArray] = []
        shown: list[dict[str, ImageArray]] = []
        robot, memory = scene.env.robots[0], copy.deepcopy(self._expert.memory)
        kept = scene.env.sim.data._data
        scene.env.sim.data._data = copy.copy(kept)
        owners = (scene.env, robot, robot.gripper, robot.controller)
        values = [plain_values(owner) for owner in owners]
        for _ in range(M):
            actions.append(self._expert.act())
            scene.env.step(actions[-1].astype(np.float64))
            if frames:
                shown.append(self._render())
        scene.env.sim.data._data = kept
        for owner, value in zip(owners, values, strict=True):
            vars(owner).update(value)
        self._expert.memory = memory
        return np.stack(actions), stack_frames(shown, self.spec.cameras)

    def _running(self) -> Scene:
        if not self._task:
            raise InvalidInputError("task: no episode is running; reset first")
        return self._scenes[self._task]

    def _scene(self, task: str) -> Scene:
        """The task's simulator, built when it is not among those kept."""
        scene = self._scenes.pop(task, None) or build_scene(task)
        self._scenes[task] = scene
        while len(self._scenes) > MOST_SCENES:
            dispose(self._scenes.pop(next(iter(self._scenes))))
        return scene

    def _state(self) -> FloatArray:
        """End effector position, its rotation as axis times angle, and the fingers' distance, metres; float32 (7,).

        The first six are LIBERO's own (`robot0_eef_pos`, and `robot0_eef_quat` as published policies read it); the width is the
        difference of the two finger joints, `robot0_gripper_qpos`.
        """
        scene = self._scenes[self._task]
        robot = scene.env.robots[0]
        position = scene.data.site_xpos[robot.eef_site_id]
        quaternion = scene.data.body("robot0_right_hand").xquat
        fingers = scene.data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.array([*position, *axis_angle(quaternion), abs(fingers[0]) + abs(fingers[1])], np.float32)

    def _render(self) -> dict[str, ImageArray]:
        scene = self._scenes[self._task]

        def shoot(renderer: mujoco.Renderer) -> dict[str, ImageArray]:
            images = {}
            for camera, view in VIEWS.items():
                renderer.update_scene(scene.data, view, scene_option=scene.option)
                images[camera] = renderer.render().copy()
            return images

        if scene.renderer is not None:
            return shoot(scene.renderer)
        size, effects = self._settings.libero_image_size, self._settings.libero_effects
        scene.renderer, images = first_frames(lambda: open_renderer(scene.model, size, effects), shoot, self._task)
        return images


def place(env: Any) -> None:
    """Robosuite's soft reset: the arm to its start, objects and fixtures drawn from their regions. RuntimeError if none fit."""
    from robosuite.utils.errors import RandomizationError

    model = env.sim.model._model
    for _ in range(PLACEMENT_ATTEMPTS):
        # LIBERO places what stands on a fixture by where the fixture's sites are in its XML. After a first reset the fixture has
        # moved, and a second one would count its position twice: bowls meant for the stove start a metre above the table.
        for name, fixture in env.fixtures_dict.items():
            if name in env.obj_body_id:
                body = fixture.get_obj()
                model.body_pos[env.obj_body_id[name]] = np.fromstring(body.get("pos", "0 0 0"), sep=" ")
                model.body_quat[env.obj_body_id[name]] = np.fromstring(body.get("quat", "1 0 0 0"), sep=" ")
        try:
            env.reset()
            return
        except RandomizationError:
            continue
    raise RuntimeError(f"placement: objects found no place in {PLACEMENT_ATTEMPTS} attempts")


def build_scene(task: str) -> Scene:
    """LIBERO's simulator of `task`, without its own renderer and observables: what is observed is read from MuJoCo's data."""
    meshes = files.configure()
    with contextlib.redirect_stdout(io.StringIO()):  # they print what they do
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
        robosuite = importlib.import_module("robosuite")
        root = importlib.import_module("libero.libero")
        root._assets_path_cache = str(meshes)  # type: ignore[attr-defined]  # or it would download them
        problems = importlib.import_module("libero.libero.envs").TASK_MAPPING
        env = problems[files.problem_class(task)](
            str(files.bddl_file(task)),
            robots=["Panda"],
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            initialization_noise="default",  # 0.02 rad on each joint, as in the shipped states
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
            control_freq=20,
            ignore_done=True,
            hard_reset=False,
        )
    for name in env._observables:
        env.modify_observable(name, "enabled", False)
        env.modify_observable(name, "active", False)
    scene = Scene(env, files.initial_states(task))
    scene.option.geomgroup[COLLISION_GROUP] = 0
    quality = scene.model.vis.quality
    quality.offsamples = 0  # no multisampling: many times faster without a GPU
    if not SimulatorSettings().libero_effects:
        quality.shadowsize = 0
    return scene


def plain_values(owner: object) -> dict[str, Any]:
    """A copy of an object's numbers and arrays."""
    plain = (int, float, bool, np.ndarray, np.generic)
    return {name: copy.deepcopy(value) for name, value in vars(owner).items() if isinstance(value, plain)}


def dispose(scene: Scene) -> None:
    """Free a scene's renderer and simulator."""
    if scene.renderer is not None:
        close_renderer(scene.renderer)
    scene.env.close()


def axis_angle(quaternion: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A quaternion (w, x, y, z) as axis times angle in [0, 2 pi], not wrapped at pi: a gripper that points down is there."""
    w = float(np.clip(quaternion[0], -1.0, 1.0))
    length = np.sqrt(1.0 - w * w)
    return np.zeros(3) if length < 1e-9 else 2.0 * np.arccos(w) / length * quaternion[1:]
