"""A scripted expert for LIBERO: waypoints from privileged poses, closed-loop control of the end effector, retries.

It reads the goal of the task's BDDL file. (On or In object place): hover, descend, close, lift, carry, lower, open, retreat; what
is carried is steered by its own pose, so a crooked grasp does not matter, and a grasp that misses or is lost starts over with
the next best one. An object to be pushed (its place is on the table) is dragged by a closed gripper that presses on its middle.
(Turnon fixture): the knob is grasped and turned. Other goals (drawers, conjunctions) have no expert.

All that it remembers is `Memory`; what it does next is a function of that and the simulator's state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mujoco
import numpy as np

from services.simulator.envs.base import InvalidInputError
from services.simulator.envs.libero_grasp import Grasp, Points, grasps, shape_points, subtree
from world2act.types import FloatArray

HAND_BODY = "robot0_right_hand"
FINGERS = ("gripper0_leftfinger", "gripper0_finger_joint1_tip", "gripper0_rightfinger", "gripper0_finger_joint2_tip")
STEP = 0.05, 0.5  # metres and radians of a full action
GAIN = 2.0, 1.5  # of a pose error that one action is to remove; more overshoots
DOWN = np.diag([1.0, -1.0, -1.0])  # the hand's rotation when it points down at yaw 0
UP = np.array([0.0, 0.0, 1.0])
OPEN, CLOSE = -1.0, 1.0
CLEARANCE = 0.04  # metres between what is carried and what it passes over
APPROACH = 0.08  # metres above a grasp from which the gripper descends
PATIENCE = {"hover": 60, "descend": 30, "close": 9, "lift": 40, "carry": 60, "lower": 35, "open": 7, "retreat": 12}
GRIPPING = ("hover", "descend", "close")
MOVING = ("lift", "carry", "lower")
LOOSE = 5  # actions without both fingers' contact after which a thing is lost; contacts flicker while it settles in the grip
TURN = 1.4  # radians
PUSH_DEPTH = 0.010  # metres above a plate's origin, 4 mm into its bottom: pressed down, it comes along by friction
PUSH_LEAD = 0.02  # metres ahead; faster, the fingers slip over the rim


@dataclass
class Memory:
    """Where the expert is in its plan."""

    stage: str = "plan"
    ticks: int = 0
    tried: list[Points] = field(default_factory=list)
    grasp: Grasp | None = None
    last_height: float = np.inf
    travel: float = 0.0  # top of what the thing is carried over
    turned: float = 0.0
    loose: int = 0


class Expert:
    """Acts in one episode of `env`, a LIBERO simulator. Raises InvalidInputError for goals that it cannot reach."""

    def __init__(self, env: Any, task: str) -> None:
        self.env = env
        self.memory = Memory()
        goal = env.parsed_problem["goal_state"]
        verbs = {"on": 3, "in": 3, "turnon": 2}
        if len(goal) != 1 or verbs.get(goal[0][0]) != len(goal[0]) or ("region" in goal[0][-1] and "cabinet" in goal[0][-1]):
            raise InvalidInputError(f"task: {task} has no scripted expert")
        self.verb, self.thing = goal[0][:2]
        self.place = goal[0][-1]

    @property
    def model(self) -> Any:
        return self.env.sim.model._model

    @property
    def data(self) -> Any:
        return self.env.sim.data._data

    def act(self) -> FloatArray:
        """The next action, float32 (7,)."""
        if self.memory.stage == "plan":
            self.plan()
        self.memory.ticks += 1
        action = self.turn_knob() if self.verb == "turnon" else self.push() if self.is_push() else self.pick_and_place()
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    # What is where

    def hand(self) -> Points:
        position: Points = self.data.site_xpos[self.env.robots[0].eef_site_id].copy()
        return position

    def bodies(self, name: str) -> set[int]:
        return subtree(self.model, self.env.obj_body_id[name])

    def points(self, name: str) -> Points:
        return shape_points(self.model, self.data, self.bodies(name))

    def others(self) -> Points:
        """Surface points of everything but the arm, the thing to be moved, the table and the floor."""
        names = [n for n in (*self.env.objects_dict, *self.env.fixtures_dict) if n != self.thing and n in self.env.obj_body_id]
        return np.concatenate([np.zeros((0, 3)), *(self.points(name) for name in names)])

    def position(self, name: str) -> Points:
        position: Points = self.data.xpos[self.env.obj_body_id[name]].copy()
        return position

    def is_push(self) -> bool:
        """Whether the place is a region of the table itself."""
        site = self.env.object_sites_dict.get(self.place)
        return site is not None and getattr(site, "parent_name", None) not in self.env.obj_body_id

    def target(self) -> Points:
        """Where the thing's origin is to be: x, y, and the height at which what is below it begins."""
        if self.place in self.env.obj_body_id:
            position = self.position(self.place)
            below = self.points(self.place)
            below = below[np.linalg.norm(below[:, :2] - position[:2], axis=1) < 0.025]
            return np.array([*position[:2], below[:, 2].max() if len(below) else position[2]])
        site = self.data.site(self.place)
        position = site.xpos.copy()
        tilt = site.xmat.reshape(3, 3)
        if self.verb == "on" and abs(tilt[2, 2]) < 0.9:  # a rack: upright, the thing fits a little before the region's middle
            position += tilt.T @ np.array([0.0, 0.0, 0.03])
        if self.verb == "in":
            position[2] = self.points(self.env.object_sites_dict[self.place].parent_name)[:, 2].min() + 0.02
        return np.asarray(position)

    def held(self) -> bool:
        """Whether both fingers touch the thing."""
        bodies = self.bodies(self.thing)
        pairs = {frozenset(map(int, pair)) for pair in self.model.geom_bodyid[self.data.contact.geom]}
        fingers = [self.model.body(name).id for name in FINGERS]
        touching = [any(frozenset((f, b)) in pairs for b in bodies for f in side) for side in (fingers[:2], fingers[2:])]
        return all(touching)

    # Control

    def go(self, position: Points, yaw: float, gripper: float) -> Points:
        """The action (7,) towards a pose of the end effector."""
        rotation = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1.0]]) @ DOWN
        error, quaternion = np.zeros(3), np.zeros(4)
        mujoco.mju_mat2Quat(quaternion, (rotation @ self.data.body(HAND_BODY).xmat.reshape(3, 3).T).flatten())
        mujoco.mju_quat2Vel(error, quaternion, 1.0)
        return np.concatenate([GAIN[0] * (position - self.hand()) / STEP[0], GAIN[1] * error / STEP[1], [gripper]])

    def enter(self, stage: str) -> None:
        self.memory.stage, self.memory.ticks, self.memory.last_height = stage, 0, np.inf

    def late(self) -> bool:
        return self.memory.ticks >= PATIENCE[self.memory.stage]

    def yaw_error(self, yaw: float) -> float:
        x = self.data.body(HAND_BODY).xmat.reshape(3, 3)[:2, 0]
        return abs(float(np.arctan2(np.cos(yaw) * x[1] - np.sin(yaw) * x[0], np.cos(yaw) * x[0] + np.sin(yaw) * x[1])))

    # Plans

    def plan(self) -> None:
        """Choose a grasp unlike those that failed."""
        memory = self.memory
        if self.verb == "turnon":
            memory.grasp = self.knob()
        elif self.is_push():
            memory.grasp = self.middle()
        else:
            found = grasps(self.points(self.thing), self.others())

            def again(grasp: Grasp) -> float:
                pose = np.array([*grasp.position[:2], 0.03 * grasp.yaw])
                return sum(float(np.linalg.norm(pose - other) < 0.02) for other in memory.tried)

            memory.grasp = min(found, key=lambda grasp: grasp.cost + 1.0 * again(grasp))
        memory.tried.append(np.array([*memory.grasp.position[:2], 0.03 * memory.grasp.yaw]))
        memory.loose = 0
        memory.travel = self.travel_height(self.position(self.thing), self.target()) if self.verb != "turnon" else 0.0
        self.enter("hover")

    def approach(self, grasp: Grasp, gripper: float) -> Points:
        """Stages hover and descend: above the grasp, then down to it; `gripper` as the fingers are to be."""
        memory, hand = self.memory, self.hand()
        away = float(np.linalg.norm(hand[:2] - grasp.position[:2]))
        if memory.stage == "hover":
            above = grasp.position + APPROACH * UP
            if away > 0.06 and hand[2] < above[2] - 0.02:  # rise first
                return self.go(np.array([*hand[:2], above[2]]), grasp.yaw, gripper)
            if (away < 0.012 and self.yaw_error(grasp.yaw) < 0.08 and hand[2] < above[2] + 0.05) or self.late():
                self.enter("descend")
            return self.go(above, grasp.yaw, gripper)
        if (abs(hand[2] - grasp.position[2]) < 0.005 and away < 0.008) or self.late():
            self.enter("close")
        steer = grasp.position if away < 0.02 else np.array([*grasp.position[:2], max(hand[2], grasp.position[2])])
        return self.go(steer, grasp.yaw, gripper)

    def grip(self, grasp: Grasp) -> Points:
        """Stages hover, descend and close."""
        if self.memory.stage != "close":
            return self.approach(grasp, OPEN)
        if self.late():
            self.enter("lift")
        return self.go(grasp.position, grasp.yaw, CLOSE)

    def retreat(self, grasp: Grasp, gripper: float) -> Points:
        """Stage retreat: up and away; what has not succeeded by then is planned anew."""
        late = self.late()
        if late and not self.env._check_success():
            self.enter("plan")
        return self.go(self.hand() + (0.0 if late else 0.05) * UP, grasp.yaw, gripper)

    def pick_and_place(self) -> Points:
        memory, hand, grasp = self.memory, self.hand(), self.memory.grasp
        assert grasp is not None
        if memory.stage in GRIPPING:
            return self.grip(grasp)
        memory.loose = 0 if memory.stage not in MOVING or self.held() or self.env._check_success() else memory.loose + 1
        if memory.loose > LOOSE:
            self.enter("plan")
            return self.go(hand + 0.02 * UP, grasp.yaw, OPEN)
        if memory.stage in MOVING:
            return self.carry(grasp)
        if memory.stage == "open":
            if self.late():
                self.enter("retreat")
            return self.go(hand, grasp.yaw, OPEN)
        return self.retreat(grasp, OPEN)

    def carry(self, grasp: Grasp) -> Points:
        """Stages lift, carry and lower, steered by the carried thing's own pose."""
        memory, hand, target = self.memory, self.hand(), self.target()
        thing, points = self.position(self.thing), self.points(self.thing)
        hang = hand[2] - points[:, 2].min()  # of what is carried, below the end effector
        where = np.array([*(hand[:2] + target[:2] - thing[:2]), 0.0])
        off = float(np.linalg.norm(target[:2] - thing[:2]))
        height = memory.travel + CLEARANCE + hang
        if memory.stage == "lift":
            if hand[2] > height - 0.02 or self.late():
                self.enter("carry")
            start = where if points[:, 2].min() > target[2] + CLEARANCE and hand[2] > height - 0.06 else hand
            return self.go(np.array([*start[:2], height]), grasp.yaw, CLOSE)
        if memory.stage == "carry":
            if off < 0.018 or self.late():
                self.enter("lower")
            where[2] = height
            return self.go(where, grasp.yaw, CLOSE)
        stuck = memory.ticks > 8 and hand[2] > memory.last_height - 0.0008
        memory.last_height = hand[2]
        done = self.env._check_success() and memory.ticks > 2 and (self.verb == "in" or points[:, 2].min() < target[2] + 0.012)
        if done or stuck or self.late():
            self.enter("open")
        where[2] = max(hand[2] - 0.025, target[2] + hang - 0.005)
        return self.go(where, grasp.yaw, CLOSE)

    def travel_height(self, thing: Points, target: Points) -> float:
        """The highest point of what stands within a hand's breadth of the straight way from the thing to its place."""
        others = self.others()
        way = target[:2] - thing[:2]
        share = np.clip(((others[:, :2] - thing[:2]) @ way) / max(float(way @ way), 1e-6), 0.0, 1.0)
        near = others[np.linalg.norm(others[:, :2] - thing[:2] - share[:, None] * way, axis=1) < 0.09]
        return float(max(near[:, 2].max() if len(near) else target[2], target[2]))

    def middle(self) -> Grasp:
        """On the middle of a plate."""
        return Grasp(self.position(self.thing) + PUSH_DEPTH * UP, 0.0, 0.0)

    def push(self) -> Points:
        memory, hand, grasp = self.memory, self.hand(), self.memory.grasp
        assert grasp is not None
        if memory.stage in ("hover", "descend"):
            return self.approach(grasp, CLOSE)
        way = self.target()[:2] - self.position(self.thing)[:2]
        if memory.stage in ("close", "lift"):
            if self.env._check_success() and np.linalg.norm(way) < 0.025:
                self.enter("retreat")
            ahead = hand[:2] + PUSH_LEAD * way / max(float(np.linalg.norm(way)), 1e-6)
            if np.linalg.norm(hand[:2] - self.position(self.thing)[:2]) > 0.09:  # it slipped over the rim
                self.enter("plan")
            return self.go(np.array([*ahead, grasp.position[2]]), grasp.yaw, CLOSE)
        return self.retreat(grasp, CLOSE)

    def knob(self) -> Grasp:
        """Above the knob's axis, fingers across its handle."""
        body = self.model.jnt_bodyid[self.model.joint(self.env.get_object(self.thing).joints[0]).id]
        points = shape_points(self.model, self.data, {int(body)})
        handle = points[points[:, 2] > points[:, 2].max() - 0.02]
        middle = (points[:, :2].max(axis=0) + points[:, :2].min(axis=0)) / 2
        spread = [np.ptp(handle[:, axis]) for axis in (0, 1)]
        yaw = 0.0 if spread[1] < spread[0] else np.pi / 2
        return Grasp(np.array([*middle, points[:, 2].max() - 0.02]), yaw, 0.0)

    def turn_knob(self) -> Points:
        memory, hand, grasp = self.memory, self.hand(), self.memory.grasp
        assert grasp is not None
        if memory.stage in GRIPPING:
            return self.grip(grasp)
        if memory.stage == "lift":  # turn
            joint = self.model.joint(self.env.get_object(self.thing).joints[0]).id
            way = float(np.sign(self.data.xaxis[joint, 2]) or 1.0)
            memory.turned = min(memory.turned + 0.08, TURN)
            if self.late():
                memory.turned = 0.0
                self.enter("retreat" if self.env._check_success() else "plan")
            return self.go(grasp.position, grasp.yaw + way * memory.turned, CLOSE)
        if self.late() and not self.env._check_success():
            self.enter("plan")
        x = self.data.body(HAND_BODY).xmat.reshape(3, 3)[:2, 0]
        yaw = float(np.arctan2(x[1], x[0]))
        return self.go(hand + (0.05 if memory.ticks > 5 else 0.0) * UP, yaw, OPEN)
