"""Where to grasp an object with a parallel gripper that points down, from its collision shapes. Metres; z is up.

The gripper's frame: `u` is the direction in which the fingers move, `v` across; at yaw 0, u is the world's y axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]

TIP = 0.009  # fingers end so far below the end-effector site
HAND = 0.031  # the hand's lower side is so far above it
HAND_HALF = (0.105, 0.034)  # the hand's half size along u and v
FINGER_OUT, FINGER_HALF = 0.068, 0.014  # open fingers' outer sides along u, and half their width along v
WIDEST = 0.068  # grasped width that leaves the open fingers some play
DEPTH = 0.022  # how far below an object's top the end effector goes
SPACING = 0.008  # of sampled points
YAWS = np.deg2rad(np.arange(-90, 90, 15))
RIM_ANGLES = np.deg2rad(np.arange(0, 360, 15))


@dataclass(frozen=True)
class Grasp:
    """End-effector position and yaw of a grasp; a lower cost is better."""

    position: Points
    yaw: float
    cost: float


def shape_points(model: Any, data: Any, bodies: Iterable[int]) -> Points:
    """Points (n, 3), about SPACING apart, in the collision shapes of `bodies`, in the world; boxes stand for other shapes."""
    wanted = set(bodies)
    found = [np.zeros((0, 3))]
    for geom in range(model.ngeom):
        if int(model.geom_bodyid[geom]) not in wanted or not (model.geom_contype[geom] or model.geom_conaffinity[geom]):
            continue
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_PLANE:
            continue
        centre, half = model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
        axes = [np.linspace(-h, h, int(np.clip(2 * h / SPACING, 1, 40)) + 1) for h in half]
        grid = centre + np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        found.append(data.geom_xpos[geom] + grid @ data.geom_xmat[geom].reshape(3, 3).T)
    return np.concatenate(found)


def subtree(model: Any, root: int) -> set[int]:
    """`root` and every body below it."""
    found = {root}
    for body in range(root + 1, model.nbody):  # MuJoCo numbers parents before children
        if int(model.body_parentid[body]) in found:
            found.add(body)
    return found


def directions(yaw: float) -> tuple[Points, Points]:
    """Unit vectors u and v, (2,) each, in the world's xy plane."""
    return np.array([-np.sin(yaw), np.cos(yaw)]), np.array([np.cos(yaw), np.sin(yaw)])


def grasps(points: Points, others: Points) -> list[Grasp]:
    """All grasps of an object with surface `points` among `others`, the cheapest first; across it, or on its rim if too wide."""
    top, bottom = points[:, 2].max(), points[:, 2].min()
    height = max(bottom + TIP + 0.003, top - DEPTH)
    slab = points[np.abs(points[:, 2] - height) < 0.011]
    found = [g for yaw in YAWS if (g := across(slab, others, float(yaw), height)) is not None]
    found = found or [rim(points, others, float(angle), max(bottom + TIP + 0.003, top - 0.018)) for angle in RIM_ANGLES]
    return sorted(found, key=lambda grasp: grasp.cost)


def across(slab: Points, others: Points, yaw: float, height: float) -> Grasp | None:
    """The grasp at `yaw` over the middle of what lies at its height; None where that is too wide."""
    if len(slab) == 0:
        return None
    u, v = directions(yaw)
    along, side = slab[:, :2] @ u, slab[:, :2] @ v
    width = along.max() - along.min()
    if width > WIDEST:
        return None
    middle = (along.max() + along.min()) / 2 * u + (side.max() + side.min()) / 2 * v
    upper, lower = (along[part] for part in (slab[:, 2] > height, slab[:, 2] <= height))
    slope = abs(np.ptp(upper) - np.ptp(lower)) if len(upper) and len(lower) else 0.0  # fingers slip off inclined sides
    position = np.array([*middle, height])
    return Grasp(position, yaw, 0.3 * abs(yaw) + 4.0 * width + 20.0 * slope + crowding(position, yaw, others))


def rim(points: Points, others: Points, angle: float, height: float) -> Grasp:
    """The grasp of a hollow object's wall in direction `angle` from its middle, one finger inside."""
    middle = (points[:, :2].max(axis=0) + points[:, :2].min(axis=0)) / 2
    out = np.array([np.cos(angle), np.sin(angle)])
    yaw = float((angle - np.pi / 2 + np.pi / 2) % np.pi - np.pi / 2)  # fingers move along the radius
    near = points[(np.abs((points[:, :2] - middle) @ np.array([-out[1], out[0]])) < 0.012) & (points[:, 2] > height - 0.005)]
    radius = ((near[:, :2] - middle) @ out).max() if len(near) else 0.05
    position = np.array([*(middle + (radius - 0.004) * out), height])
    return Grasp(position, yaw, 0.3 * abs(yaw) + crowding(position, yaw, others))


def crowding(position: Points, yaw: float, others: Points) -> float:
    """What stands where the fingers or the hand would be: 0 for nothing, up to 4."""
    if len(others) == 0:
        return 0.0
    u, v = directions(yaw)
    offset = others - position
    along, side, up = np.abs(offset[:, :2] @ u), np.abs(offset[:, :2] @ v), offset[:, 2]
    fingers = (along < FINGER_OUT) & (side < FINGER_HALF) & (up > -TIP) & (up < HAND)
    hand = (along < HAND_HALF[0]) & (side < HAND_HALF[1]) & (up >= HAND) & (up < HAND + 0.1)
    return float(min(int(fingers.sum()) / 4, 2.0) + min(int(hand.sum()) / 4, 2.0))
