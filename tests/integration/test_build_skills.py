"""`world2act build-skills` and `skills-report` as their users run them, on tiny sources of every format."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest

from services.cli import main, skills, skills_page
from services.runtime.artifacts import ArtifactStore
from services.segmenter.segment import run_request
from services.segmenter.settings import SegmenterSettings
from services.worldmodel.windows import read_episodes
from tests import foreign_data as foreign
from tests.conformance.test_data_formats import PROBES
from tests.processes import wait_for
from tests.scripted_llm import Server, said
from world2act.data.clips import skills_of
from world2act.data.formats import Episode, open_source
from world2act.data.hdf5 import SUFFIXES
from world2act.splits import Split

STEPS = 32
PICK = "pick up the can and place it in the basket"
SKILLS = ["pick up the can", "place the can in the basket"]


def world(seed: int, action_size: int = 7) -> foreign.Raw:
    """Open, closed on something 3 cm wide from moment 12 to 29, open. Without actions: a film in which nothing ends."""
    widths = np.r_[np.full(12, 0.08), np.full(17, 0.03), np.full(4, 0.08)]
    instruction = PICK if action_size else "open the drawer"
    return replace(foreign.raw(seed, action_size, STEPS), widths=widths, instruction=instruction)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process; its workers are real."""
    monkeypatch.setattr(sys, "argv", ["build-skills", *map(str, arguments)])
    return skills.main()


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


@pytest.mark.parametrize("name", sorted(PROBES))
def test_every_format_becomes_skills_and_a_damaged_episode_is_skipped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    probe = PROBES[name]
    (folder := tmp_path / "source").mkdir()
    source = probe.write(folder, [world(i, probe.action_size) for i in range(3)])
    probe.damage(source)
    gripper = probe.action_size > 0
    formats = ["clips", "lerobot"] if gripper else ["clips"]
    split = ["--split", "worldmodel"] if probe.split else []
    cue = [] if gripper else ["--cue", "visual"]
    out = tmp_path / "out"
    assert run(monkeypatch, "--source", source, "--out", out, *split, *cue, "--formats", *formats, "--workers", 1) == 0
    found, shown = summary(out), capsys.readouterr()
    assert found["skipped"] == 1 and "skipped" in shown.err and str(out / "index.html") in shown.out
    assert found["statistics"]["episodes"] == found["statistics"]["synced"] == 2
    assert not out.with_name("out.partial").exists()
    clips = [e for e in open_source(out / "clips", split=Split.BASE).episodes() if isinstance(e, Episode)]
    page = (out / "index.html").read_text()
    assert (SKILLS[0] if gripper else "open the drawer") in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "the page loads nothing"
    if not gripper:
        assert found["embodiment"] is None and [e.instruction for e in clips] == ["open the drawer"] * 2
        return
    assert found["embodiment"] == ("metaworld" if name == "world2act" else "panda")
    assert [e.instruction for e in clips] == SKILLS * 2 and found["skills"] == dict.fromkeys(SKILLS, 2)
    assert [len(e.images["grid"]) for e in clips][:2] == [13, 21 if name == "world2act" else 17], "whole chunks, both ends shown"
    lerobot = [e for e in open_source(out / "lerobot", split=Split.BASE).episodes() if isinstance(e, Episode)]
    assert [e.instruction for e in lerobot] == [PICK] * 2


NARROW = np.r_[np.full(12, 0.066), np.full(17, 0.03), np.full(4, 0.066)]
PUSH = "push the plate to the front of the stove"


@pytest.mark.parametrize(
    ("widths", "instruction", "skills_found"),
    [
        (NARROW, PICK, [(SKILLS[0], 0, 12), (SKILLS[1], 12, 28)]),
        (np.zeros(STEPS + 1), PUSH, [(PUSH, 0, 28)]),  # a hand that never opens has the table's width
        (np.full(STEPS + 1, 0.01), PUSH, [(PUSH, 0, 28)]),
    ],
    ids=["opens 66 mm", "shut", "nearly shut"],
)
def test_a_source_has_one_hand_whoever_cuts_it(
    widths: np.ndarray, instruction: str, skills_found: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source := tmp_path / "source").mkdir()
    foreign.write_libero(source, [replace(world(i), widths=widths, instruction=instruction) for i in range(3)])
    options = ["--source", source, "--split", "base", "--formats", "clips", "--workers", 1]
    assert run(monkeypatch, *options, "--out", tmp_path / "out") == 0
    built = [r["segmentation"]["skills"] for r in skills.records(tmp_path / "out")]
    asked = run_request({"episode_path": "."}, SegmenterSettings(data_root=source), ArtifactStore(f"file://{tmp_path}/artifacts"))
    segmented = [e["skills"] for e in asked["episodes"]]
    for episodes in (built, segmented):
        assert [[(s["prompt"], s["start"], s["end"]) for s in e] for e in episodes] == [skills_found] * 3
    for episode in read_episodes(source, Split.BASE):
        assert [(s.prompt, s.start, s.end) for s in skills_of(episode)[0]] == skills_found


def test_options_of_lerobot_data_reach_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A robot that nobody knows, whose fingers are columns 14 and 15, and whose images are mirrored."""
    pytest.importorskip("pyarrow", reason="pyarrow is missing: pip install '.[data]'")
    (tmp_path / "source").mkdir()
    source = foreign.write_lerobot_v2(tmp_path / "source", [world(0, 12)])
    info = json.loads((source / "meta/info.json").read_text())
    (source / "meta/info.json").write_text(json.dumps({**info, "robot_type": "so101"}))
    options = ["--source", source, "--split", "base", "--workers", 1, "--out"]
    assert run(monkeypatch, *options, tmp_path / "none") == 0
    (reason,) = summary(tmp_path / "none")["statistics"]["discard_reasons"]
    assert reason.startswith("no gripper signal: ") and "--gripper" in reason
    hand = ["--gripper", 14, 15, "--embodiment", "panda"]
    assert run(monkeypatch, *options, tmp_path / "known", *hand, "--mirrored") == 0
    assert summary(tmp_path / "known")["skills"] == dict.fromkeys(SKILLS, 1)
    clip = next(e for e in open_source(tmp_path / "known/clips", split=Split.BASE).episodes() if isinstance(e, Episode))
    patch = clip.images["grid"][0, :32, :32].mean(axis=-1)
    assert patch[:8, -8:].mean() < 10 < 190 < patch[:8, :8].mean(), "moment 0's black corner is on the other side"
    assert run(monkeypatch, *options, tmp_path / "wrong", "--gripper", 16) == 2
    assert "gripper: [16] are not all columns of a state of 16" in capsys.readouterr().err


def many(folder: Path, episodes: int) -> Path:
    folder.mkdir(parents=True)
    with h5py.File(foreign.write_libero(folder, [world(0)]) / "pick_0_demo.hdf5", "a") as file:
        for i in range(1, episodes):
            foreign.libero_demo(file["data"].create_group(f"demo_{i}"), world(i))
    return folder


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.suffix in (".jsonl", ".mp4", ".csv")}


def test_a_killed_run_leaves_no_process_and_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = many(tmp_path / "source", 80)
    options = ["--source", source, "--split", "base", "--workers", "2"]
    assert run(monkeypatch, *options, "--out", tmp_path / "whole") == 0
    killed = [sys.executable, "-m", "services.cli.skills", *map(str, options), "--out", str(tmp_path / "again")]
    process = subprocess.Popen(killed, stderr=subprocess.DEVNULL)
    journal = tmp_path / "again.partial/episodes.jsonl"
    wait_for(lambda: journal.stat().st_size > 0, 60, "the first episode")
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1], "workers end with the command"
    assert 0 < len(journal.read_text().splitlines()) < 80, "it was killed in the middle"
    with journal.open("a") as lines:
        lines.write('{"key": "half')
    assert run(monkeypatch, *options, "--out", tmp_path / "again") == 2, "not without --resume"
    assert run(monkeypatch, *options, "--out", tmp_path / "again", "--cue", "visual", "--resume") == 2, "not with other options"
    assert run(monkeypatch, *options, "--out", tmp_path / "again", "--resume") == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_clips_of_several_files_of_one_task_keep_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = many(tmp_path / "source", 2)
    for copy in ("again", "more/again"):
        (source / copy).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / "pick_0_demo.hdf5", source / f"{copy}.hdf5")
    assert run(monkeypatch, "--source", source, "--out", tmp_path / "out", "--split", "base", "--workers", 2) == 0
    clips = open_source(tmp_path / "out/clips", split=Split.BASE)
    found = [e for e in clips.episodes() if isinstance(e, Episode)]
    assert len(list((tmp_path / "out/clips/videos").iterdir())) == summary(tmp_path / "out")["statistics"]["clips"] == 12
    assert [e.index for e in found] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], "numbered through the source, not by file"


def test_instructions_that_no_row_knows_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    worlds = [replace(world(i), instruction=text) for i, text in enumerate((PICK, "dance the tango"))]
    foreign.write_libero(tmp_path, worlds)
    for i in range(2):
        with h5py.File(tmp_path / f"pick_{i}_demo.hdf5", "a") as file:
            file["data"].attrs["bddl_file_name"] = f"dance_{i}.bddl"
    options = ["--source", tmp_path, "--split", "base", "--formats", "--workers", 1, "--out", tmp_path / "out"]
    assert run(monkeypatch, *options) == 0
    assert summary(tmp_path / "out")["statistics"]["synced"] == 2 and summary(tmp_path / "out")["unknown"] == 1
    assert "Of 1 no schema row knows the instruction" in capsys.readouterr().out


def test_splits_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for split, episodes in (("base", 1), ("worldmodel", 2)):
        (tmp_path / "demos" / split).mkdir(parents=True)
        foreign.write_own(tmp_path / "demos" / split, [world(i) for i in range(episodes)])
    with h5py.File(tmp_path / "demos/base/own.hdf5", "a") as file:
        file["data"].attrs["split"] = "base"
    options = ["--source", tmp_path / "demos", "--workers", 1]
    assert run(monkeypatch, *options, "--out", tmp_path / "both") == 2
    assert "split: demos holds episodes of base, worldmodel, which stay apart; name one of them" in capsys.readouterr().err
    assert run(monkeypatch, *options, "--out", tmp_path / "one", "--split", "worldmodel", "--formats", "clips", "lerobot") == 0
    keys = [record["key"] for record in skills.records(tmp_path / "one")]
    assert keys == ["worldmodel/own.hdf5:demo_0", "worldmodel/own.hdf5:demo_1"]
    assert json.loads((tmp_path / "one/lerobot/meta/info.json").read_text())["total_episodes"] == 2
    assert run(monkeypatch, *options, "--out", tmp_path / "none", "--split", "tuning") == 2
    assert "takes episodes of split tuning only, got base" in capsys.readouterr().err


def with_truth(folder: Path) -> Path:
    """Two episodes of ours; of the first it is known that the can is touched from frame 14 on."""
    source = foreign.write_own(folder, [world(0), world(1)])
    with h5py.File(folder / "own.hdf5", "a") as file:
        file["data/demo_0/truth/touch/can"] = np.where(np.arange(STEPS + 1) >= 14, 2, 0).astype(np.float32)
        file["data/demo_0/truth/height/can"] = np.arange(STEPS + 1, dtype=np.float32) / 100
    return source


def test_truth_is_scored_and_runs_are_gathered_into_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_truth(tmp_path)
    out = tmp_path / "run-a"
    assert run(monkeypatch, "--source", source, "--out", out, "--score", "--formats", "clips", "--workers", 1) == 0
    scores = summary(out)["scores"]
    assert summary(out)["unscored"] == 1 and scores["events + LLM"] == "not run: no endpoint"
    schema = scores["events + schema"]  # found at 12, true at 14
    assert schema["episodes"] == 1 and schema["boundaries"][0] == {"hits": 1, "found": 1, "true": 1, "error": 2}
    assert (schema["right"], schema["actions"]) == (30, 32)
    page = tmp_path / "docs" / "skills.md"
    monkeypatch.setattr(sys, "argv", ["skills-report", str(out), "--out", str(page), "--note", "Stand-in meshes."])
    assert skills_page.main() == 0
    text = page.read_text()
    assert "| run-a | 2 | 0 | 2 | 4 | 100.0 % | 32 to 16 |" in text and "Stand-in meshes." in text
    assert "| events + LLM | not run: no endpoint |" in text and "1.00 / 1.00" in text and "93.8 %" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures == ["skills-lengths.png", "skills-run-a.png"]
    assert all(page.with_name(p).read_bytes()[:4] == b"\x89PNG" and page.with_name(p).stat().st_size < 300_000 for p in pictures)
    monkeypatch.setattr(sys, "argv", ["skills-report", str(tmp_path), "--out", str(page)])
    assert skills_page.main() == 2


def test_the_language_model_plans_and_is_scored_where_an_endpoint_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [{"prompt": SKILLS[0], "ends": "contact_on"}, {"prompt": SKILLS[1], "ends": "end"}]
    plan = {"task": "pick-place", "steps": steps, "explanation": "two steps"}
    boundary = {"step": 0, "index": 12, "reason": "it closes"}
    server = Server()
    server.turns = [said(plan), said({"boundaries": [boundary], "missing": [], "explanation": "one grasp"})]
    for name, value in (("LLM_BASE_URL", server.url), ("RUN_DIR", tmp_path), ("ARTIFACTS_URL", f"file://{tmp_path}/artifacts")):
        monkeypatch.setenv(f"W2A_{name}", str(value))
    source = foreign.write_own(tmp_path, [world(0), world(1)])
    options = ["--source", source, "--planner", "llm", "--formats", "clips", "--workers", 4]
    try:
        assert run(monkeypatch, *options, "--out", tmp_path / "a") == 0
        assert summary(tmp_path / "a")["skills"] == dict.fromkeys(SKILLS, 2) and len(server.requests) == 2, "answers are kept"
        (tmp_path / "artifacts").rename(tmp_path / "forgotten")
        assert run(monkeypatch, *options, "--out", tmp_path / "b") == 2, "no answer: the run stops, and can be resumed"
    finally:
        server.close()
    assert (tmp_path / "b.partial").is_dir() and not (tmp_path / "b").exists()


def test_a_model_whose_answers_are_all_refused_is_scored_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    server.turns = [said("Sure! First, pick up the can.")] * 3
    settings = {"LLM_BASE_URL": server.url, "LLM_MODEL": "parrot", "LLM_ATTEMPTS": "3", "LLM_KEY": "sk-secret"}
    for name, value in {**settings, "RUN_DIR": str(tmp_path), "ARTIFACTS_URL": f"file://{tmp_path}/artifacts"}.items():
        monkeypatch.setenv(f"W2A_{name}", value)
    out = tmp_path / "run-a"
    try:
        source = with_truth(tmp_path)
        assert run(monkeypatch, "--source", source, "--out", out, "--score", "--workers", 1) == 0
    finally:
        server.close()
    assert len(server.requests) == 3 and summary(out)["statistics"]["synced"] == 2, "the rules have cut"
    monkeypatch.setattr(sys, "argv", ["skills-report", str(out), "--out", str(tmp_path / "skills.md")])
    assert skills_page.main() == 0
    page = (tmp_path / "skills.md").read_text()
    assert "| events + LLM (parrot) | 1 | 0 | 0.00 / 0.00 |" in page and "Contact cues beside widths: none" in page
    assert "events + LLM (parrot): format json_object, max_tokens 2000, temperature 0.0, attempts 3." in page
    written = page + (out / "summary.json").read_text() + (out / "index.html").read_text()
    assert server.url not in written and "sk-secret" not in written
    before = {k: v for k, v in summary(out).items() if k not in ("llm", "cues_scored")}  # as a run of an earlier version
    (out / "summary.json").write_text(json.dumps(before))
    assert skills_page.main() == 0
    assert "events + LLM (parrot): settings not recorded." in (tmp_path / "skills.md").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "nothing"}, "nothing: no such file or folder"),
        ({"source": "folder"}, "no known format fits"),
        ({"split": None}, "split: libero data has none of its own"),
        ({"embodiment": "allegro"}, "embodiment: the hand of 'allegro' is not known"),
        ({"workers": "0"}, "workers: 0 is outside [1, 256]"),
        ({"tolerances": "-1"}, "tolerances: -1 is outside [0, 1000]"),
        ({"planner": "llm"}, "planner: no language model is configured"),
        ({"out": "folder"}, "out: folder exists already"),
        ({"source": "damaged"}, "holds no readable episode"),
        ({"source": "clips", "formats": "lerobot"}, "formats: LeRobot data sets need gripper widths"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(
    options: dict[str, str | None],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("folder", "clips", "damaged", "source"):
        (tmp_path / name).mkdir()
    foreign.write_clips(tmp_path / "clips", [world(0)])
    foreign.write_libero(tmp_path / "source", [world(0)])
    with h5py.File(foreign.write_libero(tmp_path / "damaged", [world(0)]) / f"pick_0_demo{SUFFIXES[0]}", "a") as file:
        del file["data/demo_0/actions"]
    given = {"source": "source", "out": "out", "split": "base", "workers": "1", **options}
    given |= {name: str(tmp_path / str(given[name])) for name in ("source", "out")}
    arguments = [part for name, value in given.items() if value is not None for part in (f"--{name}", value)]
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out")]


def test_the_commands_are_those_of_world2act() -> None:
    assert main.MODULES["build-skills"] == skills.__name__ and main.MODULES["skills-report"] == skills_page.__name__
