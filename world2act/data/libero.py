"""LIBERO's own HDF5 (one file per task; LIBERO scripts/create_dataset.py says what is recorded when).

/data             attrs: problem_info (JSON: language_instruction), bddl_file_name, env_args (JSON: env_kwargs.control_freq),
                  macros_image_convention ("opengl": images are upside down, as in all published files)
/data/demo_<i>    actions (N, 7); obs/agentview_rgb, obs/eye_in_hand_rgb (N, H, W, 3) u8; obs/gripper_states (N, 2), the two
                  fingers' positions, of opposite sign; obs/ee_states (N, 6), position and axis-angle; rewards (N,)

obs[j] is recorded *after* actions[j], and nothing before actions[0] is. So actions[0] is left out, and action t of the episode
is the file's t + 1: N frames, N - 1 actions.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import h5py
import numpy as np

from world2act.data import hdf5
from world2act.data.formats import FormatError
from world2act.types import Episode

CAMERAS = {"primary": "agentview_rgb", "wrist": "eye_in_hand_rgb"}
ACTION = "ee_delta_pos:3 ee_delta_axis_angle:3 gripper:1"
STATE = "ee_pos:3 ee_axis_angle:3 gripper_qpos:2"
ACTION_SIZE = 7
CONTROL_HZ = 20.0  # of every published file


class LiberoSource(hdf5.Hdf5Source):
    """See the module. Episode.index is the demonstration's number; cameras primary, wrist; states as STATE, actions as ACTION."""

    name = "libero"
    signs = "HDF5 whose /data has the attribute problem_info or bddl_file_name"

    @classmethod
    def detect_file(cls, file: h5py.File) -> bool:
        return bool({"problem_info", "bddl_file_name"} & set(file["data"].attrs))

    def _demo(self, group: h5py.Group, path: Path, images: bool) -> Episode:
        data = group.parent
        actions = hdf5.array(group, "actions", "float", path)
        if actions.ndim != 2 or actions.shape[1] != ACTION_SIZE:
            raise FormatError(f"{path.name}: {group.name}/actions: shape must be (N, {ACTION_SIZE}), got {actions.shape}")
        rows = len(actions)
        fingers = hdf5.rows(group, "obs/gripper_states", (rows, 2), "float", path)
        pose = hdf5.rows(group, "obs/ee_states", (rows, 6), "float", path)
        flip = -1 if data.attrs.get("macros_image_convention", "opengl") == "opengl" else 1
        seen = {c: hdf5.rows(group, f"obs/{k}", (rows, None, None, 3), np.uint8, path) for c, k in CAMERAS.items() if images}
        env_args = hdf5.json_attr(data, "env_args", path) if "env_args" in data.attrs else {}
        rewards = hdf5.rows(group, "rewards", (rows,), "float", path) if "rewards" in group else np.ones(1)
        return Episode(
            task=_task(data, path),
            split=str(self.split),
            index=int(group.name.rsplit("_", 1)[1]),
            instruction=_instruction(data, path),
            images={camera: np.ascontiguousarray(image[:, ::flip]) for camera, image in seen.items()},
            states=np.concatenate([pose, fingers], axis=1),
            widths=np.abs(fingers).sum(axis=1),
            actions=actions[1:],
            success=bool(rewards.max(initial=0) > 0),
            meta={"fps": f"{hdf5.control_hz(env_args, CONTROL_HZ, path):g}", "state": STATE, "action": ACTION},
            cues={"command": np.clip(actions[:, 6], -1, 1), "hand": pose[:, :3]},
        )


def _task(data: h5py.Group, path: Path) -> str:
    """The benchmark's name of the task, that of its BDDL file."""
    bddl = data.attrs.get("bddl_file_name")
    return PurePosixPath(str(bddl)).stem if bddl else path.stem.removesuffix("_demo")


def _instruction(data: h5py.Group, path: Path) -> str:
    text = hdf5.json_attr(data, "problem_info", path).get("language_instruction")
    if not isinstance(text, str) or not text.strip():
        raise FormatError(f"{path.name}: /data: problem_info.language_instruction: is missing or empty")
    return text.strip()
