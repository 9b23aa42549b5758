"""A kitchen that serves what RoboCasa documents, without RoboCasa: a toy hand over a counter in MuJoCo.

Written from RoboCasa's and robosuite's sources (environments/kitchen/kitchen.py, wrappers/gym_wrapper.py, robosuite's
utils/observables.py), with nothing of ours in it. What it keeps of them, because an adapter can get it wrong:

- actions (12,): position 3, rotation 3, gripper 1, base 3, torso 1, mode 1; the mode's and the gripper's sign decide;
- an episode starts with half-closed fingers; the fingers are two joints of opposite sign;
- images of `sim.render` and of observations run upwards; the gymnasium class turns them;
- what `step` returns was sampled in the first substep, so it is almost an action old;
- scenes come from `env.rng` and the start of the arm from NumPy's global generator;
- gripper_close and control_mode of the gymnasium class are switches at 0.5.
"""

from __future__ import annotations

from collections import OrderedDict

import mujoco
import numpy as np

CAMERAS = ("robot0_agentview_left", "robot0_agentview_right", "robot0_eye_in_hand")
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.1, 0.2, 0.9), "yellow": (0.9, 0.8, 0.1)}
SUBSTEPS, TIMESTEP = 10, 0.005
HALF_OPEN, FULLY_OPEN = 0.0208, 0.04  # of one finger
WORLD = """
<mujoco>
  <option timestep="{timestep}" gravity="0 0 0" integrator="implicitfast"/>
  <visual><quality offsamples="0" shadowsize="0"/><global offwidth="256" offheight="256"/></visual>
  <worldbody>
    <light pos="0 0 3" dir="0 0 -1" diffuse="0.9 0.9 0.9"/>
    <geom name="counter" type="box" pos="0.5 0 -0.05" size="1.5 1.5 0.05" rgba="0.75 0.72 0.68 1"/>
    <body name="thing" pos="0.6 0 0.03"><geom name="thing" type="box" size="0.035 0.035 0.03" contype="0" conaffinity="0"/></body>
    <geom name="plate" type="cylinder" pos="0.75 -0.2 0.003" size="0.06 0.003" rgba="0.2 0.2 0.25 1"/>
    <geom name="board" type="box" pos="0.68 0.12 0.003" size="0.05 0.08 0.003" rgba="0.45 0.25 0.1 1"/>
    {tiles}
    <camera name="robot0_agentview_left" pos="-0.1 0.75 0.75" xyaxes="-0.75 -0.66 0  0.3 -0.34 0.89"/>
    <camera name="robot0_agentview_right" pos="-0.1 -0.75 0.75" xyaxes="0.75 -0.66 0  0.3 0.34 0.89"/>
    <body name="base">
      <joint name="base_x" type="slide" axis="1 0 0" damping="5"/>
      <joint name="base_y" type="slide" axis="0 1 0" damping="5"/>
      <joint name="base_yaw" type="hinge" axis="0 0 1" damping="5"/>
      <geom type="box" size="0.05 0.05 0.02" pos="-0.6 0 0.05" mass="20" contype="0" conaffinity="0" rgba="0.3 0.3 0.3 1"/>
      <body name="hand" pos="0.5 0 0.3">
        <joint name="x" type="slide" axis="1 0 0" damping="90"/>
        <joint name="y" type="slide" axis="0 1 0" damping="90"/>
        <joint name="z" type="slide" axis="0 0 1" damping="90"/>
        <geom type="box" size="0.06 0.1 0.02" mass="1" contype="0" conaffinity="0" rgba="0.1 0.1 0.1 1"/>
        <geom type="cylinder" size="0.03 0.3" pos="0 0 0.32" mass="0.1" contype="0" conaffinity="0" rgba="0.95 0.95 0.95 1"/>
        <camera name="robot0_eye_in_hand" pos="0.1 0 0.02" xyaxes="0 -1 0  1 0 0" fovy="75"/>
        <body name="leftfinger" pos="0 0 -0.06">
          <joint name="left" type="slide" axis="0 1 0" range="0 {open}" limited="true" damping="2"/>
          <geom type="box" size="0.015 0.008 0.045" mass="0.1" contype="0" conaffinity="0" rgba="0.95 0.5 0.1 1"/>
        </body>
        <body name="rightfinger" pos="0 0 -0.06">
          <joint name="right" type="slide" axis="0 1 0" range="-{open} 0" limited="true" damping="2"/>
          <geom type="box" size="0.015 0.008 0.045" mass="0.1" contype="0" conaffinity="0" rgba="0.1 0.5 0.95 1"/>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <position joint="x" kp="2000"/><position joint="y" kp="2000"/><position joint="z" kp="2000"/>
    <position joint="left" kp="60"/><position joint="right" kp="60"/>
    <velocity joint="base_x" kv="300"/><velocity joint="base_y" kv="300"/><velocity joint="base_yaw" kv="300"/>
  </actuator>
</mujoco>
"""
TILE = '<geom type="box" pos="{x:.2f} {y:.2f} 0.002" size="0.035 0.05 0.002" rgba="{grey} {grey} 0.3 1"/>'
TILES = "".join(TILE.format(x=0.1 * i, y=side * 0.22, grey=0.15 * (i % 4)) for i in range(2, 10) for side in (-1, 1))
ARM, FINGERS, BASE = slice(0, 3), slice(3, 5), slice(5, 8)  # of the actuators


class Sim:
    """robosuite's binding: only `render`."""

    def __init__(self, kitchen: Kitchen) -> None:
        self.kitchen = kitchen
        self.renderers: dict[tuple[int, int], mujoco.Renderer] = {}

    def render(self, width: int, height: int, *, camera_name: str) -> np.ndarray:
        """(height, width, 3), the lowest row first."""
        key = (height, width)
        if key not in self.renderers:
            self.renderers[key] = mujoco.Renderer(self.kitchen.model, height, width)
            for effect in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):  # slow without a GPU
                self.renderers[key].scene.flags[effect] = False
        renderer = self.renderers[key]
        renderer._gl_context.make_current()
        renderer.update_scene(self.kitchen.data, camera_name)
        return renderer.render()[::-1].copy()

    def close(self) -> None:
        for renderer in self.renderers.values():
            renderer._gl_context.make_current()
            renderer.close()
        self.renderers.clear()


class Kitchen:
    """What robosuite.make returns for a RoboCasa task."""

    def __init__(self, env_name, layout_and_style_ids, obj_instance_split, use_camera_obs, size=None) -> None:
        self.env_name, self.layout_and_style_ids, self.obj_instance_split = env_name, layout_and_style_ids, obj_instance_split
        self.use_camera_obs, self.size = use_camera_obs, size
        self.rng = np.random.default_rng()
        self.model = mujoco.MjModel.from_xml_string(WORLD.format(timestep=TIMESTEP, open=FULLY_OPEN, tiles=TILES))
        self.data = mujoco.MjData(self.model)
        self.sim = Sim(self)
        self.rows: list[np.ndarray] = []  # every action executed, for tests
        self.done = False
        self.colour, self.scene = "red", (0, 0)

    def reset(self) -> OrderedDict[str, np.ndarray]:
        mujoco.mj_resetData(self.model, self.data)
        self.scene = tuple(self.rng.choice(self.layout_and_style_ids))
        self.colour = str(self.rng.choice(sorted(COLOURS)))
        thing = self.model.body("thing")
        thing.pos[:2] = self.rng.uniform((0.55, -0.12), (0.7, 0.12))
        self.model.geom("thing").rgba[:3] = COLOURS[self.colour]
        self.data.qpos[3:6] += 0.01 * np.random.randn(3)
        self.data.ctrl[ARM] = self.data.qpos[3:6]
        self.data.qpos[6:8] = HALF_OPEN, -HALF_OPEN
        self.data.ctrl[FINGERS] = self.data.qpos[6:8]
        self.rows = []
        for _ in range(10 * SUBSTEPS):
            mujoco.mj_step(self.model, self.data)
        return self._get_observations(force_update=True)

    def get_ep_meta(self) -> dict[str, object]:
        return {"lang": f"pick the {self.colour} block from the counter and place it in the cabinet", "layout_id": self.scene[0]}

    def step(self, action):
        action = np.asarray(action, np.float64)
        assert action.shape == (12,) and np.abs(action).max() <= 1
        self.rows.append(action)
        moves_base = action[11] > 0
        grip = np.clip(self.data.ctrl[3] - 0.008 * np.sign(action[6]), 0.0, FULLY_OPEN)
        self.data.ctrl[FINGERS] = grip, -grip
        self.data.ctrl[BASE] = 0.2 * action[7:10] if moves_base else 0.0
        if not moves_base:
            low, high = np.array([-0.3, -0.3, -0.2]), np.array([0.3, 0.3, 0.3])
            self.data.ctrl[ARM] = np.clip(self.data.qpos[3:6] + 0.05 * action[:3], low, high)
        for substep in range(SUBSTEPS):
            mujoco.mj_step(self.model, self.data)
            if substep == 0:
                early = self._get_observations(force_update=True)
        self.done |= self._check_success()
        return early, 0.0, False, {}

    def _check_success(self) -> bool:
        return bool(np.linalg.norm(self.data.body("hand").xpos[:2] - self.data.body("thing").xpos[:2]) < 0.03)

    def _get_observations(self, force_update: bool = False) -> OrderedDict[str, np.ndarray]:
        mujoco.mj_forward(self.model, self.data)
        base, hand = self.data.body("base"), self.data.body("hand")
        xyzw = [1, 2, 3, 0]
        observed = OrderedDict(
            robot0_base_pos=base.xpos.copy(),
            robot0_base_quat=base.xquat[xyzw],
            robot0_base_to_eef_pos=base.xmat.reshape(3, 3).T @ (hand.xpos - base.xpos),
            robot0_base_to_eef_quat=np.array([0.0, 0.0, 0.0, 1.0]),
            robot0_gripper_qpos=self.data.qpos[6:8].copy(),
            robot0_joint_pos=self.data.qpos[3:6].copy(),
        )
        for camera in CAMERAS if self.use_camera_obs else ():
            observed[f"{camera}_image"] = self.sim.render(self.size, self.size, camera_name=camera)
        return observed

    def close(self) -> None:
        self.sim.close()
