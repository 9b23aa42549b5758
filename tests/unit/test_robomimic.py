"""Demonstration files: what is written is read back; a bad file is an error that names what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from world2act.data.robomimic import EpisodeWriter, FormatError, count_episodes, read_env_args, read_episodes, read_root
from world2act.splits import LeakageError, Split
from world2act.types import Episode

ENV_ARGS: dict[str, Any] = {
    "env_name": "push",
    "simulator": "metaworld",
    "control_hz": 40.0,
    "chunk": 4,
    "cameras": {"primary": 0, "wrist": 1},
    "gripper_open_width": 0.088,
    "gripper_width_index": 3,
}


def episode(index: int = 0, steps: int = 8, split: str = "base") -> Episode:
    rng = np.random.default_rng(index)
    return Episode(
        task="push",
        split=split,
        index=index,
        instruction="push the puck",
        images={name: rng.integers(0, 255, (steps + 1, 16, 16, 3), np.uint8) for name in ("primary", "wrist")},
        states=rng.normal(size=(steps + 1, 4)).astype(np.float32),
        widths=rng.uniform(0, 0.09, steps + 1).astype(np.float32),
        actions=rng.uniform(-1, 1, (steps, 4)).astype(np.float32),
        success=index % 2 == 0,
    )


def write(path: Path, *episodes: Episode, split: Split = Split.BASE) -> Path:
    with EpisodeWriter(path, split=split, env_args=ENV_ARGS) as writer:
        for one in episodes:
            writer.write(one, perturbed=one.index == 1)
    return path


def read(path: Path) -> list[Episode]:
    return list(read_episodes(path, allowed=[Split.BASE]))


def test_truth_is_optional_and_comes_back(tmp_path: Path) -> None:
    known = {"touch/puck": np.arange(9, dtype=np.float32), "height/puck": np.full(9, 0.02, np.float32)}
    path = write(tmp_path / "base" / "push.hdf5", episode(0), replace(episode(1), truth=known))
    plain, told = read(path)
    assert plain.truth is None and told.truth is not None and set(told.truth) == set(known)
    assert all((told.truth[name] == values).all() for name, values in known.items())
    with pytest.raises(ValueError, match=r"truth\['touch/puck'\]: must be float32"):
        write(tmp_path / "base" / "bad.hdf5", replace(episode(2), truth={"touch/puck": np.zeros(3, np.float32)}))
    with h5py.File(path, "a") as file:
        file["data/demo_1/truth/touch/hand"] = h5py.SoftLink("/data/demo_0/actions")
    with pytest.raises(FormatError, match="is a link"):
        read(path)


def test_round_trip_in_order_of_index(tmp_path: Path) -> None:
    mask = np.arange(20) % 8 < 4
    written = [episode(10), episode(2), replace(episode(1, steps=20), intended=mask)]
    path = write(tmp_path / "base" / "push.hdf5", *written)
    got = read(path)
    assert [e.index for e in got] == [1, 2, 10] and count_episodes(path) == 3
    for a, b in zip(sorted(written, key=lambda e: e.index), got, strict=True):
        assert (a.task, a.split, a.instruction, a.success) == (b.task, b.split, b.instruction, b.success)
        for x, y in (
            (a.states, b.states),
            (a.widths, b.widths),
            (a.actions, b.actions),
            *zip(a.images.values(), b.images.values(), strict=True),
        ):
            assert x.dtype == y.dtype and (x == y).all()
    assert [e.meta["perturbed"] for e in got] == ["true", "false", "false"]
    assert got[0].intended is not None and (got[0].intended == mask).all() and got[1].intended is None
    assert read_env_args(path) == ENV_ARGS
    with h5py.File(path) as file:
        assert file["data"].attrs["total"] == 36 and file["data/demo_1"].attrs["num_samples"] == 20
        assert file["data/demo_1/obs/primary_image"].shape == (20, 16, 16, 3)
        assert file["data/demo_1/final_obs/gripper_width"].shape == ()


def test_read_root_takes_allowed_splits_and_tasks(tmp_path: Path) -> None:
    write(tmp_path / "base" / "push.hdf5", episode(0))
    write(tmp_path / "validation" / "push.hdf5", episode(1, split="validation"), split=Split.VALIDATION)
    assert [e.split for e in read_root(tmp_path, allowed=[Split.BASE])] == ["base"]
    assert len(list(read_root(tmp_path, allowed=[Split.BASE, Split.VALIDATION], tasks=["push"]))) == 2
    with pytest.raises(FormatError, match="no demonstration file of split base"):
        list(read_root(tmp_path, allowed=[Split.BASE], tasks=["reach"]))


def test_a_file_of_another_split_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "push.hdf5", episode())
    with pytest.raises(LeakageError, match=r"push\.hdf5: takes episodes of split evaluation only, got base"):
        list(read_episodes(path, allowed=[Split.EVALUATION]))


def test_nothing_half_written_has_the_final_name(tmp_path: Path) -> None:
    path = tmp_path / "push.hdf5"
    with pytest.raises(KeyboardInterrupt), EpisodeWriter(path, split=Split.BASE, env_args=ENV_ARGS) as writer:
        writer.write(episode(0))
        raise KeyboardInterrupt
    assert not path.exists()
    with EpisodeWriter(path, split=Split.BASE, env_args=ENV_ARGS, resume=True) as writer:
        assert writer.indices == {0: False}
        writer.write(episode(1), perturbed=True)
    assert [e.index for e in read(path)] == [0, 1] and not list(tmp_path.glob("*.partial"))
    with EpisodeWriter(path, split=Split.BASE, env_args=ENV_ARGS, resume=True) as writer:
        assert path.exists(), "readers keep the old file while it is extended"
        writer.write(episode(2))
    assert [e.index for e in read(path)] == [0, 1, 2]


def test_resuming_under_other_settings_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "push.hdf5", episode())
    with pytest.raises(FormatError, match="env_args differ"):
        EpisodeWriter(path, split=Split.BASE, env_args={**ENV_ARGS, "control_hz": 20.0}, resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"actions": np.zeros((7, 4), np.float32)}, "actions: 7 actions; the number must be a positive multiple of 4"),
        ({"actions": np.zeros((8, 4), np.float64)}, "actions: must be float32"),
        ({"actions": np.full((8, 4), np.nan, np.float32)}, "actions: values must be finite"),
        ({"states": np.zeros((8, 4), np.float32)}, "states: must be float32 with 2 axes and 9 rows"),
        (
            {"widths": np.full(9, 80.0, np.float32)},
            r"widths: must lie in \[0, 0.5\] metres, got up to 80; is the unit millimetres",
        ),
        ({"widths": np.full(9, -0.01, np.float32)}, "widths: must lie in"),
        ({"images": {"primary": np.zeros((9, 16, 16, 3), np.uint8)}}, r"images: cameras must be \['primary', 'wrist'\]"),
        (
            {"images": dict.fromkeys(("primary", "wrist"), np.zeros((9, 16, 16, 3), np.float32))},
            r"images\['primary'\]: must be uint8",
        ),
        ({"intended": np.ones(7, np.bool_)}, r"intended: must be \(8,\), one per action"),
        ({"split": "evaluation"}, "holds episodes of split base, got evaluation"),
    ],
)
def test_bad_episodes_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "push.hdf5", replace(episode(), **change))
    assert not (tmp_path / "push.hdf5").exists()


def test_a_scene_is_written_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index: scene 0 is in push\.hdf5 already"):
        write(tmp_path / "push.hdf5", episode(), episode())


def test_not_hdf5_truncated_or_missing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.hdf5: no such file"):
        read(tmp_path / "none.hdf5")
    text = tmp_path / "text.hdf5"
    text.write_text("not a data set")
    with pytest.raises(FormatError, match=r"text\.hdf5: is not an HDF5 file"):
        read(text)
    whole = write(tmp_path / "push.hdf5", *(episode(i, steps=40) for i in range(3))).read_bytes()
    for share in (0.2, 0.6, 0.95):
        cut = tmp_path / "cut.hdf5"
        cut.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(FormatError, match=r"cut\.hdf5: .*truncated or damaged"):
            read(cut)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("data", "group /data is missing"),
        ("data/demo_0/actions", "/data/demo_0: dataset actions is missing"),
        ("data/demo_0/obs/wrist_image", "/data/demo_0: dataset obs/wrist_image is missing"),
        ("data/demo_0/obs/gripper_width", "dataset obs/gripper_width is missing"),
        ("data/demo_0/final_obs/state", "dataset final_obs/state is missing"),
    ],
)
def test_a_missing_item_is_named(tmp_path: Path, item: str, words: str) -> None:
    path = write(tmp_path / "push.hdf5", episode())
    with h5py.File(path, "a") as file:
        del file[item]
    with pytest.raises(FormatError, match=words):
        read(path)


@pytest.mark.parametrize(
    ("group", "attribute", "value", "words"),
    [
        ("data", "split", None, "/data: attribute split is missing"),
        ("data", "env_args", None, "/data: attribute env_args is missing"),
        ("data", "env_args", "no json", "env_args is not JSON"),
        ("data", "env_args", "{}", "env_args lacks env_name, simulator"),
        ("data", "env_args", json.dumps({**ENV_ARGS, "cameras": [1]}), "env_args.cameras must map"),
        ("data", "env_args", json.dumps({**ENV_ARGS, "chunk": 0}), "env_args.chunk must be a positive integer, got 0"),
        ("data", "split", "training", "split: 'training' is unknown"),
        ("data/demo_0", "instruction", None, "/data/demo_0: attribute instruction is missing"),
        ("data/demo_0", "num_samples", 5, "num_samples differs from the 8 actions"),
    ],
)
def test_a_bad_attribute_is_named(tmp_path: Path, group: str, attribute: str, value: object, words: str) -> None:
    path = write(tmp_path / "push.hdf5", episode())
    with h5py.File(path, "a") as file:
        if value is None:
            del file[group].attrs[attribute]
        else:
            file[group].attrs[attribute] = value
    with pytest.raises(ValueError, match=words):
        read(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("obs/gripper_width", np.full(8, 80.0, np.float32), "is the unit millimetres"),
        ("obs/gripper_width", np.full(6, 0.05, np.float32), "widths: must be float32 with 1 axes and 9 rows"),
        ("obs/primary_image", np.zeros((8, 16, 16, 3), np.float32), "obs/primary_image: dtype must be uint8, got float32"),
        ("obs/primary_image", np.zeros((8, 8, 8, 3), np.uint8), r"final_obs/primary_image: shape must be \(8, 8, 3\)"),
        ("actions", np.zeros((8, 4), np.float64), "actions: dtype must be float32"),
    ],
)
def test_a_wrong_array_is_named(tmp_path: Path, key: str, value: np.ndarray, words: str) -> None:
    path = write(tmp_path / "push.hdf5", episode())
    with h5py.File(path, "a") as file:
        del file[f"data/demo_0/{key}"]
        file[f"data/demo_0/{key}"] = value
    with pytest.raises(FormatError, match=words):
        read(path)


def test_data_outside_the_file_is_refused(tmp_path: Path) -> None:
    """Links and external storage could make a server read any file that it may read."""
    write(tmp_path / "secret.hdf5", episode())
    (tmp_path / "secret.bin").write_bytes(bytes(8 * 4 * 4))
    for key, words in (
        ("actions", "actions is a link"),
        ("obs/state", "obs/state is a link"),
        ("raw", "is stored in another file"),
    ):
        path = write(tmp_path / "push.hdf5", episode())
        with h5py.File(path, "a") as file:
            demo = file["data/demo_0"]
            if key == "raw":
                del demo["actions"]
                demo.create_dataset(
                    "actions", (8, 4), np.float32, external=[(str(tmp_path / "secret.bin"), 0, h5py.h5f.UNLIMITED)]
                )
            else:
                del demo[key]
                demo[key] = h5py.ExternalLink(str(tmp_path / "secret.hdf5"), f"/data/demo_0/{key}")
        with pytest.raises(FormatError, match=words):
            read(path)


def test_a_declared_giant_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "push.hdf5", episode())
    with h5py.File(path, "a") as file:
        del file["data/demo_0/actions"]
        file["data/demo_0"].create_dataset("actions", (2**30, 4), np.float32, chunks=(1024, 4))
    assert path.stat().st_size < 10**6
    with pytest.raises(FormatError, match=r"actions: .* bytes, the limit is"):
        read(path)
