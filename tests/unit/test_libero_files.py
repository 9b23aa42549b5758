"""LIBERO's files: initial states read without unpickling, meshes found or asked for, task names and limits."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from services.simulator import experts
from services.simulator.envs import libero_files as files
from services.simulator.envs.base import InvalidInputError


def save(path: Path, value: object) -> Path:
    """A file as `torch.save` writes it for a NumPy array: a zip with a protocol-2 pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
        archive.writestr("archive/version", "3\n")
    return path


@pytest.mark.parametrize("shape", [(50, 110), (1, 300), (300, 1), (2, 70_000)])
def test_an_array_is_read_bit_for_bit(tmp_path: Path, shape: tuple[int, int]) -> None:
    array = np.random.default_rng(0).normal(size=shape)
    array.flat[0] = np.nan
    assert files.read_array(save(tmp_path / "x.init", array)).tobytes() == array.tobytes()


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "boom")


@pytest.mark.parametrize(
    "value", [np.zeros((3, 4), np.float32), np.zeros(5), [1.0, 2.0], np.zeros((2, 2), ">f8"), {"a": np.zeros((2, 2))}]
)
def test_anything_else_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(InvalidInputError, match=r"initial states: x.init is not one 2-d array"):
        files.read_array(save(tmp_path / "x.init", value))


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"x\.init is not"):
        files.read_array(save(tmp_path / "x.init", [np.zeros((2, 2)), Bomb(tmp_path / "boom")]))
    assert not (tmp_path / "boom").exists()


def archive_with(path: Path, *folders: str) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for folder in folders:
            info = tarfile.TarInfo(f"libero-assets/{folder}/x.xml")
            info.size = 2
            tar.addfile(info, io.BytesIO(b"<>"))
    return path


def test_an_archive_is_unpacked_once_and_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W2A_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("W2A_LIBERO_ASSETS", str(archive_with(tmp_path / "a.tar.xz", *files.ASSET_FOLDERS)))
    first = files.assets()
    stamp = (first / files.STAND_IN_MARK).stat().st_mtime_ns
    assert "NOT comparable" in (first / files.STAND_IN_MARK).read_text()
    assert files.assets() == first and (first / files.STAND_IN_MARK).stat().st_mtime_ns == stamp
    assert list((tmp_path / "run").iterdir()) == [first], "no temporary folder stays"


def test_experts_cannot_be_measured_without_meshes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("libero", reason="hf-libero is missing: scripts/setup.sh libero")
    monkeypatch.setenv("W2A_LIBERO_ASSETS", str(tmp_path))
    task = "libero_object-pick_up_the_milk_and_place_it_in_the_basket"
    monkeypatch.setattr("sys.argv", ["experts", "--tasks", task, "--scenes", "1"])
    assert experts.main() == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("error W2A_LIBERO_ASSETS: ") and "no expert" not in said


def test_bad_assets_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W2A_RUN_DIR", str(tmp_path / "run"))
    broken = tmp_path / "broken.tar.xz"
    broken.write_bytes(b"not an archive")
    for given, words in (
        (tmp_path, "W2A_LIBERO_ASSETS: .* has no articulated_objects"),
        (broken, "W2A_LIBERO_ASSETS: broken.tar.xz is not a readable archive"),
        (archive_with(tmp_path / "b.tar.xz", "scenes"), "W2A_LIBERO_ASSETS: b.tar.xz has no folder articulated_objects"),
        (archive_with(tmp_path / "c.tar.xz", *files.ASSET_FOLDERS[:-1]), "W2A_LIBERO_ASSETS: .* has no turbosquid_objects"),
    ):
        monkeypatch.setenv("W2A_LIBERO_ASSETS", str(given))
        with pytest.raises(InvalidInputError, match=words):
            files.assets()


def test_instructions() -> None:
    assert files.instruction("put_the_bowl_on_the_plate") == "put the bowl on the plate"
    assert files.instruction("KITCHEN_SCENE10_close_the_top_drawer") == "close the top drawer"
    assert files.instruction("LIVING_ROOM_SCENE2_put_both_cans_in_the_basket") == "put both cans in the basket"


def test_tasks_of_the_package() -> None:
    if files.missing():
        pytest.skip(files.missing())
    tasks = files.tasks()
    assert len(tasks) == 40 and len({t.name for t in tasks}) == 40
    limits = {t.name.split("-")[0]: t.max_chunks * 4 for t in tasks}
    assert limits == {"libero_spatial": 280, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
    for task in tasks:
        assert files.initial_states(task.name).shape[0] == 50 and files.bddl_file(task.name).exists()
        assert files.problem_class(task.name).startswith("libero_")
