"""How another policy sees the robots that we know: one declared table a policy and robot, checked before use.

layouts.json holds the presets, a user's own file has the same form. A table says, for each of the policy's cameras, which of
ours it is; for each of its state vectors, which columns of our state in which form; for each of its action vectors, which
components of our action. It is read in both directions: towards a policy elsewhere (services/vla/policies/), and for the clients
of others that talk to us (services/vla/doors/).

Forms of a state part (ours -> theirs): as_is; fingers (the gripper's width -> two finger positions of opposite sign); quaternion
(axis times angle -> x, y, z, w); axis_angle (the reverse); world_position and world_rotation (base pose and pose relative to it,
14 columns, -> the end effector in the world). Forms of an action part (theirs -> ours): as_is; open01 (1 opens, 0 closes -> -1,
1) and close01 (1 closes, 0 opens -> 1, -1), both made binary, as the published evaluations of such policies do.
"""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from world2act.types import FloatArray, ImageArray

PRESETS = Path(__file__).with_name("layouts.json")
Array = npt.NDArray[Any]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Robot(Strict):
    """Our side: cameras -> cell of the 2x2 grid, S, the limits of A action components, and what those do that no policy moves."""

    cameras: dict[str, int] = Field(min_length=1, max_length=4)
    state: int = Field(ge=1, le=1000)
    low: list[float] = Field(min_length=1, max_length=1000)
    high: list[float]
    rest: list[float] = []

    @model_validator(mode="after")
    def _consistent(self) -> Robot:
        if sorted(set(self.cameras.values())) != sorted(self.cameras.values()) or not set(self.cameras.values()) <= {0, 1, 2, 3}:
            raise ValueError("cameras: each needs a cell of its own out of 0, 1, 2, 3")
        if len(self.high) != len(self.low) or any(a >= b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError("low, high: need as many high as low limits, each above its low one")
        if self.rest and len(self.rest) != len(self.low):
            raise ValueError(f"rest: needs {len(self.low)} numbers, got {len(self.rest)}")
        return self


class CameraPart(Strict):
    """One of the policy's images: our camera `ours`, `height` x `width` pixels; mirrored: left and right changed over."""

    ours: str
    height: int = Field(ge=8, le=4096)
    width: int = Field(ge=8, le=4096)
    mirrored: bool = False


StateForm = Literal["as_is", "fingers", "quaternion", "axis_angle", "world_position", "world_rotation"]
WIDTHS: dict[str, tuple[int, int]] = {
    "fingers": (1, 2),
    "quaternion": (3, 4),
    "axis_angle": (4, 3),
    "world_position": (14, 3),
    "world_rotation": (14, 4),
}
"""Form -> columns of ours, numbers of theirs."""


class StatePart(Strict):
    """`size` columns of our state from `start` on, in a form."""

    start: int = Field(ge=0)
    size: int = Field(ge=1)
    form: StateForm = "as_is"

    @model_validator(mode="after")
    def _consistent(self) -> StatePart:
        if self.form in WIDTHS and self.size != WIDTHS[self.form][0]:
            raise ValueError(f"size: form {self.form} takes {WIDTHS[self.form][0]} columns, got {self.size}")
        return self

    @property
    def theirs(self) -> int:
        """How many of their numbers it makes."""
        return WIDTHS[self.form][1] if self.form in WIDTHS else self.size


class ActionPart(Strict):
    """`size` components of our action from `start` on, out of as many of theirs."""

    start: int = Field(ge=0)
    size: int = Field(ge=1)
    form: Literal["as_is", "open01", "close01"] = "as_is"


class Dialect(Strict):
    """A policy's side of a table. instruction: the name it gives the instruction; horizon: actions in one answer."""

    cameras: dict[str, CameraPart] = Field(min_length=1)
    state: dict[str, list[StatePart]] = Field(min_length=1)
    actions: dict[str, list[ActionPart]] = Field(min_length=1)
    instruction: str = Field(min_length=1)
    horizon: int = Field(ge=1, le=1000)


class Layout(Strict):
    """A whole table. Raises ValidationError (a ValueError) naming the field that does not fit."""

    robot: Robot
    policy: Dialect

    @model_validator(mode="after")
    def _consistent(self) -> Layout:
        for name, camera in self.policy.cameras.items():
            if camera.ours not in self.robot.cameras:
                raise ValueError(f"policy.cameras.{name}: camera {camera.ours!r} is not one of {', '.join(self.robot.cameras)}")
        for name, parts in self.policy.state.items():
            for part in parts:
                if part.start + part.size > self.robot.state:
                    end = part.start + part.size
                    raise ValueError(
                        f"policy.state.{name}: columns {part.start}:{end} are beyond the {self.robot.state} of the state"
                    )
        moved: set[int] = set()
        for name, actions in self.policy.actions.items():
            for each in actions:
                indices = set(range(each.start, each.start + each.size))
                if each.start + each.size > self.size or moved & indices:
                    raise ValueError(
                        f"policy.actions.{name}: components {sorted(indices)} are taken already or beyond {self.size}"
                    )
                moved |= indices
        if len(moved) < self.size and not self.robot.rest:
            raise ValueError(
                f"robot.rest: components {sorted(set(range(self.size)) - moved)} are moved by no part and rest nowhere"
            )
        return self

    @property
    def size(self) -> int:
        """A, components of our action."""
        return len(self.robot.low)

    @cached_property
    def action_sizes(self) -> dict[str, int]:
        """Their action vectors -> how many numbers each has."""
        return {name: sum(part.size for part in parts) for name, parts in self.policy.actions.items()}

    @cached_property
    def state_sizes(self) -> dict[str, int]:
        """Their state vectors -> how many numbers each has."""
        return {name: sum(part.theirs for part in parts) for name, parts in self.policy.state.items()}

    def images(self, grid: ImageArray) -> dict[str, ImageArray]:
        """Our camera grid (2h, 2w, 3) -> their images by name."""
        height, width = grid.shape[0] // 2, grid.shape[1] // 2
        images = {}
        for name, camera in self.policy.cameras.items():
            row, column = divmod(self.robot.cameras[camera.ours], 2)
            view = grid[row * height : (row + 1) * height, column * width : (column + 1) * width]
            images[name] = fit(mirror(view, camera.mirrored), camera.height, camera.width)
        return images

    def our_images(self, images: dict[str, ImageArray], height: int, width: int) -> dict[str, ImageArray]:
        """Their images by name -> ours of `height` x `width`. Raises ValueError naming a camera that is missing or odd."""
        found = {}
        for name, camera in self.policy.cameras.items():
            if name not in images:
                raise ValueError(f"camera {name!r} is missing; needed are {', '.join(self.policy.cameras)}")
            image = images[name]
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                shape = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
                raise ValueError(f"camera {name!r}: must be uint8 (height, width, 3), got {shape}")
            if not 8 <= min(image.shape[:2]) <= max(image.shape[:2]) <= 4096:
                raise ValueError(f"camera {name!r}: must have 8 to 4096 pixels a side, got {image.shape}")
            found[camera.ours] = fit(mirror(image, camera.mirrored), height, width)
        return found

    def states(self, state: FloatArray) -> dict[str, FloatArray]:
        """Our state (S,) -> their state vectors by name, float32."""
        return {
            name: np.concatenate([their_state(part.form, state[part.start : part.start + part.size]) for part in parts])
            for name, parts in self.policy.state.items()
        }

    def our_state(self, states: dict[str, Array]) -> FloatArray:
        """Their state vectors by name -> our state float32 (S,). Raises ValueError naming one that is missing or odd."""
        state = np.zeros(self.robot.state, np.float32)
        for name, parts in self.policy.state.items():
            if name not in states:
                raise ValueError(f"state {name!r} is missing; needed are {', '.join(self.policy.state)}")
            vector = states[name]
            if not isinstance(vector, np.ndarray) or vector.shape != (self.state_sizes[name],) or vector.dtype.kind not in "fiu":
                shape = f"{vector.dtype} {vector.shape}" if isinstance(vector, np.ndarray) else type(vector).__name__
                raise ValueError(f"state {name!r}: must be {self.state_sizes[name]} numbers, got {shape}")
            at = 0
            for part in parts:
                state[part.start : part.start + part.size] = our_state(
                    part.form, vector[at : at + part.theirs].astype(np.float32)
                )
                at += part.theirs
        return state

    def check_reversible(self) -> None:
        """Raises ValueError unless a client's observation, in this table's terms, says all of our cameras and state."""
        seen = {camera.ours for camera in self.policy.cameras.values()}
        unseen = [camera for camera in self.robot.cameras if camera not in seen]
        parts = [part for parts in self.policy.state.values() for part in parts]
        said = {i for part in parts if not part.form.startswith("world") for i in range(part.start, part.start + part.size)}
        unsaid = sorted(set(range(self.robot.state)) - said)
        if unseen or unsaid:
            raise ValueError(
                f"layout: clients would say nothing of cameras {unseen} and state columns {unsaid}; it serves no door"
            )

    def our_actions(self, actions: dict[str, Array]) -> FloatArray:
        """Their action vectors by name, each (H, n) -> ours float32 (H, A). Raises ValueError naming what is missing or odd."""
        rows = -1
        rest = np.array(self.robot.rest or np.zeros(self.size), np.float32)
        columns: list[tuple[ActionPart, Array]] = []
        for name, parts in self.policy.actions.items():
            if name not in actions:
                raise ValueError(f"action {name!r} is missing; answered were {', '.join(map(str, actions))[:200] or 'none'}")
            values, size = actions[name], self.action_sizes[name]
            if (
                not isinstance(values, np.ndarray)
                or values.ndim != 2
                or values.shape[1] != size
                or values.dtype.kind not in "fiu"
            ):
                shape = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
                raise ValueError(f"action {name!r}: must be (horizon, {size}) numbers, got {shape}")
            if rows not in (-1, len(values)):
                raise ValueError(f"action {name!r}: has {len(values)} rows, others {rows}")
            rows, at = len(values), 0
            for part in parts:
                columns.append((part, values[:, at : at + part.size].astype(np.float32)))
                at += part.size
        ours = np.tile(rest, (rows, 1))
        for part, values in columns:
            ours[:, part.start : part.start + part.size] = our_action(part.form, values)
        return ours

    def their_actions(self, actions: FloatArray) -> dict[str, FloatArray]:
        """Our actions (H, A) -> their action vectors by name, float32 (H, n)."""
        return {
            name: np.concatenate([their_action(p.form, actions[:, p.start : p.start + p.size]) for p in parts], axis=1)
            for name, parts in self.policy.actions.items()
        }


def mirror(image: ImageArray, mirrored: bool) -> ImageArray:
    """Left and right changed over, if `mirrored`."""
    return np.ascontiguousarray(image[:, ::-1]) if mirrored else image


def fit(image: ImageArray, height: int, width: int) -> ImageArray:
    """Scaled to fit into `height` x `width`, black beside it where the shape differs: never cropped, never stretched."""
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return np.ascontiguousarray(image)
    ratio = max(h / height, w / width)
    inner = (max(1, round(h / ratio)), max(1, round(w / ratio)))
    small = np.asarray(Image.fromarray(image).resize((inner[1], inner[0]), Image.Resampling.BILINEAR))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    fitted = np.zeros((height, width, 3), np.uint8)
    fitted[top : top + inner[0], left : left + inner[1]] = small
    return fitted


def their_state(form: str, values: FloatArray) -> FloatArray:
    """Columns of our state in a part's form."""
    if form == "fingers":
        return np.array([values[0] / 2, -values[0] / 2], np.float32)
    if form == "quaternion":
        return quaternion(values)
    if form == "axis_angle":
        return axis_angle(values)
    if form in ("world_position", "world_rotation"):
        position, base, relative, turn = values[:3], values[3:7], values[7:10], values[10:14]
        return multiply(base, turn) if form == "world_rotation" else (position + rotate(base, relative)).astype(np.float32)
    return values


def our_state(form: str, values: FloatArray) -> FloatArray:
    """The reverse of `their_state`, for forms that have one."""
    if form == "fingers":
        return np.array([abs(values[0]) + abs(values[1])], np.float32)
    return axis_angle(values) if form == "quaternion" else quaternion(values) if form == "axis_angle" else values


def our_action(form: str, values: FloatArray) -> FloatArray:
    """Their components as ours; the two gripper forms become -1 or 1 (-1 opens)."""
    if form == "open01":
        return np.where(values > 0.5, -1.0, 1.0).astype(np.float32)
    return np.where(values < 0.5, -1.0, 1.0).astype(np.float32) if form == "close01" else values


def their_action(form: str, values: FloatArray) -> FloatArray:
    """Our components as theirs; not made binary: their client does that."""
    return (1.0 - values) / 2.0 if form == "open01" else (1.0 + values) / 2.0 if form == "close01" else values


def quaternion(vector: FloatArray) -> FloatArray:
    """Axis times angle (3,) -> x, y, z, w. An angle above pi gives w < 0, so that `axis_angle` gives it back."""
    angle = float(np.linalg.norm(vector))
    scale = np.sin(angle / 2) / angle if angle > 1e-9 else 0.5
    return np.array([*(vector * scale), np.cos(angle / 2)], np.float32)


def axis_angle(xyzw: FloatArray) -> FloatArray:
    """x, y, z, w -> axis times angle in [0, 2 pi], as robosuite's quat2axisangle, which published LIBERO policies know."""
    w = float(np.clip(xyzw[3], -1.0, 1.0))
    length = np.sqrt(1.0 - w * w)
    return np.zeros(3, np.float32) if length < 1e-9 else (2.0 * np.arccos(w) / length * xyzw[:3]).astype(np.float32)


def multiply(a: FloatArray, b: FloatArray) -> FloatArray:
    """The rotation b, then a; x, y, z, w."""
    u, v = a[:3].astype(float), b[:3].astype(float)
    return np.array([*(a[3] * v + b[3] * u + np.cross(u, v)), a[3] * b[3] - u @ v], np.float32)


def rotate(xyzw: FloatArray, vector: FloatArray) -> Array:
    """`vector` (3,) turned."""
    u = xyzw[:3].astype(float)
    return np.asarray(vector + 2.0 * np.cross(u, np.cross(u, vector) + float(xyzw[3]) * vector))


@lru_cache(maxsize=32)
def load(name: str, policy: str) -> Layout:
    """The table of `policy` for a preset robot, or out of a .json file: {"robot": preset's name or Robot, "policy": Dialect}.

    Raises ValueError that names the file or preset and the field.
    """
    presets = json.loads(PRESETS.read_text())
    if name.endswith(".json"):
        try:
            content = json.loads(Path(name).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"layout: {name}: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"layout: {name}: must be a map with robot and policy")
        if isinstance(content.get("robot"), str):
            content = {**content, "robot": presets["robots"].get(content["robot"])}
    else:
        known = presets["policies"].get(policy, {})
        if name not in known:
            raise ValueError(f"layout: {name[:80]!r} is unknown for {policy}; choose one of {', '.join(known)}, or a .json file")
        content = {"robot": presets["robots"][name], "policy": known[name]}
    try:
        return Layout.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"layout: {name}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None
