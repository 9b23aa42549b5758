"""What every data format must satisfy. A new one adds a `Probe` here and a file that writes its layout independently."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests import foreign_data as foreign
from world2act.data.formats import FORMATS, FormatError, Skipped, Source, check_episode, no_widths, open_source
from world2act.splits import Split
from world2act.types import Episode


@dataclass(frozen=True)
class Probe:
    """How to make a data set of a format, and what its first episode must be.

    write: into a folder, from raw episodes (tests/foreign_data.py); returns the path to open. damage: makes episode 1 of it
    unreadable. tolerance: grey levels by which a pixel may differ (video).
    """

    write: Callable[[Path, list[foreign.Raw]], Path]
    damage: Callable[[Path], None]
    cameras: tuple[str, ...]
    action_size: int
    state_size: int
    split: Split | None = Split.WORLDMODEL
    tolerance: int = 0
    fps: float = 20.0


PROBES: dict[str, Probe] = {
    "world2act": Probe(foreign.write_own, foreign.damage_hdf5("own.hdf5"), ("primary", "wrist"), 7, 8, split=None),
    "libero": Probe(foreign.write_libero, foreign.damage_hdf5("pick_1_demo.hdf5"), ("primary", "wrist"), 7, 8),
    "robocasa": Probe(foreign.write_robocasa, foreign.damage_hdf5("demo.hdf5"), ("left", "right", "wrist"), 12, 16),
    "lerobot": Probe(foreign.write_lerobot_v2, foreign.damage_lerobot_v2, ("left", "right", "wrist"), 12, 16, tolerance=2),
    "lerobot-v3": Probe(foreign.write_lerobot_v3, foreign.damage_lerobot_v3, ("left", "right", "wrist"), 12, 16, tolerance=2),
    "clips": Probe(foreign.write_clips, foreign.damage_clips, ("grid",), 0, 0, tolerance=2),
}


def test_every_format_has_a_probe() -> None:
    assert {name.partition("-")[0] for name in PROBES} == set(FORMATS)


@pytest.fixture(scope="module", params=sorted(PROBES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def probe(name: str) -> Probe:
    if name.startswith("lerobot"):
        pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    return PROBES[name]


@pytest.fixture(scope="module")
def raw(probe: Probe) -> list[foreign.Raw]:
    return [foreign.raw(seed, probe.action_size) for seed in range(3)]


@pytest.fixture(scope="module")
def path(name: str, probe: Probe, raw: list[foreign.Raw], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return probe.write(tmp_path_factory.mktemp(name), raw)


def opened(path: Path, probe: Probe) -> Source:
    return open_source(path, split=probe.split)


def good(source: Source, **options: bool) -> list[Episode]:
    found = [e for e in source.episodes(**options)]
    assert not [e for e in found if isinstance(e, Skipped)]
    return [e for e in found if isinstance(e, Episode)]


def test_format_is_detected_and_order_is_kept(name: str, probe: Probe, path: Path) -> None:
    source = opened(path, probe)
    assert source.name == name.partition("-")[0]
    keys = list(source.keys())
    assert len(keys) == 3 == len(set(keys)) and keys == list(opened(path, probe).keys())
    assert [e.meta["key"] for e in good(source)] == keys


def test_shapes_dtypes_and_meta(probe: Probe, path: Path, raw: list[foreign.Raw]) -> None:
    for episode, truth in zip(good(opened(path, probe)), raw, strict=True):
        check_episode(replace(episode, widths=np.nan_to_num(episode.widths)), cameras=probe.cameras)
        assert episode.actions.shape[1] == probe.action_size and episode.states.shape[1] == probe.state_size
        assert episode.instruction == truth.instruction and episode.split in set(Split)
        assert float(episode.meta["fps"]) == probe.fps


def test_images_are_upright_and_frame_t_is_seen_before_action_t(probe: Probe, path: Path, raw: list[foreign.Raw]) -> None:
    """The raw world counts its steps: what is seen at step t shows t, in the upper left corner, and action t says t."""
    for episode, truth in zip(good(opened(path, probe)), raw, strict=True):
        for number, camera in enumerate(probe.cameras):
            images = episode.images[camera].astype(int)
            steps = [truth.step_shown(image, number, probe.tolerance) for image in images]
            assert steps == list(range(steps[0], steps[0] + len(images))), camera
            if probe.action_size:
                assert [truth.step_of_action(a) for a in episode.actions] == steps[:-1], camera
                assert len(images) >= truth.steps - 1, "one action at most is lost"


def test_gripper_widths_are_metres_of_the_same_frames(probe: Probe, path: Path, raw: list[foreign.Raw]) -> None:
    for episode, truth in zip(good(opened(path, probe)), raw, strict=True):
        if no_widths(episode):
            assert not probe.state_size
            continue
        first = truth.step_shown(episode.images[probe.cameras[0]][0].astype(int), 0, probe.tolerance)
        expected = truth.widths[first : first + len(episode.widths)]
        assert np.allclose(episode.widths, expected, atol=1e-5) and 0 < episode.widths.max() <= 0.09
        closing = episode.actions[:, 6] > 0  # the raw world's fingers close when they are told +1
        assert (np.diff(episode.widths)[closing] < 0).all() and (np.diff(episode.widths)[~closing] > 0).all()


def test_without_images_the_rest_is_the_same(probe: Probe, path: Path) -> None:
    for full, light in zip(good(opened(path, probe)), good(opened(path, probe), images=False), strict=True):
        assert light.images == {} and (light.actions == full.actions).all() and (light.states == full.states).all()


def test_starts_at_a_key_and_refuses_an_unknown_one(probe: Probe, path: Path) -> None:
    source = opened(path, probe)
    keys = list(source.keys())
    assert [e.meta["key"] for e in source.episodes(start=keys[1]) if isinstance(e, Episode)] == keys[1:]
    with pytest.raises(ValueError, match="start: 'nowhere' is no episode of"):
        list(source.episodes(start="nowhere"))


def test_a_damaged_episode_is_reported_and_skipped(probe: Probe, path: Path, tmp_path: Path) -> None:
    path = Path((shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name))
    probe.damage(path)
    source = opened(path, probe)
    kinds = [type(e) for e in source.episodes()]
    assert kinds == [Episode, Skipped, Episode]
    skipped = next(e for e in source.episodes() if isinstance(e, Skipped))
    assert skipped.key == list(source.keys())[1] and skipped.source == path.name
    assert len(skipped.reason) > 20 and "Traceback" not in skipped.reason and str(path.parent) not in skipped.reason


def test_episodes_are_read_one_at_a_time(probe: Probe, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(path, probe)
    read: list[str] = []
    original = type(source)._read
    monkeypatch.setattr(type(source), "_read", lambda self, key, images: (read.append(key), original(self, key, images))[1])
    iterator = source.episodes()
    assert not read
    next(iterator)
    assert set(read) == {next(source.keys())}


def test_a_source_can_be_sent_to_another_process(probe: Probe, path: Path) -> None:
    """As a pool of readers does: it must hold no open file, which cannot be copied."""
    source = opened(path, probe)
    source.read(next(source.keys()))
    assert list(copy.deepcopy(source).keys()) == list(source.keys())


def test_foreign_data_needs_a_split(name: str, probe: Probe, path: Path) -> None:
    if name != "world2act":
        kind = name.partition("-")[0]
        with pytest.raises(ValueError, match=f"split: {kind} data has none of its own"):
            open_source(path)


def test_nothing_there_or_no_known_format(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nothing: no such file or folder"):
        open_source(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("no data")
    with pytest.raises(FormatError, match=r"no known format fits. Known: .*libero \(HDF5 whose /data has"):
        open_source(tmp_path)
    with pytest.raises(FormatError, match="format: 'rlds' is unknown; choose one of world2act, libero"):
        open_source(tmp_path, format="rlds")
    (tmp_path / "demo.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(FormatError, match=r"demo\.hdf5: .*(truncated or damaged|not an HDF5 file)"):
        open_source(tmp_path / "demo.hdf5")
