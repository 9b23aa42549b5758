"""Data sets in other projects' layouts, written here byte by byte as their own tools do, with nothing of world2act.data.

`raw` is a tiny world whose truth is known: T actions, T + 1 moments. What is seen at moment t shows t; action t carries t;
the fingers close while the gripper action is +1 and open while it is -1, and each move is visible in the next moment.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np

SIZE = 32  # pixels; the number of a moment is an 8 x 8 patch in the upper left corner, the rest tells top from bottom
LEVELS = 6  # grey levels between two moments: more than video loses
OPEN = 0.08  # metres


@dataclass(frozen=True)
class Raw:
    """images (T+1, H, W, 3); widths (T+1,); pose (T+1, 6); actions (T, A): column 0 is t / 100, column 6 the gripper."""

    images: np.ndarray
    widths: np.ndarray
    pose: np.ndarray
    actions: np.ndarray
    instruction: str

    @property
    def steps(self) -> int:
        return len(self.actions)

    def camera(self, number: int) -> np.ndarray:
        """Camera `number`'s images: the same with another tint at the bottom."""
        images = self.images.copy()
        images[:, -8:] = 60 + 60 * number
        return images

    def step_shown(self, image: np.ndarray, number: int, tolerance: int) -> int:
        """The moment that an upright image of camera `number` shows."""
        assert abs(float(image[-8:].mean()) - (60 + 60 * number)) <= tolerance + 1, "upside down, or another camera"
        level = float(image[1:7, 1:7].mean())
        assert abs(level / LEVELS - round(level / LEVELS)) * LEVELS <= tolerance + 0.01
        return round(level / LEVELS)

    def step_of_action(self, action: np.ndarray) -> int:
        return round(float(action[0]) * 100)


def raw(seed: int, action_size: int, steps: int = 16) -> Raw:
    """A world of `steps` actions. `action_size` 0 stands for a format without actions."""
    rng = np.random.default_rng(seed)
    images = np.full((steps + 1, SIZE, SIZE, 3), 200, np.uint8)
    for t in range(steps + 1):
        images[t, :8, :8] = LEVELS * t
    actions = rng.uniform(-0.9, 0.9, (steps, max(action_size, 7)))
    actions[:, 0] = np.arange(steps) / 100
    actions[:, 6] = np.where(np.arange(steps) % 8 < 4, 1, -1)
    widths = OPEN - 0.01 * np.concatenate([[0], np.cumsum(actions[:, 6])])
    pose = rng.normal(size=(steps + 1, 6))
    return Raw(images, widths, pose, actions, f"pick up thing {seed}")


def fingers(widths: np.ndarray) -> np.ndarray:
    """A Panda's two finger positions (N, 2): of opposite sign, each half the width."""
    return np.stack([widths / 2, -widths / 2], axis=1)


def damage_hdf5(name: str) -> Callable[[Path], None]:
    """Overwrites the stored, compressed chunks of demo_1's actions: opens, but cannot be read."""

    def damage(path: Path) -> None:
        with h5py.File(path if path.is_file() else path / name) as file:
            info = file["data/demo_1/actions"].id.get_chunk_info(0)
        with (path if path.is_file() else path / name).open("r+b") as raw_file:
            raw_file.seek(info.byte_offset)
            raw_file.write(bytes(info.size))

    return damage


def _put(group: h5py.Group, key: str, values: Any) -> None:
    values = np.asarray(values)
    group.create_dataset(key, data=values, compression="gzip", chunks=values.shape)


def write_own(folder: Path, episodes: list[Raw]) -> Path:
    """Our own layout (world2act/data/robomimic.py): obs before the action, and the observation after the last one apart."""
    env_args = {
        "env_name": "pick-place",
        "simulator": "metaworld",
        "control_hz": 20.0,
        "chunk": 4,
        "cameras": {"primary": 0, "wrist": 1},
        "gripper_open_width": OPEN,
        "gripper_width_index": 3,
    }
    with h5py.File(folder / "own.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs.update({"split": "worldmodel", "env_args": json.dumps(env_args), "total": 0})
        for i, e in enumerate(episodes):
            demo = data.create_group(f"demo_{i}")
            demo.attrs.update({"num_samples": e.steps, "index": i, "task": "pick-place", "success": True, "perturbed": False})
            demo.attrs["instruction"] = e.instruction
            state = np.concatenate([e.pose, fingers(e.widths)], axis=1).astype(np.float32)
            _put(demo, "actions", e.actions.astype(np.float32))
            for camera in (0, 1):
                key = ("primary", "wrist")[camera] + "_image"
                _put(demo, f"obs/{key}", e.camera(camera)[:-1])
                demo[f"final_obs/{key}"] = e.camera(camera)[-1]
            for key, values in (("state", state), ("gripper_width", e.widths.astype(np.float32))):
                demo[f"obs/{key}"], demo[f"final_obs/{key}"] = values[:-1], values[-1]
    return folder


def write_libero(folder: Path, episodes: list[Raw]) -> Path:
    """As LIBERO's create_dataset.py: obs[j] recorded after actions[j]; images upside down; doubles."""
    for i, e in enumerate(episodes):  # one instruction a file, so here one file an episode
        with h5py.File(folder / f"pick_{i}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"problem_name": "libero_floor", "language_instruction": e.instruction})
            data.attrs["bddl_file_name"] = f"bddl_files/libero_object/pick_{i}.bddl"
            data.attrs["macros_image_convention"] = "opengl"
            data.attrs["env_args"] = json.dumps({"type": 1, "env_kwargs": {"control_freq": 20}})
            libero_demo(data.create_group(f"demo_{i}"), e)
    return folder


def libero_demo(demo: h5py.Group, e: Raw) -> None:
    """One demonstration as LIBERO records it."""
    _put(demo, "actions", e.actions)
    after = slice(1, None)
    for camera, key in enumerate(("agentview_rgb", "eye_in_hand_rgb")):
        _put(demo, f"obs/{key}", e.camera(camera)[after, ::-1])
    _put(demo, "obs/gripper_states", fingers(e.widths)[after])
    _put(demo, "obs/ee_states", e.pose[after])
    _put(demo, "obs/joint_states", np.zeros((e.steps, 7)))
    rewards = np.zeros(e.steps, np.uint8)
    rewards[-1] = 1
    _put(demo, "rewards", rewards)
    demo.attrs["num_samples"] = e.steps


ROBOCASA_OBS = ("robot0_base_pos", "robot0_base_quat", "robot0_base_to_eef_pos", "robot0_base_to_eef_quat")


def write_robocasa(folder: Path, episodes: list[Raw]) -> Path:
    """As RoboCasa v0.x: obs[t] before actions[t], nothing after the last; images upright; order eef, gripper, base, mode."""
    with h5py.File(folder / "demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "PnPCounterToCab", "env_kwargs": {"control_freq": 20}})
        for i, e in enumerate(episodes):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["ep_meta"] = json.dumps({"layout_id": 1, "lang": e.instruction})
            _put(demo, "actions", e.actions)
            for camera, key in enumerate(("agentview_left", "agentview_right", "eye_in_hand")):
                _put(demo, f"obs/robot0_{key}_image", e.camera(camera)[:-1])
            for key, size in zip(ROBOCASA_OBS, (3, 4, 3, 4), strict=True):
                _put(demo, f"obs/{key}", np.full((e.steps, size), float(size)))
            _put(demo, "obs/robot0_gripper_qpos", fingers(e.widths)[:-1])
    return folder / "demo.hdf5"


def write_video(path: Path, frames: np.ndarray, fps: int = 20) -> None:
    """H.264, as all these projects' mp4 files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


ROBOCASA_VIDEOS = tuple(f"observation.images.robot0_{c}" for c in ("agentview_left", "agentview_right", "eye_in_hand"))


def robocasa365_rows(e: Raw, index: int, episodes: int) -> dict[str, Any]:
    """An episode's parquet columns. Actions: base 0:4, mode 4, position 5:8, rotation 8:11, gripper 11."""
    n = e.steps
    a = e.actions  # in v0.x order: position 0:3, rotation 3:6, gripper 6, base 7:11, mode 11
    action = np.concatenate([a[:, 7:11], a[:, 11:12], a[:, 0:3], a[:, 3:6], a[:, 6:7]], axis=1)
    state = np.concatenate([np.zeros((n, 14)), fingers(e.widths)[:-1]], axis=1)
    columns = {"observation.state": list(state), "action": list(action), "timestamp": (np.arange(n) / 20).astype(np.float32)}
    columns |= {"frame_index": np.arange(n), "episode_index": np.full(n, index), "index": np.arange(n)}
    return columns | {"task_index": np.full(n, index), "annotation.human.task_name": np.full(n, episodes)}


def robocasa365_info(version: str, episodes: list[Raw]) -> dict[str, Any]:
    """meta/info.json, without its templates."""
    features: dict[str, Any] = {k: {"dtype": "video", "shape": [SIZE, SIZE, 3]} for k in ROBOCASA_VIDEOS}
    features |= {"observation.state": {"dtype": "float64", "shape": [16]}, "action": {"dtype": "float64", "shape": [12]}}
    return {
        "codebase_version": version,
        "robot_type": "PandaOmron",
        "total_episodes": len(episodes),
        "fps": 20,
        "chunks_size": 1000,
        "features": features,
    }


def write_lerobot_v2(folder: Path, episodes: list[Raw]) -> Path:
    """RoboCasa365 as it is published: LeRobot v2.1, a parquet file and a video a camera for each episode."""
    import pandas as pd

    (folder / "meta").mkdir()
    (folder / "data/chunk-000").mkdir(parents=True)
    info = robocasa365_info("v2.1", episodes)
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    (folder / "meta/info.json").write_text(json.dumps(info))
    tasks = [*(e.instruction for e in episodes), "PickPlaceCounterToCabinet"]
    lines = [json.dumps({"task_index": i, "task": t}) for i, t in enumerate(tasks)]
    (folder / "meta/tasks.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"episode_index": i, "tasks": [e.instruction], "length": e.steps}) for i, e in enumerate(episodes)]
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines))
    for i, e in enumerate(episodes):
        pd.DataFrame(robocasa365_rows(e, i, len(episodes))).to_parquet(folder / f"data/chunk-000/episode_{i:06d}.parquet")
        for camera, key in enumerate(ROBOCASA_VIDEOS):
            write_video(folder / f"videos/chunk-000/{key}/episode_{i:06d}.mp4", e.camera(camera)[:-1])
    return folder


def damage_lerobot_v2(folder: Path) -> None:
    """Cuts one of episode 1's videos short."""
    video = folder / f"videos/chunk-000/{ROBOCASA_VIDEOS[2]}/episode_000001.mp4"
    video.write_bytes(video.read_bytes()[:300])


def write_lerobot_v3(folder: Path, episodes: list[Raw]) -> Path:
    """The same as LeRobot v3.0: all episodes in one parquet file and one video a camera."""
    import pandas as pd

    info = robocasa365_info("v3.0", episodes)
    info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    for part in ("meta/episodes/chunk-000", "data/chunk-000"):
        (folder / part).mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    tasks = [*(e.instruction for e in episodes), "PickPlaceCounterToCabinet"]
    pd.DataFrame({"task_index": range(len(tasks))}, index=pd.Index(tasks, name="task")).to_parquet(folder / "meta/tasks.parquet")
    pd.concat(
        [pd.DataFrame(robocasa365_rows(e, i, len(episodes))) for i, e in enumerate(episodes)], ignore_index=True
    ).to_parquet(folder / "data/chunk-000/file-000.parquet")
    for camera, key in enumerate(ROBOCASA_VIDEOS):
        frames = np.concatenate([e.camera(camera)[:-1] for e in episodes])
        write_video(folder / f"videos/{key}/chunk-000/file-000.mp4", frames)
    rows, at = [], 0
    for i, e in enumerate(episodes):
        row: dict[str, Any] = {"episode_index": i, "tasks": [e.instruction], "length": e.steps}
        row |= {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": at, "dataset_to_index": at + e.steps}
        for key in ROBOCASA_VIDEOS:
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
            row |= {f"videos/{key}/from_timestamp": at / 20, f"videos/{key}/to_timestamp": (at + e.steps) / 20}
        rows.append(row)
        at += e.steps
    pd.DataFrame(rows).to_parquet(folder / "meta/episodes/chunk-000/file-000.parquet")
    return folder


def damage_lerobot_v3(folder: Path) -> None:
    """Episode 1's metadata says a length that its rows do not have."""
    import pandas as pd

    file = folder / "meta/episodes/chunk-000/file-000.parquet"
    table = pd.read_parquet(file)
    table.loc[1, "length"] += 3
    table.to_parquet(file)


def write_clips(folder: Path, episodes: list[Raw]) -> Path:
    """The authors' layout, both ways of naming."""
    names = [f"PnPCounterToCab_mg_demo_{i}_aa_0" for i in range(len(episodes))]
    names[0] = "demo_7-pick_thing-pick_up_thing_0-order1"
    spans = {"PnPCounterToCab": {str(i): {"0": {"start": 4, "end": 20}} for i in range(1, len(episodes))}}
    for name, e in zip(names, episodes, strict=True):
        write_video(folder / f"videos/{name}.mp4", e.camera(0))
    lines = ["video,prompt", *(f"{n}.mp4,{e.instruction}" for n, e in zip(names, episodes, strict=True))]
    (folder / "metadata.csv").write_text("\n".join(lines))
    (folder / "video_metadata.json").write_text(json.dumps(spans))
    return folder


def damage_clips(folder: Path) -> None:
    """One clip is no video."""
    (folder / "videos/PnPCounterToCab_mg_demo_1_aa_0.mp4").write_bytes(b"no video" * 100)
