"""Stands for RoboCasa365's gymnasium class, registered as robocasa/<Task>."""

import gymnasium
import numpy as np

from tests.stand_ins.kitchen import CAMERAS, Kitchen

SCENES = {"target": [(i, i) for i in range(1, 11)], "pretrain": [(i, j) for i in range(11, 61) for j in range(11, 61)]}
STATE = {
    "gripper_qpos": "robot0_gripper_qpos",
    "base_position": "robot0_base_pos",
    "base_rotation": "robot0_base_quat",
    "end_effector_position_relative": "robot0_base_to_eef_pos",
    "end_effector_rotation_relative": "robot0_base_to_eef_quat",
}
ACTION = {"end_effector_position": 3, "end_effector_rotation": 3, "gripper_close": 1, "base_motion": 4, "control_mode": 1}
TASKS = ("StartCoffeeMachine", "PickPlaceCounterToCabinet", "OpenCabinet")


class RoboCasaGymEnv(gymnasium.Env):
    def __init__(self, env_name, split="test", camera_widths=256, camera_heights=256):
        print(f"Creating {env_name} with split={split}")
        self.env = Kitchen(env_name, SCENES[split], split, use_camera_obs=True, size=camera_widths)
        self.env.reset()
        unit = {f"action.{name}": gymnasium.spaces.Box(-1, 1, (size,), np.float32) for name, size in ACTION.items()}
        self.action_space = gymnasium.spaces.Dict(unit)
        image = gymnasium.spaces.Box(0, 255, (camera_heights, camera_widths, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict({f"video.{camera}": image for camera in CAMERAS})

    def get_observation(self, raw):
        observed = {f"state.{name}": raw[key].astype(np.float32) for name, key in STATE.items()}
        observed |= {f"video.{camera}": np.copy(raw[f"{camera}_image"][::-1]) for camera in CAMERAS}
        return {**observed, "annotation.human.task_description": self.env.get_ep_meta()["lang"]}

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.env.rng = np.random.default_rng(seed)
        return self.get_observation(self.env.reset()), {"success": False}

    def step(self, action):
        assert set(action) == set(self.action_space.spaces)
        row = np.zeros(12)
        row[0:3], row[3:6] = action["action.end_effector_position"], action["action.end_effector_rotation"]
        row[6] = -1.0 if action["action.gripper_close"] < 0.5 else 1.0
        row[7:11] = action["action.base_motion"]
        row[11] = -1.0 if action["action.control_mode"] < 0.5 else 1.0
        raw, _, done, info = self.env.step(row)
        info["success"] = self.env._check_success()
        return self.get_observation(raw), float(info["success"]), done, False, info

    def close(self):
        self.env.close()


for task in TASKS:
    gymnasium.register(id=f"robocasa/{task}", entry_point=RoboCasaGymEnv, kwargs={"env_name": task})
