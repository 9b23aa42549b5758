"""docs/robot.md: every command on it is one that exists with the flags it is given. And the recorder's dry run."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from services.cli import main
from services.simulator.envs.base import REGISTRY
from world2act.data.robomimic import read_episodes
from world2act.segmentation import segment_episode
from world2act.splits import Split

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
PAGE = (ROOT / "docs/robot.md").read_text()
LINES = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.S) for line in block.strip().splitlines()]
TYRO_CLI = tyro.cli


class ParsedError(Exception):
    """The command line was understood."""


def parse_only(monkeypatch: pytest.MonkeyPatch, program: Callable[[], Any], words: list[str]) -> None:
    """Run `program` up to where it has read its command line, which is `words`."""

    def stop(kind: Any, **options: Any) -> None:
        TYRO_CLI(kind, **{**options, "args": words})
        raise ParsedError

    monkeypatch.setattr(tyro, "cli", stop)
    with pytest.raises(ParsedError):
        program()


def test_the_page_has_every_step() -> None:
    for word in (
        "record_demonstrations",
        "segment",
        "train-worldmodel",
        "stage1",
        "posttrain",
        "export",
        "import",
        "robot_client",
    ):
        assert any(word in line for line in LINES), word
    for fact in ("Franka Research 3", "20 demonstrations a task", "100 imagined trajectories", "20 trials", "+6.67 %"):
        assert fact in PAGE
    assert PAGE.count("*needs the arm*") >= 3


@pytest.mark.parametrize("line", LINES)
def test_command_exists_and_knows_its_flags(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    settings = (ROOT / "docs/settings.md").read_text()
    while "=" in words[0]:
        assert f"`{words.pop(0).split('=')[0]}`" in settings
    if words[0] == "openssl":
        return
    if words[0] == "world2act":
        name, rest = words[1], words[2:]
        if name in main.MODULES:
            module = importlib.import_module(main.MODULES[name])
            parse_only(monkeypatch, module.main, rest)
            return
        called: list[str] = []
        real = main.COMMANDS[name]
        stand_in = functools.wraps(real)(lambda **values: called.append(name))
        monkeypatch.setitem(main.COMMANDS, name, stand_in)
        assert main.main([name, *rest]) == 0 and called == [name]
    elif words[1].startswith("examples/"):
        assert (ROOT / words[1]).is_file()
        parse_only(monkeypatch, importlib.import_module(Path(words[1]).stem).main, words[2:])
    else:
        assert words == ["python", "-m", "services.vla"]


def test_settings_named_in_the_text_exist() -> None:
    settings = (ROOT / "docs/settings.md").read_text()
    for name in set(re.findall(r"W2A_[A-Z_]+", PAGE)):
        assert f"`{name}`" in settings, name
    assert "my_arm" not in REGISTRY, "the page says that this one is the reader's to write"


def test_recorder_dry_run_writes_what_the_trainings_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    recorder = importlib.import_module("record_demonstrations")
    base = ["x", "--task", "pick-cube", "--instruction", "pick up the cube and place it on the plate", "--out", str(tmp_path)]
    arguments = [*base, "--rate-hz", "100000", "--split", "worldmodel", "--episodes", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert recorder.main() == 0 and "2 demonstrations added" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--resume"])
    assert recorder.main() == 0
    episodes = list(read_episodes(tmp_path / "worldmodel/pick-cube.hdf5", allowed=[Split.WORLDMODEL]))
    assert [e.index for e in episodes] == [0, 1, 2, 3] and episodes[0].actions.shape == (32, 4)
    assert np.isclose(episodes[0].widths[[0, 10, 30]], [0.08, 0.03, 0.08]).all()
    found = segment_episode(episodes[0])
    assert [s.prompt for s in found.skills] == ["pick up the cube", "place the cube on the plate"]
    monkeypatch.setattr(sys, "argv", arguments)  # again without --resume: what an operator recorded is not written over
    assert recorder.main() == 2 and "is there already; --resume adds to it" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*base, "--arm", "no_such:Arm"])
    assert recorder.main() == 2 and "error: No module named" in capsys.readouterr().err
