"""Offscreen frames of a MuJoCo model without a display, and what its fingers touch: shared by the MuJoCo simulators."""

from __future__ import annotations

from collections.abc import Callable

import mujoco

from world2act.types import ImageArray

LOWEST_SPREAD = 8.0  # standard deviation of grey levels; a healthy primary frame has 40 or more, a corrupt one is flat
RENDERER_ATTEMPTS = 3


def open_renderer(model: mujoco.MjModel, size: int, effects: bool = False) -> mujoco.Renderer:
    """A size x size renderer; `effects`: with shadows and reflections."""
    renderer = mujoco.Renderer(model, size, size)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = effects
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = effects
    return renderer


def close_renderer(renderer: mujoco.Renderer) -> None:
    """Free a renderer. `Renderer.close` frees textures and buffers by number in whatever context is current: without making
    its own current first, it deletes another renderer's, which from then on returns corrupt frames in silence.
    """
    renderer._gl_context.make_current()
    renderer.close()


def first_frames(
    open_one: Callable[[], mujoco.Renderer], shoot: Callable[[mujoco.Renderer], dict[str, ImageArray]], what: str
) -> tuple[mujoco.Renderer, dict[str, ImageArray]]:
    """A new renderer and its first frames. One whose primary frame is flat is corrupt (OSMesa says nothing): another is opened.

    Raises RuntimeError naming `what` after RENDERER_ATTEMPTS of them.
    """
    for _ in range(RENDERER_ATTEMPTS):
        renderer = open_one()
        images = shoot(renderer)
        if images["primary"].std() >= LOWEST_SPREAD:
            return renderer, images
        close_renderer(renderer)
    raise RuntimeError(f"renderer: the image of {what} stayed flat after {RENDERER_ATTEMPTS} attempts")


def touch_and_joints(model: mujoco.MjModel, data: mujoco.MjData, left: set[int], right: set[int]) -> dict[str, float]:
    """What a scene's movable things do: see Environment.truth. `left` and `right` are the fingers' bodies.

    Movable is every body with a joint outside the arm's kinematic tree.
    """
    arm = model.body_rootid[next(iter(left))]
    touched: tuple[set[int], set[int]] = (set(), set())
    for first, second in model.geom_bodyid[data.contact.geom]:
        for ours, other in ((int(first), int(second)), (int(second), int(first))):
            for finger, found in zip((left, right), touched, strict=True):
                if ours in finger:
                    found.add(other)
    truth: dict[str, float] = {}
    for joint in range(model.njnt):
        body = int(model.jnt_bodyid[joint])
        if model.body_rootid[body] == arm:
            continue
        name = model.body(body).name or f"body {body}"
        truth[f"touch/{name}"] = float(sum(body in found for found in touched))
        if model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE:
            truth[f"height/{name}"] = float(data.xpos[body, 2])
        else:
            truth[f"joint/{name}"] = float(data.qpos[model.jnt_qposadr[joint]])
    return truth
