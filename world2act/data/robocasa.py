"""RoboCasa v0.1 / v0.2 HDF5 (one file per task; robomimic's layout, images rendered by RoboCasa's dataset_states_to_obs.py).

/data             attrs: env_args (JSON: env_name, env_kwargs.control_freq)
/data/demo_<i>    attrs: ep_meta (JSON: lang); actions (N, 12); obs/robot0_{agentview_left,agentview_right,eye_in_hand}_image
                  (N, H, W, 3) u8, upright; obs/robot0_gripper_qpos (N, 2), the fingers, of opposite sign;
                  obs/robot0_base_pos 3, robot0_base_quat 4, robot0_base_to_eef_pos 3, robot0_base_to_eef_quat 4;
                  datagen_info/{eef_pose, object_poses/<name>} (N, 4, 4): optional, MimicGen's

obs[t] is rendered from the state *before* actions[t]. The state after the last action is not in the file, so that action is
left out. All files hold successful demonstrations only.

One layout for RoboCasa, whatever its version: actions in the order of v0.x, which is that of `env.step` (ACTION), states in the
order of RoboCasa365 (STATE). RoboCasa365's LeRobot files keep actions in another order (COLUMNS_365): `from_365`, `to_365`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from world2act.data import hdf5
from world2act.data.formats import FormatError
from world2act.types import Episode, FloatArray

CAMERAS = {"left": "robot0_agentview_left", "right": "robot0_agentview_right", "wrist": "robot0_eye_in_hand"}
ACTION = {"end_effector_position": 3, "end_effector_rotation": 3, "gripper_close": 1, "base_motion": 4, "control_mode": 1}
"""RoboCasa365's names for the parts of an action, in v0.x's order, with their sizes."""
STATE = {
    "base_position": ("robot0_base_pos", 3),
    "base_rotation": ("robot0_base_quat", 4),
    "end_effector_position_relative": ("robot0_base_to_eef_pos", 3),
    "end_effector_rotation_relative": ("robot0_base_to_eef_quat", 4),
    "gripper_qpos": ("robot0_gripper_qpos", 2),
}
"""RoboCasa365's names for the parts of a state, in its order, with v0.x's keys and their sizes."""
ACTION_SIZE = sum(ACTION.values())


GRIPPER = 6
"""Where the gripper is in v0.x's order."""


def columns_of(sizes: Mapping[str, int]) -> dict[str, slice]:
    """Where each part is, in the order given."""
    ends = np.cumsum(list(sizes.values())).tolist()
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


COLUMNS = columns_of(ACTION)
"""Where the parts of an action are in v0.x and here."""
ORDER_365 = ("base_motion", "control_mode", "end_effector_position", "end_effector_rotation", "gripper_close")
COLUMNS_365 = columns_of({name: ACTION[name] for name in ORDER_365})
"""Where they are in RoboCasa365's LeRobot files (its PandaOmron_modality.json)."""


def from_365(actions: FloatArray, columns: Mapping[str, slice] = COLUMNS_365) -> FloatArray:
    """Actions (..., 12) in RoboCasa365's order, or with their parts at `columns`, in v0.x's order."""
    return np.concatenate([actions[..., columns[name]] for name in ACTION], axis=-1)


def to_365(actions: FloatArray) -> FloatArray:
    """The inverse: actions (..., 12) in v0.x's order in RoboCasa365's."""
    return np.concatenate([actions[..., COLUMNS[name]] for name in ORDER_365], axis=-1)


def commands(gripper: npt.NDArray[Any]) -> FloatArray:
    """Gripper actions (N,) as the commands that led to each frame: frame 0 comes before action 0, with an opening hand."""
    return np.clip(np.concatenate([[-1.0], gripper[:-1]]), -1, 1).astype(np.float32)


CONTROL_HZ = 20.0  # robosuite's default


def columns(parts: dict[str, int]) -> str:
    """What an episode's meta says of its columns: "name:size name:size ..."."""
    return " ".join(f"{name}:{size}" for name, size in parts.items())


META = {"action": columns(ACTION), "state": columns({name: size for name, (_, size) in STATE.items()})}


class RobocasaSource(hdf5.Hdf5Source):
    """See the module. Episode.index is the demonstration's number; cameras left, right, wrist."""

    name = "robocasa"
    signs = "HDF5 whose demonstrations have the attribute ep_meta or images obs/robot0_agentview_*_image"

    @classmethod
    def detect_file(cls, file: h5py.File) -> bool:
        demo = next(iter(file["data"].values()), None)
        if not isinstance(demo, h5py.Group):
            return False
        return "ep_meta" in demo.attrs or any(k.startswith("robot0_agentview_") for k in demo.get("obs", ()))

    def _demo(self, group: h5py.Group, path: Path, images: bool) -> Episode:
        actions = hdf5.array(group, "actions", "float", path)
        if actions.ndim != 2 or actions.shape[1] != ACTION_SIZE:
            raise FormatError(f"{path.name}: {group.name}/actions: shape must be (N, {ACTION_SIZE}), got {actions.shape}")
        rows = len(actions)
        state = {n: hdf5.rows(group, f"obs/{k}", (rows, size), "float", path) for n, (k, size) in STATE.items()}
        seen = {c: f"obs/{k}_image" for c, k in CAMERAS.items() if images}
        env_args = hdf5.json_attr(group.parent, "env_args", path)
        language = hdf5.json_attr(group, "ep_meta", path).get("lang")
        if not isinstance(language, str) or not language.strip():
            raise FormatError(f"{path.name}: {group.name}: ep_meta.lang: is missing or empty")
        return Episode(
            task=str(env_args.get("env_name") or path.stem),
            split=str(self.split),
            index=int(group.name.rsplit("_", 1)[1]),
            instruction=language.strip(),
            images={c: hdf5.rows(group, k, (rows, None, None, 3), np.uint8, path) for c, k in seen.items()},
            states=np.concatenate(list(state.values()), axis=1),
            widths=np.abs(state["gripper_qpos"]).sum(axis=1),
            actions=actions[:-1],
            success=True,
            meta={"fps": f"{hdf5.control_hz(env_args, CONTROL_HZ, path):g}", **META},
            cues={"command": commands(actions[:, GRIPPER]), **_places(group, rows, path)},
        )


def _places(group: h5py.Group, rows: int, path: Path) -> dict[str, FloatArray]:
    """Where hand and objects are, if MimicGen wrote it: cues "hand" and "object/<name>"."""
    if "datagen_info" not in set(group):
        return {}
    info = hdf5.item(group, "datagen_info", h5py.Group, path)
    if not {"eef_pose", "object_poses"} <= set(info):
        return {}
    objects = hdf5.item(info, "object_poses", h5py.Group, path)
    keys = {"hand": "eef_pose", **{f"object/{name}": f"object_poses/{name}" for name in objects}}
    return {cue: hdf5.rows(info, key, (rows, 4, 4), "float", path)[:, :3, 3] for cue, key in keys.items()}
