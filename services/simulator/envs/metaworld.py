"""Meta-World (`metaworld` 3.1, MuJoCo): a Sawyer arm over a table, seven tasks, two 64x64 cameras.

Simulator `metaworld-more` is the other 43 tasks of Meta-World, whose video a world model can learn from.

Control: an action (dx, dy, dz, gripper) in [-1, 1] is held for two simulator steps of 12.5 ms (40 actions a second);
gripper +1 closes, -1 opens. A scene is a function of (task, seed): objects and goals are drawn from Meta-World's own ranges, and
the hand's start from a box around Meta-World's single start pose (START_LOW, START_HIGH). With one start pose, four
demonstrations are enough to master four of the seven tasks, and no demonstration shows how to come from elsewhere.

What we change, and why: the policy sees only images and proprioception, so the goal of reach, push and pick-place must be
in the image. Its marker is enlarged, bright green, and stands on a post, because one camera cannot tell a high near sphere
from a low far one. The puck is blue, since the arm is red. All other sites are hidden. Physics is untouched.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from services.simulator.envs.base import (
    Axis,
    Camera,
    Environment,
    EnvironmentSpec,
    Frames,
    InvalidInputError,
    Observation,
    TaskSpec,
    stack_frames,
)
from services.simulator.envs.rendering import close_renderer, first_frames, open_renderer, touch_and_joints
from world2act.types import FloatArray, ImageArray, M

ACTION_REPEAT = 2
SIZE = 64
OPEN_WIDTH = 0.0883  # metres between the inner faces of the pads after reset; measured, the same for all tasks
EMPTY_WIDTH, OPENED_WIDTH = 0.0205, 0.06  # metres: what is closer holds nothing (a puck: 0.025 at least); wide enough to grasp
HOVER = np.array([0.0, 0.0, 0.1])  # metres above the puck
GRASP_TASKS = ("push", "pick-place")
MORE_CHUNKS = 24  # twice what the other tasks' experts need, and some wandering
PADS = ("leftpad", "rightpad")
PAD_THICKNESS = 0.006  # both pads' half thickness, from the inner faces to the pads' centres
START_LOW, START_HIGH = (-0.1, -0.1, 0.0), (0.1, 0.05, 0.1)  # metres from Meta-World's start; wider, door-open's expert fails
# The goal is a free point, seen only by its marker.
GOAL_TASKS = ("reach", "push", "pick-place", "reach-wall", "push-wall", "pick-place-wall", "push-back")
GOAL_RADIUS = 0.04
POST_RADIUS = 0.012
GOAL_COLOUR = (0.0, 1.0, 0.0, 1.0)
POST_COLOUR = (0.0, 0.6, 0.0, 1.0)
PUCK_COLOUR = (0.1, 0.2, 1.0, 1.0)
VIEWS = {"primary": "corner", "wrist": "gripperPOV"}  # ours -> Meta-World's; we move "corner"
SURFACES = ("table_wood", "basic_floor", "wall_metal")  # materials of what every scene stands on and in front of
PRIMARY_POSITION = (0.62, 0.15, 0.85)
PRIMARY_TARGET = (-0.02, 0.69, 0.12)
PRIMARY_FOVY = 35.0
# Parts of the arm that no view shows, or not the wrist's: 67,000 triangles are most of a 64x64 frame's cost. Leaving them out
# takes a pair of frames from 11 to 4 ms; 224 primary frames stayed the same to the bit, 391 of 392 wrist frames.
UNSEEN = ("head", "right_arm_base_link", "pedestal", "right_l0", "right_l1")
UNSEEN_BY_WRIST = (*UNSEEN, "right_l2", "right_l3", "right_l4", "right_l5", "right_l6", "right_hand")
HIDDEN_GROUP = 5  # MuJoCo draws geoms of groups 0 to 2

TASKS = (
    TaskSpec("reach", "reach the green goal", 14),
    TaskSpec("push", "push the puck to the green goal", 18),
    TaskSpec("pick-place", "pick up the puck and place it at the green goal", 18),
    TaskSpec("drawer-open", "open the drawer", 20),
    TaskSpec("drawer-close", "close the drawer", 18),
    TaskSpec("button-press", "press the red button", 16),
    TaskSpec("door-open", "open the door", 18),
)

MORE = {
    "assembly": "pick up the wrench and place it on the peg",
    "basketball": "pick up the ball and place it in the basket",
    "bin-picking": "pick up the cube and place it in the other bin",
    "box-close": "pick up the lid and place it on the box",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button behind the wall from above",
    "button-press-wall": "press the button behind the wall",
    "coffee-button": "press the button on the coffee machine",
    "coffee-pull": "pull the mug from the coffee machine",
    "coffee-push": "push the mug to the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "pick up the wrench from the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-unlock": "unlock the door",
    "hand-insert": "reach into the hole",
    "faucet-open": "open the faucet",
    "faucet-close": "close the faucet",
    "hammer": "hit the nail with the hammer",
    "handle-press-side": "press the handle from the side",
    "handle-press": "press the handle",
    "handle-pull-side": "pull the handle from the side",
    "handle-pull": "pull the handle",
    "lever-pull": "pull the lever",
    "pick-place-wall": "pick up the puck and place it behind the wall at the green goal",
    "pick-out-of-hole": "pick up the puck from the hole",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-side": "slide the plate into the cabinet at the side",
    "plate-slide-back": "slide the plate out of the cabinet",
    "plate-slide-back-side": "slide the plate out of the cabinet at the side",
    "peg-insert-side": "pick up the peg and insert it in the hole",
    "peg-unplug-side": "unplug the peg from the hole",
    "soccer": "push the ball to the net",
    "stick-push": "push the thermos with the stick",
    "stick-pull": "pull the thermos with the stick",
    "push-wall": "push the puck to the green goal behind the wall",
    "push-back": "push the puck to the green goal at the front",
    "reach-wall": "reach the green goal behind the wall",
    "shelf-place": "pick up the cube and place it on the shelf",
    "sweep-into": "sweep the cube into the hole",
    "sweep": "sweep the cube off the table",
    "window-open": "open the window",
    "window-close": "close the window",
}
"""Meta-World's other tasks and how we ask for them: nothing here is evaluated; a world model can learn from their video."""

SPEC = EnvironmentSpec(
    simulator="metaworld",
    cameras=(Camera("primary", SIZE, SIZE, 0), Camera("wrist", SIZE, SIZE, 1)),
    state=(
        Axis("ee_pos_x", "m", -0.6, 0.6),
        Axis("ee_pos_y", "m", 0.2, 1.1),
        Axis("ee_pos_z", "m", -0.1, 0.6),
        Axis("gripper_width", "m", 0.0, 0.12),
    ),
    action=tuple(Axis(name, "normalised", -1.0, 1.0) for name in ("delta_x", "delta_y", "delta_z", "gripper")),
    chunk=M,
    control_hz=80.0 / ACTION_REPEAT,
    gripper_open_width=OPEN_WIDTH,
    gripper_width_index=3,
    tasks=TASKS,
)
MORE_TASKS = tuple(TaskSpec(name, text, MORE_CHUNKS) for name, text in MORE.items())
MORE_SPEC = replace(SPEC, simulator="metaworld-more", tasks=MORE_TASKS)


@dataclass
class Scene:
    """One task's simulator and renderer, kept between episodes, and its expert."""

    env: Any
    expert: Any
    home: npt.NDArray[np.float64]  # Meta-World's start position of the hand
    groups: dict[str, npt.NDArray[np.int32]]  # camera -> every geom's group, those that it cannot see in HIDDEN_GROUP
    materials: npt.NDArray[np.int32]  # every geom's, as Meta-World has them
    renderer: mujoco.Renderer | None = None


class MetaworldEnvironment(Environment):
    """See the module's docstring. Each task's simulator and renderer are built on first use (0.6 s, 80 MB) and kept."""

    def __init__(self) -> None:
        self._scenes: dict[str, Scene] = {}
        self._task = ""
        self._raw = np.zeros(39)
        self._success = False
        self._reopens = False  # the expert's: it closed on nothing and has to open again
        self._paint: int | None = None

    def describe(self) -> EnvironmentSpec:
        return SPEC

    def _reset(self, task: str, seed: int) -> Observation:
        if task not in self._scenes:
            self._scenes[task] = build_scene(task)
        self._task, self._success, self._reopens = task, False, False
        env = self._scenes[task].env
        env.model.geom_matid[:] = painted(env.model, self._scenes[task].materials, self._paint)
        env.hand_init_pos = self._scenes[task].home + np.random.default_rng([seed, *task.encode()]).uniform(START_LOW, START_HIGH)
        env.seed(seed)
        # Meta-World places the object while the previous scene still stands; a second reset with the same draws
        # removes every trace of what this object did before.
        env.reset()
        env.seed(seed)
        self._raw, _ = env.reset()
        mujoco.mj_forward(env.model, env.data)
        return Observation(self._render(), self._state())

    def _step(self, actions: FloatArray, frames: Frames) -> tuple[dict[str, ImageArray], FloatArray, bool]:
        env = self._scenes[self._task].env
        states, shown = [], []
        for number, action in enumerate(actions):
            for _ in range(ACTION_REPEAT):
                self._raw, _, _, _, info = env.step(action)
                self._success |= bool(info["success"])
            states.append(self._state())
            if frames == "all" or (frames == "last" and number == len(actions) - 1):
                shown.append(self._render())
        return stack_frames(shown, SPEC.cameras), np.stack(states), self._success

    def close(self) -> None:
        for scene in self._scenes.values():
            if scene.renderer is not None:
                close_renderer(scene.renderer)
        self._scenes.clear()
        self._task, self._actions_left = "", None

    def expert_action(self) -> FloatArray:
        """Meta-World's scripted policy on the privileged observation, clipped to the action limits; float32 (4,).

        Its experts of push and pick-place presume an open hand: they never open one that was closed by somebody else, and carry
        nothing to the goal. Here the hand opens on its way to the puck, and where it holds nothing, above the puck.
        """
        if not self._task:
            raise InvalidInputError("task: no episode is running; reset first")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "constants may be too high": they are clipped here
            action = self._scenes[self._task].expert.get_action(self._raw)
        if self._task in GRASP_TASKS:
            hand, puck, width = self._raw[:3], self._raw[4:7], self._state()[3]
            self._reopens = bool(width < (OPENED_WIDTH if self._reopens else EMPTY_WIDTH))
            if self._reopens:
                action[:3] = 10.0 * (puck + HOVER - hand)
            if self._reopens or action[3] == 0.0:
                action[3] = -1.0
        return np.asarray(np.clip(action, -1.0, 1.0), np.float32)

    def expert_preview(self, frames: bool = True) -> tuple[FloatArray, dict[str, ImageArray]]:
        """See the base class. It plays on a copy of MuJoCo's data and restores Meta-World's own counters."""
        if not self._task:
            raise InvalidInputError("task: no episode is running; reset first")
        env = self._scenes[self._task].env
        kept, env.data = env.data, copy.copy(env.data)
        plain = (int, float, bool, np.ndarray, np.generic)
        counters = {name: copy.deepcopy(value) for name, value in vars(env).items() if isinstance(value, plain)}
        raw, success, reopens = self._raw.copy(), self._success, self._reopens
        actions, shown = [], []
        for _ in range(M):
            actions.append(self.expert_action())
            for _ in range(ACTION_REPEAT):
                self._raw = env.step(actions[-1])[0]
            if frames:
                shown.append(self._render())
        env.data = kept
        vars(env).update(counters)
        self._raw, self._success, self._reopens = raw, success, reopens
        return np.stack(actions), stack_frames(shown, SPEC.cameras)

    def _state(self) -> FloatArray:
        """Fingertip centre x, y, z and the gap between the pads' inner faces, metres; float32 (4,).

        Meta-World's own obs[3] is the distance of the claws, divided by 0.1 and clipped: neither metres nor the gap.
        """
        env = self._scenes[self._task].env
        gap = np.linalg.norm(env.data.body("rightpad").xpos - env.data.body("leftpad").xpos) - PAD_THICKNESS
        return np.array([*env.tcp_center, max(gap, 0.0)], np.float32)

    def paint(self, seed: int | None) -> None:
        """See the base class: table, floor and walls get each other's textures, or the objects'."""
        self._paint = seed

    def truth(self) -> dict[str, float]:
        """See the base class."""
        if not self._task:
            raise InvalidInputError("task: no episode is running; reset first")
        env = self._scenes[self._task].env
        left, right = ({env.model.body(name).id} for name in PADS)
        return touch_and_joints(env.model, env.data, left, right)

    def _render(self) -> dict[str, ImageArray]:
        scene = self._scenes[self._task]
        if scene.renderer is not None:
            return self._shoot(scene.renderer)
        scene.renderer, images = first_frames(lambda: open_renderer(scene.env.model, SIZE), self._shoot, self._task)
        return images

    def _shoot(self, renderer: mujoco.Renderer) -> dict[str, ImageArray]:
        scene, images = self._scenes[self._task], {}
        for camera, view in VIEWS.items():
            scene.env.model.geom_group[:] = scene.groups[camera]
            renderer.update_scene(scene.env.data, view)
            if self._task in GOAL_TASKS:
                add_post(renderer.scene, scene.env.model.site("goal").pos)
            images[camera] = renderer.render().copy()
        return images


class MoreMetaworldEnvironment(MetaworldEnvironment):
    """The other 43 of Meta-World's 50 tasks, with the same arm, cameras and actions."""

    def describe(self) -> EnvironmentSpec:
        return MORE_SPEC


def build_scene(task: str) -> Scene:
    """Meta-World's simulator of `task`, set to draw its scene from its own seeded generator, drawn as we want to see it."""
    name = f"{task}-v3"
    env = ALL_V3_ENVIRONMENTS[name]()
    env._partially_observable = False  # the expert needs the goal; policies never see this observation
    env.__dict__.pop("sawyer_observation_space", None)  # cached for the other setting
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    if task in {spec.name for spec in TASKS}:
        leave_out_unread(env)
    model = env.model
    model.vis.quality.offsamples = 0  # no multisampling: 99 -> 8 ms a 128x128 frame
    model.vis.quality.shadowsize = 0  # unused: shadows are off; saves 64 MB and 0.1 s a renderer
    camera = model.camera(VIEWS["primary"]).id
    model.cam_pos[camera] = PRIMARY_POSITION
    model.cam_quat[camera] = look_at(PRIMARY_POSITION, PRIMARY_TARGET)
    model.cam_fovy[camera] = PRIMARY_FOVY
    for site in range(model.nsite):
        model.site_rgba[site, 3] = 0.0
    if task in GOAL_TASKS:
        goal = model.site("goal")
        goal.size[:] = GOAL_RADIUS
        goal.rgba[:] = GOAL_COLOUR
        puck = model.geom("objGeom")
        puck.matid[:] = -1
        puck.rgba[:] = PUCK_COLOUR
    expert: Any = ENV_POLICY_MAP[name]
    home = np.array(env.hand_init_pos, np.float64)
    groups = {"primary": geom_groups(model, UNSEEN), "wrist": geom_groups(model, UNSEEN_BY_WRIST)}
    return Scene(env, expert(), home, groups, model.geom_matid.copy())


def leave_out_unread(env: Any) -> None:
    """Leave out what Meta-World computes at every step for its reward and its log only: objects' orientations, and touch. States,
    success and experts' actions of the seven tasks stay the same to the bit; stick-push asks touch for success."""
    env._get_quat_objects = partial(np.zeros, 4)
    env.touching_object = lambda object_geom_id: False


def painted(model: mujoco.MjModel, own: npt.NDArray[np.int32], seed: int | None) -> npt.NDArray[np.int32]:
    """Material of every geom: `own`, but from a seed each of SURFACES is made of another of the scene's textured materials."""
    materials = own.copy()
    if seed is not None:
        rng, textured = np.random.default_rng(seed), np.flatnonzero((model.mat_texid >= 0).any(axis=1))
        for name in SURFACES:
            surface = model.material(name).id
            materials[own == surface] = rng.choice(textured[textured != surface])
    return materials


def geom_groups(model: mujoco.MjModel, unseen: tuple[str, ...]) -> npt.NDArray[np.int32]:
    """Every geom's group, with the meshes of the bodies `unseen` in HIDDEN_GROUP; drawing only, physics ignores groups."""
    groups = np.array(model.geom_group, np.int32)
    bodies = [model.body(name).id for name in unseen]
    groups[np.isin(model.geom_bodyid, bodies) & (model.geom_type == mujoco.mjtGeom.mjGEOM_MESH)] = HIDDEN_GROUP
    return groups


def look_at(position: tuple[float, float, float], target: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """Quaternion (w, x, y, z) of an upright camera at `position` that looks at `target`."""
    backward = np.subtract(position, target)
    backward /= np.linalg.norm(backward)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([right, np.cross(backward, right), backward], axis=1).flatten())
    return quaternion


def add_post(scene: mujoco.MjvScene, goal: npt.NDArray[np.float64]) -> None:
    """Draw (not simulate) a post from the table up to the goal marker."""
    geom = scene.geoms[scene.ngeom]
    kind = mujoco.mjtGeom.mjGEOM_CYLINDER
    mujoco.mjv_initGeom(geom, kind, np.zeros(3), np.zeros(3), np.zeros(9), np.array(POST_COLOUR, np.float32))
    mujoco.mjv_connector(geom, kind, POST_RADIUS, np.array([goal[0], goal[1], 0.0]), np.asarray(goal, np.float64))
    scene.ngeom += 1
