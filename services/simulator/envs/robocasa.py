"""RoboCasa: a Panda arm on an Omron base in a kitchen; two versions with an interface each. NOT RUN HERE, see docs/robocasa.md.

robocasa     v0.1 and v0.2, the 24 tasks of the paper; a robosuite environment (`robosuite.make`) that takes (12,) actions.
robocasa365  v1.0, the tasks renamed; the gymnasium environment `robocasa/<Task>`, which takes a dictionary of an action's parts.

Both look the same from outside. Control: 20 actions a second, in v0.x's order and in [-1, 1]: position and rotation of the hand
(OSC, deltas), gripper (+1 closes, -1 opens), base velocity and torso, mode (above 0 the base moves, else the arm does). State:
the 16 numbers of the data sets (world2act/data/robocasa.py) and the fingers' distance. Cameras: left, right, wrist, in the
paper's cells. Episodes start with half-closed fingers (0.04 of 0.08 m), as robosuite's do; nothing waits until they are open.

Scenes (docs/decisions/020-robocasa-scenes.md): split "evaluation" has the kitchens and objects of published evaluations, all
other splits those of training. What is drawn there is a function of (task, seed): RoboCasa draws from its own generator,
robosuite from NumPy's; both are seeded. What policies are told differs from scene to scene.

Observations are taken anew after each action: those that robosuite's `step` returns were sampled at the *start* of the action
(Observable.update, first substep), while the frames and states of the data sets are those between two actions.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from services.simulator.envs.base import (
    Axis,
    Camera,
    Environment,
    EnvironmentSpec,
    Frames,
    InvalidInputError,
    Observation,
    TaskSpec,
    scene_draw,
    seeded,
    stack_frames,
)
from services.simulator.settings import SimulatorSettings
from world2act.data import robocasa as data
from world2act.segmentation import load_schemas
from world2act.splits import Split, split_of_seed
from world2act.types import FloatArray, ImageArray, M

OPEN_WIDTH = 0.08  # metres
CELLS = {"left": 0, "right": 1, "wrist": 2}  # paper, supplement E; bottom right stays black
EVALUATION_KITCHENS = ((1, 1), (2, 2), (4, 4), (6, 9), (7, 10))  # v0.x: (layout, style), robocasa/utils/eval_utils.py
TRAINING_KITCHENS = tuple((l, s) for l in range(10) for s in range(12) if (l, s) not in EVALUATION_KITCHENS)  # noqa: E741
ASSETS = ("textures", "fixtures", "objects/objaverse")  # folders of robocasa/models/assets that its download fills

# Customary limits in actions: `horizon` of robocasa/utils/dataset_registry.py of either version.
LIMITS = {
    **dict.fromkeys(("PnPCounterToCab", "PnPCabToCounter", "PnPSinkToCounter", "PnPMicrowaveToCounter"), 500),
    **{"PnPCounterToSink": 700, "PnPCounterToMicrowave": 600, "PnPCounterToStove": 500, "PnPStoveToCounter": 500},
    **{"OpenSingleDoor": 500, "CloseSingleDoor": 500, "OpenDoubleDoor": 1000, "CloseDoubleDoor": 700},
    **dict.fromkeys(("OpenDrawer", "CloseDrawer", "TurnOnSinkFaucet", "TurnOffSinkFaucet", "TurnSinkSpout"), 500),
    **dict.fromkeys(("TurnOnStove", "TurnOffStove", "TurnOnMicrowave", "TurnOffMicrowave"), 500),
    **{"CoffeeSetupMug": 600, "CoffeeServeMug": 600, "CoffeePressButton": 300},
}
LIMITS_365 = {
    **{"PickPlaceCounterToCabinet": 500, "PickPlaceCabinetToCounter": 300, "PickPlaceCounterToSink": 400},
    **{"PickPlaceSinkToCounter": 600, "PickPlaceCounterToMicrowave": 700, "PickPlaceMicrowaveToCounter": 500},
    **{"PickPlaceCounterToStove": 400, "PickPlaceStoveToCounter": 300, "OpenMicrowave": 400, "CloseMicrowave": 300},
    **{"OpenCabinet": 700, "CloseCabinet": 500, "OpenDrawer": 500, "CloseDrawer": 300, "OpenFridge": 600, "CloseFridge": 600},
    **{"TurnOnSinkFaucet": 400, "TurnOffSinkFaucet": 200, "TurnSinkSpout": 200, "TurnOnStove": 300, "TurnOffStove": 500},
    **{"CoffeeSetupMug": 400, "CoffeeServeMug": 300, "StartCoffeeMachine": 200, "TurnOnMicrowave": 300, "TurnOffMicrowave": 200},
    **{"OpenOven": 200, "CloseOven": 300, "OpenDishwasher": 300, "CloseDishwasher": 200, "OpenToasterOvenDoor": 300},
    **{"CloseToasterOvenDoor": 300, "OpenFridgeDrawer": 300, "CloseFridgeDrawer": 300, "SlideDishwasherRack": 300},
}
REACH = {"m": 50.0, "quaternion": 1.001}  # metres: kitchens are wide, and the base drives
STATE = (
    *(Axis(f"base_position_{x}", "m", -REACH["m"], REACH["m"]) for x in "xyz"),
    *(Axis(f"base_rotation_{x}", "quaternion", -REACH["quaternion"], REACH["quaternion"]) for x in "xyzw"),
    *(Axis(f"end_effector_position_relative_{x}", "m", -2.0, 2.0) for x in "xyz"),
    *(Axis(f"end_effector_rotation_relative_{x}", "quaternion", -REACH["quaternion"], REACH["quaternion"]) for x in "xyzw"),
    *(Axis(f"gripper_qpos_{finger}", "m", -0.05, 0.05) for finger in ("left", "right")),
    Axis("gripper_width", "m", 0.0, 0.1),
)
ACTION = tuple(
    Axis(name, "normalised", -1.0, 1.0)
    for name in ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper", "base_x", "base_y", "base_yaw", "torso", "base_mode")
)


class KitchenEnvironment(Environment):
    """What both versions share. One kitchen at a time is kept: a reset loads its model anew anyway."""

    simulator: ClassVar[str]
    versions: ClassVar[tuple[str, ...]]
    """Beginnings of the package's version numbers."""
    limits: ClassVar[Mapping[str, int]]

    def __init__(self) -> None:
        self.size = SimulatorSettings().robocasa_image_size
        self._kitchen: Any = None
        self._key: tuple[str, bool] | None = None
        self._success = False

    def describe(self) -> EnvironmentSpec:
        require_assets(self.simulator, self.versions)
        told = next(suite for suite in load_schemas().suites if suite.name == self.simulator).instructions
        return EnvironmentSpec(
            simulator=self.simulator,
            cameras=tuple(Camera(name, self.size, self.size, CELLS[name]) for name in data.CAMERAS),
            state=STATE,
            action=ACTION,
            chunk=M,
            control_hz=data.CONTROL_HZ,
            gripper_open_width=OPEN_WIDTH,
            gripper_width_index=len(STATE) - 1,
            tasks=tuple(TaskSpec(name, told[name], limit // M) for name, limit in self.limits.items()),
        )

    @abstractmethod
    def _open(self, task: str, evaluation: bool) -> Any:
        """The simulator of a task in the kitchens of evaluation or of training."""

    @abstractmethod
    def _begin(self, seed: int) -> str:
        """Draw a scene; returns what the policy is told."""

    @abstractmethod
    def _act(self, action: FloatArray) -> bool:
        """Run one action (12,) in v0.x's order; whether the task is done."""

    @abstractmethod
    def _observe(self, images: bool) -> tuple[Mapping[str, Any], dict[str, ImageArray]]:
        """Now: the parts of the state by RoboCasa365's names, and images by camera, upright; none needed without `images`."""

    def _reset(self, task: str, seed: int) -> Observation:
        evaluation = split_of_seed(seed)[0] is Split.EVALUATION
        draw = scene_draw(task, seed)
        with contextlib.redirect_stdout(io.StringIO()), seeded(draw):  # they print what they do
            if self._key != (task, evaluation):
                self.close()
                self._kitchen = self._open(task, evaluation)
                self._key = (task, evaluation)
            np.random.seed(draw)  # opening one has drawn, too
            told = self._begin(draw)
        self._success = False
        state, images = self._look(images=True)
        return Observation(images, state, " ".join(told.split()))

    def _step(self, actions: FloatArray, frames: Frames) -> tuple[dict[str, ImageArray], FloatArray, bool]:
        states, shown = [], []
        for number, action in enumerate(actions):
            self._success |= self._act(action)
            wanted = frames == "all" or (frames == "last" and number == len(actions) - 1)
            state, images = self._look(wanted)
            states.append(state)
            if wanted:
                shown.append(images)
        return stack_frames(shown, self.spec.cameras), np.stack(states), self._success

    def _look(self, images: bool) -> tuple[FloatArray, dict[str, ImageArray]]:
        """State float32 (17,) and images. RuntimeError names a part of another size: another version, or another robot."""
        parts, shown = self._observe(images)
        for name, (_, size) in data.STATE.items():
            if np.shape(parts[name]) != (size,):
                raise RuntimeError(f"{self.simulator}: {name} has shape {np.shape(parts[name])}, expected ({size},)")
        width = np.abs(parts["gripper_qpos"]).sum()
        return np.concatenate([*(parts[name] for name in data.STATE), [width]]).astype(np.float32), shown

    def close(self) -> None:
        if self._kitchen is not None:
            self._kitchen.close()
        self._kitchen, self._key, self._actions_left = None, None, None


class RobocasaEnvironment(KitchenEnvironment):
    """v0.1 and v0.2."""

    simulator = "robocasa"
    versions = ("0.1", "0.2")
    limits = LIMITS

    def _open(self, task: str, evaluation: bool) -> Any:
        load_package(self.simulator, self.versions)
        controllers = importlib.import_module("robosuite.controllers")
        if hasattr(controllers, "load_composite_controller_config"):  # robosuite 1.5, RoboCasa v0.2
            robot = "PandaOmron"
            controller = controllers.load_composite_controller_config(controller=None, robot=robot)
        else:
            robot = "PandaMobile"
            controller = controllers.load_controller_config(default_controller="OSC_POSE")
        return importlib.import_module("robosuite").make(
            env_name=task,
            robots=robot,
            controller_configs=controller,
            has_renderer=False,
            has_offscreen_renderer=True,
            use_camera_obs=False,  # drawn only where asked
            use_object_obs=True,
            ignore_done=True,
            control_freq=data.CONTROL_HZ,
            obj_instance_split="B" if evaluation else "A",
            layout_and_style_ids=EVALUATION_KITCHENS if evaluation else TRAINING_KITCHENS,
            generative_textures=None,
            randomize_cameras=False,
            translucent_robot=False,
        )

    def _begin(self, seed: int) -> str:
        self._kitchen.rng = np.random.default_rng(seed)
        self._kitchen.reset()
        return str(self._kitchen.get_ep_meta()["lang"])

    def _act(self, action: FloatArray) -> bool:
        self._kitchen.step(action.astype(np.float64))
        return bool(self._kitchen._check_success())

    def _observe(self, images: bool) -> tuple[Mapping[str, Any], dict[str, ImageArray]]:
        now = self._kitchen._get_observations(force_update=True)
        shown = {}
        for camera, view in data.CAMERAS.items() if images else ():
            drawn = self._kitchen.sim.render(width=self.size, height=self.size, camera_name=view)
            shown[camera] = np.ascontiguousarray(drawn[::-1])  # OpenGL's rows run upwards
        return {name: now[key] for name, (key, _) in data.STATE.items()}, shown


class Robocasa365Environment(KitchenEnvironment):
    """v1.0. It always draws its cameras, twice a step: once for what `step` returns, once for what is true after it."""

    simulator = "robocasa365"
    versions = ("1.",)
    limits = LIMITS_365

    def _open(self, task: str, evaluation: bool) -> Any:
        load_package(self.simulator, self.versions)
        importlib.import_module("robocasa.wrappers.gym_wrapper")  # registers robocasa/<Task>
        return importlib.import_module("gymnasium").make(
            f"robocasa/{task}",
            split="target" if evaluation else "pretrain",
            camera_widths=self.size,
            camera_heights=self.size,
            disable_env_checker=True,
        )

    def _begin(self, seed: int) -> str:
        observation, _ = self._kitchen.reset(seed=seed)
        return str(observation["annotation.human.task_description"])

    def _act(self, action: FloatArray) -> bool:
        return bool(self._kitchen.step(action_parts(action))[-1]["success"])

    def _observe(self, images: bool) -> tuple[Mapping[str, Any], dict[str, ImageArray]]:
        kitchen = self._kitchen.unwrapped
        now = kitchen.get_observation(kitchen.env._get_observations(force_update=True))
        shown = {camera: np.array(now[f"video.{view}"], np.uint8) for camera, view in data.CAMERAS.items()}
        return {name: now[f"state.{name}"] for name in data.STATE}, shown


def action_parts(action: FloatArray) -> dict[str, FloatArray]:
    """An action (12,) in v0.x's order as RoboCasa365's dictionary.

    Gripper and mode are switches. v0.x goes by their sign, 365 by whether they reach 0.5: here they become 0 or 1.
    """
    parts = {f"action.{name}": action[columns] for name, columns in data.COLUMNS.items()}
    for switch in ("action.gripper_close", "action.control_mode"):
        parts[switch] = (parts[switch] > 0).astype(np.float32)
    return parts


def missing(simulator: str, versions: tuple[str, ...]) -> str:
    """Why RoboCasa cannot run here; empty where it can."""
    try:
        require_assets(simulator, versions)
    except InvalidInputError as error:
        return str(error)
    return ""


def require_assets(simulator: str, versions: tuple[str, ...]) -> None:
    """Raise InvalidInputError unless RoboCasa and its meshes are installed. Does not import it."""
    spec = importlib.util.find_spec("robocasa")
    wanted = " or ".join(v.rstrip(".") for v in versions)
    if spec is None or not spec.submodule_search_locations:
        raise InvalidInputError(f"simulator: {simulator} needs RoboCasa {wanted}, which is not installed; see docs/robocasa.md")
    assets = Path(next(iter(spec.submodule_search_locations))) / "models" / "assets"
    absent = [name for name in ASSETS if not (assets / name).is_dir() or not any((assets / name).iterdir())]
    if absent:
        raise InvalidInputError(
            f"simulator: RoboCasa's {', '.join(absent)} are missing in {assets}; "
            "run python -m robocasa.scripts.download_kitchen_assets (5 GB)"
        )


def load_package(simulator: str, versions: tuple[str, ...]) -> None:
    """Import RoboCasa. Raises InvalidInputError where it is another version or does not import (it asserts its own pins)."""
    try:
        package = importlib.import_module("robocasa")
    except (ImportError, AssertionError) as error:
        raise InvalidInputError(f"simulator: {simulator}: RoboCasa does not import: {error}") from None
    version = str(package.__version__)
    if not version.startswith(versions):
        wanted = " or ".join(v.rstrip(".") for v in versions)
        raise InvalidInputError(f"simulator: {simulator} needs RoboCasa {wanted}, {version} is installed")
