"""The segmenter's request on data of every format: times, prompts and reasons; what is wrong is named; memory is bounded."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from services.gateway.uploads import check_episode
from services.runtime.artifacts import ArtifactError, ArtifactStore
from services.segmenter.segment import run_request
from services.segmenter.settings import SegmenterSettings
from tests import foreign_data as foreign

PICK = "pick up the milk and place it in the basket"
STEPS = 40


class Desk:
    """A store, a data folder, and requests without a queue."""

    def __init__(self, folder: Path) -> None:
        self.store = ArtifactStore(f"file://{folder}/artifacts")
        self.data = folder / "data"
        self.data.mkdir()
        self.settings = SegmenterSettings(data_root=self.data)

    def upload(self, path: Path, **more: Any) -> dict[str, Any]:
        """As the gateway does it: checked as it stands, stored piece by piece, asked for by its name."""
        with path.open("rb") as file:
            check_episode(file, None)
            file.seek(0)
            name = self.store.put_file(file, "hdf5")
        return self.ask(episode_uri=name, **more)

    def ask(self, **request: Any) -> dict[str, Any]:
        return run_request(request, self.settings, self.store)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def grasp(action_size: int, held: float = 0.05, close: float = 1.0, instruction: str = PICK, seed: int = 0) -> foreign.Raw:
    """Open for 20 moments, then fingers at `held` metres to the end while the command is `close`."""
    world = foreign.raw(seed, action_size, STEPS)
    widths = np.r_[np.full(20, foreign.OPEN), np.full(STEPS - 19, held)]
    world.actions[:, 6] = np.where(np.arange(STEPS) < 19, -1.0, close)
    return replace(world, widths=widths, instruction=instruction)


def one(result: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in result and result["skipped"] == [], result
    (episode,) = result["episodes"]
    return dict(episode)


def check_pick(episode: dict[str, Any], onset: int) -> None:
    """Two skills; the first ends in the first whole chunk after the contact, of the hand that the data's robot has."""
    cut = -(-onset // 4) * 4
    assert [(s["prompt"], s["start"], s["end"]) for s in episode["skills"]] == [
        ("pick up the milk", 0, cut),
        ("place the milk in the basket", cut, (episode["length"]) // 4 * 4),
    ]
    assert f"frame {onset}" in episode["skills"][0]["reason"] and episode["fps"] == 20.0
    assert episode["skills"][0]["end_s"] == episode["skills"][1]["start_s"] == cut / 20
    assert max(episode["gripper_width_m"]) == foreign.OPEN and episode["discarded"] is None


def test_an_uploaded_libero_file(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "libero").mkdir()
    foreign.write_libero(tmp_path / "libero", [grasp(7)])
    result = desk.upload(tmp_path / "libero/pick_0_demo.hdf5")
    assert result["format"] == "libero" and result["statistics"]["sync_rate"] == 1.0
    episode = one(result)
    check_pick(episode, 19)  # LIBERO's first moment has no image: frames count from its second
    assert episode["demo"] == "demo_0" and episode["length"] == STEPS - 1


def test_an_uploaded_robocasa_file_and_one_of_its_demonstrations(desk: Desk, tmp_path: Path) -> None:
    path = foreign.write_robocasa(tmp_path, [grasp(12, seed=i) for i in range(3)])
    assert [e["demo"] for e in desk.upload(path)["episodes"]] == ["demo_0", "demo_1", "demo_2"]
    episode = one(desk.upload(path, demo="demo_2"))
    check_pick(episode, 20)
    assert episode["demo"] == "demo_2"
    assert desk.upload(path, demo="demo_9")["error"] == "demo: 'demo_9' is not in it; it has demo_0 to demo_2"


@pytest.mark.parametrize("write", [foreign.write_lerobot_v2, foreign.write_lerobot_v3])
def test_a_lerobot_folder_below_the_data_folder(desk: Desk, write: Callable[..., Path]) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    (desk.data / "set").mkdir()
    write(desk.data / "set", [grasp(12, seed=i) for i in range(2)])
    result = desk.ask(episode_path="set")
    assert result["format"] == "lerobot" and len(result["episodes"]) == 2
    episode = one(desk.ask(episode_path="set", demo="episode_000001"))
    check_pick(episode, 20)


def test_a_clip_is_one_skill(desk: Desk) -> None:
    """Clips have no gripper: a prompt of one step is the whole clip, one of two steps cannot be cut."""
    (desk.data / "clips").mkdir()
    worlds = [foreign.raw(0, 0), foreign.raw(1, 0), replace(foreign.raw(2, 0), instruction=PICK)]
    foreign.write_clips(desk.data / "clips", worlds)
    result = desk.ask(episode_path="clips")
    first, second, third = result["episodes"]
    assert result["format"] == "clips" and [s["prompt"] for s in first["skills"]] == ["pick up thing 0"]
    assert (second["skills"][0]["start"], second["skills"][0]["end"]) == (0, 16) and "one step" in second["skills"][0]["reason"]
    assert third["skills"] == [] and "no gripper signal" in third["discarded"] and third["gripper_width_m"] == []
    foreign.damage_clips(desk.data / "clips")
    result = desk.ask(episode_path="clips")
    assert len(result["episodes"]) == 2 and "not a readable video" in result["skipped"][0]["reason"]


@pytest.mark.parametrize(("close", "found"), [(1.0, True), (-1.0, False)])
def test_the_gripper_command_finds_a_wide_object(desk: Desk, tmp_path: Path, close: float, found: bool) -> None:
    """Fingers that a box holds 72 mm apart: only that they were told to close shows it."""
    for write, size in ((foreign.write_libero, 7), (foreign.write_robocasa, 12)):
        folder = tmp_path / str(size)
        folder.mkdir()
        path = write(folder, [grasp(size, held=0.072, close=close)])
        episode = one(desk.upload(path if path.is_file() else path / "pick_0_demo.hdf5"))
        assert (len(episode["skills"]) == 2) == found, (size, episode["discarded"])


def test_mimicgens_poses_show_a_push(desk: Desk, tmp_path: Path) -> None:
    """The hand moves all the time, the door with it from frame 12 to 28: the file's datagen_info tells."""
    path = foreign.write_robocasa(tmp_path, [grasp(12, held=foreign.OPEN, close=-1.0, instruction="close the cabinet door")])
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_name": "CloseSingleDoor", "env_kwargs": {"control_freq": 20}})
    hand = np.tile(np.eye(4), (STEPS, 1, 1))
    hand[:, 0, 3] = 0.004 * np.arange(STEPS)
    door = np.tile(np.eye(4), (STEPS, 1, 1))
    door[:, 0, 3] = np.clip(hand[:, 0, 3] - hand[12, 0, 3], 0, hand[28, 0, 3] - hand[12, 0, 3])
    assert [s["prompt"] for s in one(desk.upload(path))["skills"]] == ["close the cabinet door"]
    with h5py.File(path, "a") as file:
        file["data/demo_0/datagen_info/eef_pose"] = hand
        file["data/demo_0/datagen_info/object_poses/door"] = door
    episode = one(desk.upload(path))
    assert [s["prompt"] for s in episode["skills"]] == ["reach the cabinet door", "close the cabinet door"]
    assert [e["kind"] for e in episode["events"]] == ["touch"] and episode["events"][0]["onset"] == 13


def test_one_bad_demonstration_is_skipped_by_name(desk: Desk, tmp_path: Path) -> None:
    path = foreign.write_robocasa(tmp_path, [grasp(12, seed=i) for i in range(4)])
    with h5py.File(path, "a") as file:
        values = file["data/demo_1/obs/robot0_gripper_qpos"][()]
        values[17] = np.nan
        file["data/demo_1/obs/robot0_gripper_qpos"][...] = values
        del file["data/demo_2/obs/robot0_base_quat"]
    result = desk.upload(path)
    assert [e["demo"] for e in result["episodes"]] == ["demo_0", "demo_3"] and result["statistics"]["episodes"] == 2
    reasons = {s["demo"]: s["reason"] for s in result["skipped"]}
    assert "states: values must be finite; row 17 is NaN or infinite" in reasons["demo_1"]
    assert "dataset obs/robot0_base_quat is missing" in reasons["demo_2"] and "sha256" not in str(reasons)


def test_odd_metadata_is_skipped_or_refused_in_a_sentence(desk: Desk, tmp_path: Path) -> None:
    path = foreign.write_libero(tmp_path, [grasp(7)]) / "pick_0_demo.hdf5"
    with h5py.File(path, "a") as file:
        file.copy("data/demo_0", "data/demo_0_old")
    result = desk.upload(path)
    reason = "the file: /data/demo_0_old: a demonstration must be named demo_<number>"
    assert len(result["episodes"]) == 1 and result["skipped"] == [{"demo": "demo_0_old", "reason": reason}]
    for args in ("null", '{"control_freq": 0}'):
        with h5py.File(path, "a") as file:
            file["data"].attrs["env_args"] = f'{{"env_kwargs": {args}}}'
        assert desk.upload(path)["error"].startswith("episode: demo_0: the file: /data: env_args.env_kwargs")


def test_a_damaged_uploads_place_in_the_store_is_not_told(desk: Desk, tmp_path: Path) -> None:
    path = foreign.write_libero(tmp_path, [grasp(7)]) / "pick_0_demo.hdf5"
    path.write_bytes(path.read_bytes().replace(b"TREE", b"tree"))
    with path.open("rb") as file:
        name = desk.store.put_file(file, "hdf5")
    assert desk.ask(episode_uri=name)["error"].startswith("episode: the file: is damaged: HDF5 cannot read it (")
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["problem_info"] = "{}"
        file["data/demo_0"] = file["data/demo_1"] = np.zeros(3)
    error = desk.upload(path)["error"]
    assert name not in error and "sha256" not in error


def drop(key: str) -> Callable[[h5py.File], None]:
    def apply(file: h5py.File) -> None:
        del file[key]

    return apply


def wrong_size(file: h5py.File) -> None:
    del file["data/demo_0/actions"]
    file["data/demo_0/actions"] = np.zeros((STEPS, 6))


def no_language(file: h5py.File) -> None:
    file["data"].attrs["problem_info"] = "{}"


def nan_width(file: h5py.File) -> None:
    file["data/demo_0/obs/gripper_states"][9] = np.nan


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (drop("data/demo_0/obs/gripper_states"), "the file: /data/demo_0: dataset obs/gripper_states is missing"),
        (drop("data/demo_0/actions"), "the file: /data/demo_0: dataset actions is missing"),
        (wrong_size, "actions: shape must be (N, 7), got (40, 6)"),
        (no_language, "problem_info.language_instruction: is missing or empty"),
        (nan_width, "values must be finite; row 9 is NaN or infinite"),
    ],
)
def test_what_is_wrong_with_an_upload_is_named(
    desk: Desk, tmp_path: Path, wrong: Callable[[h5py.File], None], words: str
) -> None:
    foreign.write_libero(tmp_path, [grasp(7)])
    with h5py.File(tmp_path / "pick_0_demo.hdf5", "a") as file:
        wrong(file)
    error = desk.upload(tmp_path / "pick_0_demo.hdf5")["error"]
    assert error.startswith("episode: demo_0: ") and words in error


def test_mixed_rates_in_a_folder(desk: Desk) -> None:
    foreign.write_libero(desk.data, [grasp(7, seed=i) for i in range(2)])
    with h5py.File(desk.data / "pick_1_demo.hdf5", "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 10}})
    result = desk.ask(episode_path=".")
    assert [e["demo"] for e in result["episodes"]] == ["pick_0_demo.hdf5:demo_0"]
    assert "fps: 10, but the source's first episode has 20" in result["skipped"][0]["reason"]


def test_paths_stay_in_the_data_folder(desk: Desk, tmp_path: Path) -> None:
    foreign.write_libero(tmp_path, [grasp(7)])
    for name in ("..", "../pick_0_demo.hdf5", str(tmp_path / "pick_0_demo.hdf5")):
        assert "lies outside the data folder (W2A_DATA_ROOT)" in desk.ask(episode_path=name)["error"]
    (desk.data / "set").mkdir()
    (desk.data / "set/a_demo.hdf5").symlink_to(tmp_path / "pick_0_demo.hdf5")
    assert "lies outside the data folder" in desk.ask(episode_path="set")["error"]
    assert "is not in the segmenter's data folder" in desk.ask(episode_path="nowhere")["error"]


def test_an_unknown_hand_must_be_named(desk: Desk) -> None:
    """Another gripper's thresholds would cut nonsense without a word."""
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    (desk.data / "set").mkdir()
    path = foreign.write_lerobot_v2(desk.data / "set", [grasp(12)])
    info = json.loads((path / "meta/info.json").read_text())
    (path / "meta/info.json").write_text(json.dumps({**info, "robot_type": "octopus"}))
    state = {"gripper_qpos": {"start": 14, "end": 16}}
    (path / "meta/modality.json").write_text(json.dumps({"state": state, "action": {}}))
    assert (
        "embodiment: the hand of 'octopus' is not known; name the one to use (metaworld" in desk.ask(episode_path="set")["error"]
    )
    check_pick(one(desk.ask(episode_path="set", embodiment="panda")), 20)


def test_an_unknown_robots_gripper_may_be_named(desk: Desk) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    for name in ("set", "libero"):
        (desk.data / name).mkdir()
    path = foreign.write_lerobot_v2(desk.data / "set", [grasp(12)])
    info = json.loads((path / "meta/info.json").read_text())
    (path / "meta/info.json").write_text(json.dumps({**info, "robot_type": "so101"}))
    assert "no gripper signal" in one(desk.ask(episode_path="set"))["discarded"]
    check_pick(one(desk.ask(episode_path="set", embodiment="panda", gripper=[14, 15])), 20)
    assert "gripper: [16] are not all columns of a state of 16" in desk.ask(episode_path="set", gripper=[16])["error"]
    foreign.write_libero(desk.data / "libero", [grasp(7)])
    assert desk.ask(episode_path="libero", gripper=[6, 7])["error"] == "gripper: libero data has no such option"
    assert desk.ask(instruction=PICK, gripper=[6])["error"].startswith("gripper: names columns of a data set's state")


def test_memory_does_not_grow_with_an_upload(desk: Desk, tmp_path: Path) -> None:
    """LIBERO's layout with holes for images (zeros that take no room), 200 MB: checked, stored and cut in a few MB."""
    path, demos = tmp_path / "big_demo.hdf5", 4
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": PICK})
        for i in range(demos):
            world = grasp(7, seed=i)
            foreign.libero_demo(demo := data.create_group(f"demo_{i}"), world)
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_layout(h5py.h5d.CONTIGUOUS)
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple((STEPS, 640, 640, 3))
            del demo["obs/agentview_rgb"]
            h5py.h5d.create(demo["obs"].id, b"agentview_rgb", h5py.h5t.NATIVE_UINT8, space, layout)
    assert path.stat().st_size > 180 * 2**20
    tracemalloc.start()
    try:
        result = desk.upload(path)
        assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
    finally:
        tracemalloc.stop()
    assert len(result["episodes"]) == demos and result["statistics"]["synced"] == demos


def test_a_stored_file_that_changed_is_refused(desk: Desk, tmp_path: Path) -> None:
    path = foreign.write_robocasa(tmp_path, [grasp(12)])
    with path.open("rb") as file:
        name = desk.store.put_file(file, "hdf5")
    assert desk.store.put(path.read_bytes(), "hdf5") == name, "the same bytes, the same name"
    assert not list((tmp_path / "artifacts/incoming").iterdir())
    with Path(desk.store.path(name)).open("r+b") as stored:
        stored.write(b"changed!")
    assert "is corrupt" in desk.ask(episode_uri=name)["error"]
    with pytest.raises(ArtifactError, match="not in the store"), desk.store.local("sha256-" + "0" * 64 + ".hdf5"):
        pass
