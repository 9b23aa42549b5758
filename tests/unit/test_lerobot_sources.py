"""LeRobot data sets: what is wrong is named, one bad row or file costs only its own episodes; pictures, mirrored images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests import foreign_data as foreign
from tests.unit.test_data_sources import BASE, edit_json, only, reasons
from world2act.data.formats import FormatError, open_source
from world2act.types import Episode


def cut(name: str, share: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * share)])

    return apply


def slow_down(folder: Path) -> None:
    world = foreign.raw(0, 12)
    foreign.write_video(
        folder / f"videos/chunk-000/{foreign.ROBOCASA_VIDEOS[1]}/episode_000000.mp4", world.camera(1)[:-1], fps=10
    )


DATA, VIDEO = "data/chunk-000/episode_000000.parquet", f"videos/chunk-000/{foreign.ROBOCASA_VIDEOS[0]}/episode_000000.mp4"
OUT = "../../../etc/{episode_index}.parquet"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (edit_json("meta/info.json", fps=None), "meta/info.json lacks fps"),
        (edit_json("meta/info.json", codebase_version="v1.6"), "codebase_version: 'v1.6'; v2 and v3 are read"),
        (edit_json("meta/info.json", features={}), "features lacks action"),
        (edit_json("meta/info.json", data_path=OUT), "data_path: .* leads out of the data set's folder"),
        (edit_json("meta/info.json", data_path="/etc/{episode_index}"), "data_path: .* leads out of the data set's folder"),
        (edit_json("meta/info.json", data_path="{nothing}"), "data_path: cannot be filled for episode 0"),
        (edit_json("meta/info.json", fps=10), "fps: 10 is said, but frames are 0.05 to 0.05 s apart"),
        (edit_json("meta/info.json", chunks_size=0), "data_path: cannot be filled for episode 0"),
        (edit_json("meta/info.json", features={"action": {}, "x": None}), "meta/info.json: features.x must be a JSON object"),
        (cut("meta/info.json", 0.5), "meta/info.json: is missing or not JSON"),
        (cut("meta/episodes.jsonl", 0.9), "line 1 is not JSON; the file is truncated"),
        (cut("meta/tasks.jsonl", 0), "task_index 0: no instruction in meta/tasks"),
        (cut(DATA, 0.5), "episode_000000.parquet: is not a parquet file, or truncated"),
        (cut(VIDEO, 0.3), "agentview_left: episode_000000.mp4: not a readable video"),
        (lambda folder: (folder / VIDEO).unlink(), "episode_000000: videos/.*: no such file"),
        (slow_down, "agentview_right: episode_000000.mp4: fps: the video has 10, the data set 20"),
    ],
)
def test_wrong_lerobot_data_is_reported_by_name(tmp_path: Path, wrong: Callable[[Path], None], words: str) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    path = foreign.write_lerobot_v2(tmp_path, [foreign.raw(0, 12)])
    wrong(path)
    with pytest.raises(FormatError, match=words):
        only(path)


def edit_row(**changes: Any) -> Callable[[Path], None]:
    """Changes the second row of the episodes' metadata, v2 or v3."""
    import pandas as pd

    def apply(folder: Path) -> None:
        lines, table = folder / "meta/episodes.jsonl", folder / "meta/episodes/chunk-000/file-000.parquet"
        if lines.exists():
            rows = [json.loads(line) for line in lines.read_text().splitlines()]
            lines.write_text("\n".join(json.dumps(row | (changes if n == 1 else {})) for n, row in enumerate(rows)))
        else:
            rows = pd.read_parquet(table).to_dict("records")
            pd.DataFrame([row | (changes if n == 1 else {}) for n, row in enumerate(rows)]).to_parquet(table)

    return apply


def edit_column(name: str, value: Any) -> Callable[[Path], None]:
    """Changes a column of the second episode's rows, v2."""
    import pandas as pd

    def apply(folder: Path) -> None:
        file = folder / DATA.replace("000000", "000001")
        pd.read_parquet(file).assign(**{name: [value] * 16}).to_parquet(file)

    return apply


def cut_line(name: str) -> Callable[[Path], None]:
    """Cuts the second line short."""

    def apply(folder: Path) -> None:
        first, second, *others = (folder / name).read_bytes().splitlines()
        (folder / name).write_bytes(b"\n".join([first, second[:9] + b"\xff", *others]))

    return apply


def second_shard_cut(folder: Path) -> None:
    """The second episode's metadata in a file of its own, which is truncated."""
    import pandas as pd

    first = folder / "meta/episodes/chunk-000/file-000.parquet"
    table = pd.read_parquet(first)
    table.drop(1).to_parquet(first)
    second = first.with_name("file-001.parquet")
    table[1:2].to_parquet(second)
    second.write_bytes(second.read_bytes()[:-20])


FROM = f"videos/{foreign.ROBOCASA_VIDEOS[0]}/from_timestamp"
ROW = "meta/episodes/chunk-000/file-000.parquet: row 1"


@pytest.mark.parametrize(
    ("write", "wrong", "words"),
    [
        (foreign.write_lerobot_v2, edit_column("task_index", None), "episode_000001: task_index None: no instruction in"),
        (foreign.write_lerobot_v2, edit_column("timestamp", None), "episode_000001: timestamp: values must be finite; row 0"),
        (foreign.write_lerobot_v2, edit_column("action", [0.0] * 7), r"episode_000001: action: shape must be \(N, 12\), got"),
        (foreign.write_lerobot_v2, edit_row(length=None), "episode_000001: has 16 rows, its metadata says None"),
        (foreign.write_lerobot_v2, edit_row(episode_index=None), "meta/episodes.jsonl: line 2 needs episode_index"),
        (foreign.write_lerobot_v2, edit_row(episode_index=[1]), "meta/episodes.jsonl: line 2 needs episode_index"),
        (foreign.write_lerobot_v2, cut_line("meta/episodes.jsonl"), "meta/episodes.jsonl: line 2 is not JSON; the file is trunc"),
        (foreign.write_lerobot_v2, cut_line("meta/tasks.jsonl"), r"episode_000001: .*\(meta/tasks.jsonl: line 2 is not JSON"),
        (foreign.write_lerobot_v3, edit_row(length=None), "episode_000001: has 16 rows, its metadata says"),
        (foreign.write_lerobot_v3, edit_row(episode_index=None), f"{ROW} needs episode_index"),
        (foreign.write_lerobot_v3, edit_row(**{FROM: None}), f"episode_000001: {FROM}: must be seconds"),
        (foreign.write_lerobot_v3, edit_row(**{FROM: float("inf")}), f"episode_000001: {FROM}: must be seconds, got inf"),
        (foreign.write_lerobot_v3, second_shard_cut, "meta/episodes/chunk-000/file-001.parquet: .* is not a parquet file"),
    ],
)
def test_one_wrong_row_of_a_lerobot_data_set_is_one_skipped_item(
    tmp_path: Path, write: Any, wrong: Callable[[Path], None], words: str
) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    path = write(tmp_path, [foreign.raw(i, 12) for i in range(3)])
    wrong(path)
    (reason,) = reasons(path)
    assert re.search(words, reason) and str(tmp_path) not in reason
    assert len([e for e in open_source(path, split=BASE).episodes() if isinstance(e, Episode)]) == 2, "the others are read"


def test_v3_metadata_without_what_all_episodes_need_is_named(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    path = foreign.write_lerobot_v3(tmp_path, [foreign.raw(0, 12)])
    (path / "meta/tasks.parquet").rename(path / "elsewhere")
    assert reasons(path) == ["episode_000000: meta/tasks.parquet: is missing"]
    (path / "elsewhere").rename(path / "meta/tasks.parquet")
    file = path / "meta/episodes/chunk-000/file-000.parquet"
    pd.read_parquet(file).drop(columns="episode_index").to_parquet(file)
    assert reasons(path) == ["meta/episodes/chunk-000/file-000.parquet: column episode_index is missing"]


def png(image: np.ndarray) -> bytes:
    import av

    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 32, 32, "rgb24", 1
    return b"".join(bytes(p) for p in encoder.encode(av.VideoFrame.from_ndarray(image, format="rgb24")) + encoder.encode(None))


def write_pictures(folder: Path, world: foreign.Raw, cameras: list[np.ndarray], moments: slice) -> Path:
    """LeRobot features of dtype image, as openpi's LIBERO has them: state 8, action 7, two fingers; one row a moment."""
    import pandas as pd

    path = foreign.write_lerobot_v2(folder, [foreign.raw(0, 12)])
    features = {k: {"dtype": "image", "shape": [32, 32, 3]} for k in ("image", "wrist_image")}
    features |= {"state": {"dtype": "float32", "shape": [8]}, "action": {"dtype": "float32", "shape": [7]}}
    edit_json("meta/info.json", robot_type="panda", features=features, fps=20)(path)
    state = np.concatenate([world.pose, foreign.fingers(world.widths)], axis=1)[moments]
    columns = {"state": list(state), "action": list(world.actions), "timestamp": np.arange(16) / 20}
    columns["task_index"] = np.zeros(16, int)
    for images, key in zip(cameras, ("image", "wrist_image"), strict=True):
        columns[key] = [{"bytes": png(image), "path": None} for image in images]
    pd.DataFrame(columns).to_parquet(path / DATA)
    return path


def test_pictures_in_the_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    world = foreign.raw(0, 7)
    got = only(write_pictures(tmp_path, world, [world.camera(0)[:-1], world.camera(1)[:-1]], slice(-1)))
    assert (got.images["primary"] == world.camera(0)[:-1]).all() and (got.images["wrist"] == world.camera(1)[:-1]).all()
    assert np.allclose(got.widths, world.widths[:-1], atol=1e-6) and got.states.shape == (16, 8)


def test_mirrored_conversions_of_libero_show_what_libero_shows(tmp_path: Path) -> None:
    """Their makers turned each stored image by 180 degrees; LIBERO's own are turned upside down."""
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    world = foreign.raw(0, 7)
    for name in ("hdf5", "lerobot"):
        (tmp_path / name).mkdir()
    original = only(foreign.write_libero(tmp_path / "hdf5", [world]))
    with h5py.File(tmp_path / "hdf5/pick_0_demo.hdf5") as file:
        stored = [file[f"data/demo_0/obs/{key}"][()] for key in ("agentview_rgb", "eye_in_hand_rgb")]
    turned = [np.rot90(images, 2, axes=(1, 2)) for images in stored]
    path = write_pictures(tmp_path / "lerobot", world, turned, slice(1, None))
    as_it_is, mirrored_back = only(path), only(path, mirrored=True)
    for camera in ("primary", "wrist"):
        assert (mirrored_back.images[camera] == original.images[camera]).all()
        assert not (as_it_is.images[camera] == original.images[camera]).all()
    assert np.allclose(mirrored_back.states, original.states)
    with pytest.raises(ValueError, match="mirrored: libero data has no such option"):
        open_source(tmp_path / "hdf5", split=BASE, mirrored=True)
