"""LeRobot v3 as we write it: read back by our own reader, and by `lerobot` itself where it is installed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")

import pyarrow.parquet as pq

from world2act.data.formats import open_source
from world2act.data.lerobot_writer import LeRobotWriter, Moments
from world2act.splits import Split
from world2act.types import Episode, Skill

SKILLS = (Skill("pick up the can", 0, 8), Skill("place the can", 8, 16))


def episode(index: int, steps: int = 16, size: int = 32) -> Episode:
    rng = np.random.default_rng(index)
    ramp = np.arange(size)[:, None, None] + np.zeros((size, size, 3))  # grey and smooth: video loses little of it
    frames = np.stack([(8 * t + index + ramp).astype(np.uint8) for t in range(steps + 1)])
    return Episode(
        task="pick-place",
        split="worldmodel",
        index=index,
        instruction=f"pick and place can {index % 2}",
        images={"primary": frames, "wrist": 255 - frames},
        states=rng.uniform(-0.04, 0.04, (steps + 1, 8)).astype(np.float32),
        widths=rng.uniform(0, 0.08, steps + 1).astype(np.float32),
        actions=rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        success=index != 1,
    )


def write(out: Path, numbers: range, language: bool = False, resume: bool = False, file_bytes: int = 1) -> None:
    """file_bytes 1: a shard an episode."""
    with LeRobotWriter(out, fps=20, robot="panda", language=language, resume=resume, file_bytes=file_bytes) as writer:
        for n in numbers:
            if f"demo_{n}" not in writer.written:
                writer.write(f"demo_{n}", episode(n), SKILLS)


def check(found: list[Episode], numbers: range) -> None:
    assert [e.index for e in found] == list(range(len(numbers)))
    for got, n in zip(found, numbers, strict=True):
        truth = episode(n)
        assert (got.task, got.instruction, got.success) == (truth.task, truth.instruction, truth.success)
        assert (got.actions == truth.actions[:-1]).all() and (got.states == truth.states[:-1]).all()
        assert (got.widths == truth.widths[:-1]).all()
        for camera, image in truth.images.items():
            assert np.abs(got.images[camera].astype(int) - image[:-1]).max() <= 6


@pytest.mark.parametrize("file_bytes", [1, 10**9])
def test_our_own_reader_gives_back_what_was_written(tmp_path: Path, file_bytes: int) -> None:
    write(tmp_path / "out", range(3), language=True, file_bytes=file_bytes)
    found = [e for e in open_source(tmp_path / "out", split=Split.WORLDMODEL).episodes() if isinstance(e, Episode)]
    check(found, range(3))
    shards = len(list((tmp_path / "out").glob("data/*/*.parquet")))
    assert shards == (3 if file_bytes == 1 else 1) == len(list((tmp_path / "out").glob("videos/*.primary/*/*.mp4")))


def test_language_columns_are_those_of_lerobot(tmp_path: Path) -> None:
    """Style subtask is persistent (lerobot 0.6 datasets/language.py): a frame carries all rows of its episode."""
    write(tmp_path / "out", range(1), language=True)
    table = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    rows = table["language_persistent"].to_pylist()
    assert len(rows) == 16 and all(row == rows[0] for row in rows)
    assert [(r["role"], r["style"], r["content"], r["timestamp"]) for r in rows[0]] == [
        ("assistant", "subtask", "pick up the can", 0.0),
        ("assistant", "subtask", "place the can", pytest.approx(0.4)),
    ]
    assert {tuple(sorted(r)) for r in rows[0]} == {("camera", "content", "role", "style", "timestamp", "tool_calls")}
    assert table["language_events"].to_pylist() == [[]] * 16
    features = json.loads((tmp_path / "out/meta/info.json").read_text())["features"]
    assert features["language_persistent"] == {"dtype": "language", "shape": [1], "names": None}


def test_nothing_half_written_has_the_final_name_and_resuming_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(3))
    with pytest.raises(KeyboardInterrupt), LeRobotWriter(tmp_path / "cut", fps=20, robot="panda", language=False) as writer:
        writer.write("demo_0", episode(0), SKILLS)
        raise KeyboardInterrupt
    assert not (tmp_path / "cut").exists()
    with pytest.raises(FileExistsError, match="resume it or remove it"):
        write(tmp_path / "cut", range(3))
    writer = LeRobotWriter(tmp_path / "cut", fps=20, robot="panda", language=False, resume=True, file_bytes=1)
    writer.write("demo_0", episode(0), SKILLS)
    writer.file_bytes = 10**9
    writer.write("demo_1", episode(1), SKILLS)  # killed here: its shard is open, and its files stay
    assert writer.written == {"demo_0"} and len(list((tmp_path / "cut.partial").glob("data/*/*.parquet"))) == 2
    write(tmp_path / "cut", range(3), resume=True)
    assert not list(tmp_path.glob("*.partial"))
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "cut") for p in (tmp_path / "cut").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file


def test_bad_episodes_are_refused(tmp_path: Path) -> None:
    with LeRobotWriter(tmp_path / "out", fps=20, robot="panda") as writer:
        writer.write("demo_0", episode(0))
        for bad, words in (
            (replace(episode(1), actions=np.zeros((16, 6), np.float32)), r"action: shape is \[6\], of the episodes before \[7\]"),
            (replace(episode(1), images={"primary": episode(1).images["primary"]}), r"observation.images.wrist: shape is None"),
            (replace(episode(1), widths=np.full(17, np.nan, np.float32)), "widths: "),
        ):
            with pytest.raises(ValueError, match=words):
                writer.write("demo_1", bad)
        with pytest.raises(ValueError, match="skills: 8 to 17 is not within the episode's 16 actions"):
            writer.write("demo_1", episode(1), [Skill("late", 8, 17)])
        writer.write("demo_1", episode(1))
    check([e for e in open_source(tmp_path / "out", split=Split.BASE).episodes() if isinstance(e, Episode)], range(2))
    with pytest.raises(ValueError, match=r"fps: 12\.5 must be a whole number"):
        LeRobotWriter(tmp_path / "other", fps=12.5, robot="panda")  # type: ignore[arg-type]


def test_moments_in_batches_are_those_of_all_rows() -> None:
    rows = np.random.default_rng(0).normal(3, 2, (100, 4))
    moments = Moments()
    for part in (rows[:1], rows[1:40], rows[40:]):
        moments = Moments.from_json(json.loads(json.dumps(moments.to_json())))  # as a resumed run
        moments.add(part)
    found = moments.summary(image=False)
    assert np.allclose(found["mean"], rows.mean(0)) and np.allclose(found["std"], rows.std(0)) and found["count"] == [100]
    assert np.allclose(found["min"], rows.min(0)) and np.allclose(found["max"], rows.max(0))


def test_lerobot_itself_loads_it(tmp_path: Path) -> None:
    lerobot = pytest.importorskip(
        "lerobot",
        reason="lerobot is not installed; its pins clash with ours, so use another environment: "
        "pip install lerobot==0.4.4 h5py pytest (Python 3.11) or lerobot[dataset]>=0.6 (3.12), and run this file there",
    )
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    language = tuple(map(int, lerobot.__version__.split(".")[:2])) >= (0, 6)
    write(tmp_path / "out", range(3), language=language, file_bytes=10**9)
    loaded = LeRobotDataset("local/out", root=tmp_path / "out", video_backend="pyav")
    assert (loaded.num_episodes, loaded.num_frames, loaded.fps) == (3, 48, 20)
    for n, t in ((0, 0), (1, 7), (1, 8), (2, 15)):
        item, truth = loaded[16 * n + t], episode(n)
        assert item["task"] == truth.instruction and int(item["episode_index"]) == n and int(item["frame_index"]) == t
        assert np.allclose(item["action"].numpy(), truth.actions[t]) and np.allclose(item["observation.state"], truth.states[t])
        assert abs(float(item["observation.gripper_width"]) - truth.widths[t]) < 1e-6
        for camera, image in truth.images.items():
            shown = item[f"observation.images.{camera}"].numpy().transpose(1, 2, 0) * 255
            assert np.abs(shown - image[t]).max() <= 7, (camera, n, t)
        skill = SKILLS[t >= 8].prompt
        if language:
            from lerobot.datasets.language_render import active_at

            row = active_at(float(item["timestamp"]), persistent=item["language_persistent"], style="subtask")
            assert row is not None and row["content"] == skill
        else:
            assert item["subtask"] == skill
    actions = np.concatenate([episode(n).actions for n in range(3)])
    assert np.allclose(loaded.meta.stats["action"]["mean"], actions.mean(0), atol=1e-6)
    chunks = LeRobotDataset("local/out", root=tmp_path / "out", video_backend="pyav", delta_timestamps={"action": [0, 0.05, 0.1]})
    assert np.allclose(chunks[0]["action"].numpy(), episode(0).actions[:3])


def test_our_reader_reads_what_lerobot_itself_writes(tmp_path: Path) -> None:
    pytest.importorskip("lerobot", reason="lerobot is not installed (see the test above)")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    shapes = {"observation.state": (8,), "action": (7,)}
    features = {name: {"dtype": "float32", "shape": shape, "names": None} for name, shape in shapes.items()}
    features["observation.images.image"] = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    made = LeRobotDataset.create("local/made", fps=20, features=features, root=tmp_path / "made", robot_type="panda")
    worlds = [episode(n, size=64) for n in range(2)]
    for world in worlds:
        for t in range(16):
            frame = {"observation.state": world.states[t], "action": world.actions[t], "task": world.instruction}
            made.add_frame({**frame, "observation.images.image": world.images["primary"][t]})
        made.save_episode()
    made.finalize()
    found = [e for e in open_source(tmp_path / "made", split=Split.WORLDMODEL).episodes() if isinstance(e, Episode)]
    assert len(found) == 2
    for got, world in zip(found, worlds, strict=True):
        assert got.instruction == world.instruction and (got.actions == world.actions[:15]).all()
        assert np.allclose(got.widths, np.abs(world.states[:16, 6:]).sum(1)), "LIBERO's two fingers"
        assert np.abs(got.images["primary"].astype(int) - world.images["primary"][:16]).mean() < 4
