"""What is particular to one foreign format: its conventions, its ways of being wrong; and the clip folder's writer."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests import foreign_data as foreign
from world2act.data.clip_folder import ClipFolderWriter
from world2act.data.formats import FormatError, Skipped, open_source
from world2act.data.grid import stitch
from world2act.splits import LeakageError, Split
from world2act.types import Episode, Skill

BASE = Split.BASE


def only(path: Path, **options: Any) -> Episode:
    """The first episode."""
    source = open_source(path, split=BASE, **options)
    return source.read(next(source.keys()))


def reasons(path: Path) -> list[str]:
    return [e.reason for e in open_source(path, split=BASE).episodes() if isinstance(e, Skipped)]


def test_libero_is_recorded_after_the_action_upside_down_with_two_fingers(tmp_path: Path) -> None:
    world = foreign.raw(0, 7)
    got = only(foreign.write_libero(tmp_path, [world]))
    assert np.allclose(got.actions, world.actions[1:], atol=1e-6), "action 0 has no frame before it"
    assert (got.images["primary"] == world.camera(0)[1:]).all() and (got.images["wrist"] == world.camera(1)[1:]).all()
    assert np.allclose(got.widths, world.widths[1:], atol=1e-6), "|g0| + |g1|"
    assert np.allclose(got.states, np.concatenate([world.pose, foreign.fingers(world.widths)], axis=1)[1:], atol=1e-6)
    assert (got.task, got.instruction, got.success, got.split) == ("pick_0", world.instruction, True, "base")
    with h5py.File(tmp_path / "pick_0_demo.hdf5", "a") as file:
        file["data"].attrs["macros_image_convention"] = "opencv"
    with_other_macro = only(tmp_path)
    assert (with_other_macro.images["primary"][:, ::-1] == got.images["primary"]).all(), "then the file's images are as seen"


def test_all_versions_of_robocasa_have_one_layout(tmp_path: Path) -> None:
    """v0.x and RoboCasa365 order an action's parts differently; images are upright and seen before the action in both."""
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    world = foreign.raw(0, 12)
    for name in ("v0", "v2", "v3", "modality"):
        (tmp_path / name).mkdir()
    old = only(foreign.write_robocasa(tmp_path / "v0", [world]))
    new = only(foreign.write_lerobot_v2(tmp_path / "v2", [world]))
    newer = only(foreign.write_lerobot_v3(tmp_path / "v3", [world]))
    assert np.allclose(old.actions, world.actions[:-1], atol=1e-6)
    assert (old.images["left"] == world.camera(0)[:-1]).all()
    for other in (new, newer):
        assert np.allclose(other.actions, old.actions, atol=1e-6) and other.meta["action"] == old.meta["action"]
        assert np.allclose(other.states[:, 14:], old.states[:, 14:], atol=1e-6) and other.meta["state"] == old.meta["state"]
        assert np.allclose(other.widths, old.widths, atol=1e-6)
        assert other.task == "PickPlaceCounterToCabinet"
    assert old.task == "PnPCounterToCab"
    # meta/modality.json says where the parts are, whatever the robot is called
    path = foreign.write_lerobot_v2(tmp_path / "modality", [world])
    info = json.loads((path / "meta/info.json").read_text())
    (path / "meta/info.json").write_text(json.dumps({**info, "robot_type": "renamed"}))
    plain = only(path)
    assert np.isnan(plain.widths).all() and not np.allclose(plain.actions, old.actions)
    parts = {"base_motion": (0, 4), "control_mode": (4, 5), "end_effector_position": (5, 8)}
    parts |= {"end_effector_rotation": (8, 11), "gripper_close": (11, 12)}
    action = {name: {"start": a, "end": b} for name, (a, b) in parts.items()}
    state = {"gripper_qpos": {"start": 14, "end": 16}}
    (path / "meta/modality.json").write_text(json.dumps({"state": state, "action": action}))
    told = only(path)
    assert np.allclose(told.actions, old.actions, atol=1e-6) and np.allclose(told.widths, old.widths, atol=1e-6)


def test_the_caller_may_say_where_the_gripper_is(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    world = foreign.raw(0, 12)
    path = foreign.write_lerobot_v2(tmp_path, [world])
    got = only(path, gripper=(14,))
    assert np.allclose(got.widths, world.widths[:-1] / 2, atol=1e-6)
    with pytest.raises(FormatError, match=r"gripper: \[16\] are not all columns of a state of 16"):
        only(path, gripper=(16,))


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))

    return apply


def change(key: str, values: Any) -> Callable[[h5py.File], None]:
    """Replaces a dataset; None removes it."""

    def apply(file: h5py.File) -> None:
        del file[key]
        if values is not None:
            file[key] = values

    return apply


def attribute(where: str, name: str, value: str | None) -> Callable[[h5py.File], None]:
    def apply(file: h5py.File) -> None:
        if value is None:
            del file[where].attrs[name]
        else:
            file[where].attrs[name] = value

    return apply


LIBERO_WRONG = [
    (change("data/demo_0/actions", None), "/data/demo_0: dataset actions is missing"),
    (change("data/demo_0/obs/agentview_rgb", None), "dataset obs/agentview_rgb is missing"),
    (change("data/demo_0/obs/gripper_states", None), "dataset obs/gripper_states is missing"),
    (change("data/demo_0/actions", np.zeros((16, 6))), r"actions: shape must be \(N, 7\), got \(16, 6\)"),
    (change("data/demo_0/obs/ee_states", np.zeros((15, 6))), r"obs/ee_states: shape must be \(16, 6\), got \(15, 6\)"),
    (change("data/demo_0/obs/agentview_rgb", np.zeros((16, 8, 8, 3))), "obs/agentview_rgb: dtype must be uint8, got float64"),
    (change("data/demo_0/obs/gripper_states", np.full((16, 2), 40.0)), "is the unit millimetres"),
    (change("data/demo_0/actions", np.full((16, 7), np.nan)), "actions: values must be finite"),
    (
        change("data/demo_0/actions", h5py.ExternalLink("/etc/x.hdf5", "/a")),
        "actions is a link; the data must be in the file itself",
    ),
    (attribute("data", "problem_info", None), "/data: attribute problem_info is missing"),
    (attribute("data", "problem_info", "{}"), "problem_info.language_instruction: is missing or empty"),
    (attribute("data", "problem_info", "no json"), "attribute problem_info is not JSON"),
    (attribute("data", "env_args", '{"env_kwargs": null}'), "/data: env_args.env_kwargs must be a JSON object"),
    *(
        (
            attribute("data", "env_args", f'{{"env_kwargs": {{"control_freq": {value}}}}}'),
            r"pick_0_demo.hdf5: /data: env_args.env_kwargs.control_freq: must be a number in \(0, 1000\], got ",
        )
        for value in ("null", "[20]", "0", "-5", "1e400", "NaN", "1001")
    ),
    (change("data/demo_0/actions", h5py.Empty("f8")), "/data/demo_0/actions: is empty"),
]
ROBOCASA_WRONG = [
    (change("data/demo_0/actions", np.zeros((16, 7))), r"actions: shape must be \(N, 12\), got \(16, 7\)"),
    (change("data/demo_0/obs/robot0_base_quat", None), "dataset obs/robot0_base_quat is missing"),
    (attribute("data/demo_0", "ep_meta", json.dumps({"lang": " "})), "ep_meta.lang: is missing or empty"),
    (attribute("data/demo_0", "ep_meta", None), "/data/demo_0: attribute ep_meta is missing"),
]


@pytest.mark.parametrize(
    ("write", "wrong", "words"),
    [(foreign.write_libero, *case) for case in LIBERO_WRONG] + [(foreign.write_robocasa, *case) for case in ROBOCASA_WRONG],
)
def test_wrong_hdf5_is_reported_by_name(tmp_path: Path, write: Any, wrong: Callable[[h5py.File], None], words: str) -> None:
    size = 12 if write is foreign.write_robocasa else 7
    path = write(tmp_path, [foreign.raw(i, size) for i in range(2)])
    with h5py.File(path if path.is_file() else path / "pick_0_demo.hdf5", "a") as file:
        wrong(file)
    with pytest.raises(FormatError, match=words):
        only(path)
    assert len(reasons(path)) == 1, "the other episode is read"


def test_the_rate_of_every_format_is_checked(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    for name in ("own", "robocasa", "lerobot"):
        (tmp_path / name).mkdir()
    foreign.write_own(tmp_path / "own", [foreign.raw(0, 7)])
    with h5py.File(tmp_path / "own/own.hdf5", "a") as file:
        args = json.loads(file["data"].attrs["env_args"])
        file["data"].attrs["env_args"] = json.dumps({**args, "control_hz": None})
    with h5py.File(foreign.write_robocasa(tmp_path / "robocasa", [foreign.raw(0, 12)]), "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 0}})
    edit_json("meta/info.json", fps=2000)(foreign.write_lerobot_v2(tmp_path / "lerobot", [foreign.raw(0, 12)]))
    for name, words in (("own", "control_hz"), ("robocasa", "control_freq"), ("lerobot", "meta/info.json: fps")):
        with pytest.raises(FormatError, match=rf"{words}: must be a number in \(0, 1000\], got "):
            source = open_source(tmp_path / name, split=None if name == "own" else BASE)
            source.read(next(source.keys()))


def test_a_first_file_with_a_wrong_rate_does_not_say_what_the_others_must_have(tmp_path: Path) -> None:
    foreign.write_libero(tmp_path, [foreign.raw(i, 7) for i in range(3)])
    with h5py.File(tmp_path / "pick_0_demo.hdf5", "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 0}})
    source = open_source(tmp_path, split=BASE)
    assert source.fps == 20 and [type(e) for e in source.episodes()] == [Skipped, Episode, Episode]


def test_a_truncated_file_of_a_folder_is_one_skipped_item(tmp_path: Path) -> None:
    foreign.write_libero(tmp_path, [foreign.raw(i, 7) for i in range(3)])
    whole = (tmp_path / "pick_1_demo.hdf5").read_bytes()
    (tmp_path / "pick_1_demo.hdf5").write_bytes(whole[: len(whole) // 2])
    found = list(open_source(tmp_path, split=BASE).episodes())
    assert [type(e) for e in found] == [Episode, Skipped, Episode]
    assert isinstance(found[1], Skipped) and found[1].key == "pick_1_demo.hdf5" and "truncated or damaged" in found[1].reason


@pytest.mark.parametrize("number", [0, 1])
def test_a_file_damaged_inside_is_one_skipped_item(tmp_path: Path, number: int) -> None:
    """It opens; its groups cannot be listed. The first file is the one by which the format is found."""
    foreign.write_libero(tmp_path, [foreign.raw(i, 7) for i in range(3)])
    file = tmp_path / f"pick_{number}_demo.hdf5"
    file.write_bytes(file.read_bytes().replace(b"TREE", b"tree"))
    found = list(open_source(tmp_path, split=BASE).episodes())
    assert [isinstance(e, Skipped) for e in found] == [n == number for n in range(3)]
    (reason,) = reasons(tmp_path)
    assert reason.startswith(f"{file.name}: is damaged: HDF5 cannot read it (")


def test_a_folder_of_damaged_files_is_refused_by_the_first_ones_name(tmp_path: Path) -> None:
    for name in ("b.hdf5", "a.hdf5"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FormatError, match=r"^a\.hdf5: is not an HDF5 file"):
        open_source(tmp_path, split=BASE)
    foreign.write_clips(tmp_path, [foreign.raw(0, 0)])
    assert open_source(tmp_path, split=BASE).name == "clips", "what lies beside a data set of another format is no matter"


def test_a_demonstration_with_another_name_is_one_skipped_item(tmp_path: Path) -> None:
    foreign.write_libero(tmp_path, [foreign.raw(i, 7) for i in range(2)])
    with h5py.File(tmp_path / "pick_0_demo.hdf5", "a") as file:
        file.copy("data/demo_0", "data/demo_0_old")
    found = list(open_source(tmp_path, split=BASE).episodes())
    assert [type(e) for e in found] == [Episode, Skipped, Episode]
    assert reasons(tmp_path) == ["pick_0_demo.hdf5: /data/demo_0_old: a demonstration must be named demo_<number>"]


def test_mixed_rates_are_reported(tmp_path: Path) -> None:
    """A world model's frames have one distance in time. The first episode says which, also for who starts later."""
    foreign.write_libero(tmp_path, [foreign.raw(i, 7) for i in range(3)])
    with h5py.File(tmp_path / "pick_1_demo.hdf5", "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 10}})
    source = open_source(tmp_path, split=BASE)
    start = list(source.keys())[1]
    found = list(source.episodes(start=start, images=False))
    assert [type(e) for e in found] == [Skipped, Episode]
    assert isinstance(found[0], Skipped) and "fps: 10, but the source's first episode has 20" in found[0].reason


def test_own_data_of_another_split_is_refused(tmp_path: Path) -> None:
    foreign.write_own(tmp_path, [foreign.raw(0, 7)])
    with pytest.raises(LeakageError, match="takes episodes of split base only, got worldmodel"):
        list(open_source(tmp_path, split=BASE).episodes())


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("video,prompt\n../../x_mg_demo_1_aa_0.mp4,pick", r"leads out of the data set's folder"),
        ("video,prompt\nclip7.mp4,pick", "clip7: is named neither"),
        ("video,prompt\nT_mg_demo_1_aa_0.mp4,", "metadata.csv has no prompt for it"),
        ("file,text\na,b", "metadata.csv: needs the columns video and prompt"),
    ],
)
def test_wrong_clip_folders_are_reported(tmp_path: Path, lines: str, words: str) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "metadata.csv").write_text(lines)
    with pytest.raises(FormatError, match=words):
        only(tmp_path)


@pytest.mark.parametrize("spans", ['{"T": []}', '{"T": {"1": null}}', '{"T": {"1": {"0": {"start": null}}}}'])
def test_odd_times_of_clips_are_reported(tmp_path: Path, spans: str) -> None:
    foreign.write_clips(tmp_path, [foreign.raw(i, 0) for i in range(3)])
    (tmp_path / "video_metadata.json").write_text(spans.replace("T", "PnPCounterToCab"))
    skipped = reasons(tmp_path)
    assert 1 <= len(skipped) <= 2 and all("_aa_0: video_metadata.json: must be {task: {demo: " in r for r in skipped)


def test_what_no_reader_foresaw_is_one_skipped_item(tmp_path: Path) -> None:
    """An attribute without a value, where any would do but none."""
    foreign.write_own(tmp_path, [foreign.raw(i, 7) for i in range(2)])
    with h5py.File(tmp_path / "own.hdf5", "a") as file:
        file["data/demo_0"].attrs["index"] = h5py.Empty("i8")
    (skipped, good) = open_source(tmp_path).episodes()
    assert isinstance(skipped, Skipped) and isinstance(good, Episode)
    assert skipped.reason.startswith("own.hdf5:demo_0: its metadata is malformed (TypeError: ")


@pytest.mark.parametrize("names", ["robocasa", "libero"])
def test_clips_written_in_the_authors_layout_are_read_back(tmp_path: Path, names: Any) -> None:
    world = foreign.raw(0, 7)
    episode = only(foreign.write_libero(tmp_path, [world]))
    grid = stitch(episode.images, {"primary": 0, "wrist": 1})
    skills = (Skill("pick up the can", 0, 8), Skill("place it in / on: the basket", 8, 12))
    out = tmp_path / "clips"
    with pytest.raises(RuntimeError), ClipFolderWriter(out, names=names, fps=20) as writer:
        writer.write("a", episode, skills, grid)
        raise RuntimeError("stopped")
    with (tmp_path / "clips.partial/journal.jsonl").open("a") as journal:
        journal.write('{"key": "b", "clips": [')  # killed while it wrote
    assert not out.exists()
    with ClipFolderWriter(out, names=names, fps=20, resume=True) as writer:
        assert writer.written == {"a"}
        writer.write("b", only(tmp_path), skills[:1], grid)
    first = "pick_0_mg_demo_0_aa_0" if names == "robocasa" else "demo_0-pick_0-pick_up_the_can-order0"
    assert (out / "videos" / f"{first}.mp4").is_file()
    assert (out / "metadata.csv").read_text().splitlines()[:2] == ["video,prompt", f"{first}.mp4,pick up the can"]
    assert json.loads((out / "video_metadata.json").read_text())["pick_0"]["0"]["1"] == {"start": 8, "end": 12}
    found = [e for e in open_source(out, split=BASE).episodes() if isinstance(e, Episode)]
    assert [e.instruction for e in found] == [s.prompt for s in skills]
    assert [len(e.images["grid"]) for e in found] == [9, 5] and found[1].meta["start"] == "8"
    assert np.abs(found[1].images["grid"].astype(int) - grid[8:13]).mean() < 3
    with pytest.raises(ValueError, match="skills: 8 to 16 is not within the episode's 16 frames"):
        ClipFolderWriter(tmp_path / "more", names=names, fps=20).write("a", episode, [Skill("x", 8, 16)], grid)


def test_a_file_of_two_gigabytes_streams(tmp_path: Path) -> None:
    """LIBERO's layout, 44 demonstrations of 50 MB (holes on the disk, zeros to the reader): memory holds one at a time."""
    demos, steps = 44, 512
    with h5py.File(tmp_path / "big_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "pick it up"})
        for i in range(demos):
            obs = data.create_group(f"demo_{i}/obs")
            for key in ("agentview_rgb", "eye_in_hand_rgb"):
                layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                layout.set_layout(h5py.h5d.CONTIGUOUS)
                layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                space = h5py.h5s.create_simple((steps, 128, 128, 3))
                h5py.h5d.create(obs.id, key.encode(), h5py.h5t.NATIVE_UINT8, space, layout)
            data[f"demo_{i}/actions"] = np.zeros((steps, 7))
            obs["gripper_states"], obs["ee_states"] = np.full((steps, 2), 0.04), np.zeros((steps, 6))
    assert (tmp_path / "big_demo.hdf5").stat().st_size > 2 * 2**30
    source = open_source(tmp_path / "big_demo.hdf5", split=BASE)
    one = steps * 128 * 128 * 3 * 2
    tracemalloc.start()
    try:
        assert sum(isinstance(e, Episode) for e in source.episodes()) == demos
        assert tracemalloc.get_traced_memory()[1] < 4 * one
        tracemalloc.reset_peak()
        assert sum(len(e.widths) for e in source.episodes(images=False) if isinstance(e, Episode)) == demos * steps
        assert tracemalloc.get_traced_memory()[1] < 2 * one, "widths are read without images"
    finally:
        tracemalloc.stop()
