"""Success by kind of wording, out of cells that are measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import by_wording
from experiments.study import Sizes
from experiments.tables import Plan
from experiments.wording import other

SEED, TRIALS = 1, 4  # scenes 4 to 7: of kinds 1, 2, 0, 1


def test_scenes_are_counted_where_their_words_were_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {label: (f"cell-{number}",) for number, label in enumerate(by_wording.LABELS)}
    Plan("cross-task", "x", Sizes(1, TRIALS, ("reach",)), named).save(tmp_path)
    (tmp_path / "cells").mkdir()
    what = {"trials": TRIALS, "split": "evaluation"}
    for number in range(len(named)):
        marks = "".join(str(int(other("reach the green goal", index).startswith("go to"))) for index in range(4, 8))
        result = {"cell": {"what": what, "seed": SEED}, "outcomes": {"reach": marks}}
        (tmp_path / f"cells/cell-{number}.json").write_text(json.dumps(result))
    assert by_wording.main(tmp_path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "reach" in line]
    assert len(lines) == len(named) and all("0.00" in line and "1.00 [0.34, 1.00]" in line for line in lines)
    assert [cell.split()[0] for cell in lines[0].split("│")[3:6]] == ["0.00", "1.00", "0.00"]


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert by_wording.main(tmp_path) == 2
    assert "row 'base' has no cell; run world2act experiment cross-task" in capsys.readouterr().err
