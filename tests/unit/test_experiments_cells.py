"""Cells: what exists stays, what fails or dies takes nothing with it, an interruption leaves whole files only."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from experiments import cells
from experiments.cells import Cell
from tests.experiments_fakes import FakeCells as Fake


def ran(folder: Path) -> list[str]:
    return sorted((folder / "ran").read_text().split())


def test_failures_are_named_and_the_rest_is_kept_and_not_computed_again(tmp_path: Path) -> None:
    wanted = [Cell("main", "good", 0), Cell("main", "bad", 0), Cell("main", "killed", 0), Cell("main", "good", 1)]
    seen: list[tuple[str, int, int, dict[str, float]]] = []
    failures = cells.run(wanted, Fake(), tmp_path, 3, lambda *said: seen.append(said))
    names = [cell.name for cell in wanted]
    assert sorted(failures) == [
        f"{names[1]}: ValueError: no such thing",
        f"{names[2]}: its process ended with status 9",
    ]
    assert seen[-1] == ("cells", 4, 4, {"failed": 2.0})
    told = [said for said in seen if said[0] != "cells"]
    assert sorted(told) == sorted((f"{name}: rounds", 1, 1, {"decode": 0.5}) for name in names), "what each process tells"
    assert "Traceback" in (tmp_path / "cells" / f"{names[1]}.error").read_text()
    for cell in (wanted[0], wanted[3]):
        result = cells.read(cell, tmp_path)
        assert result is not None and result["value"] == cell.seed and result["cell"]["variant"] == "good"
        assert result["wall_seconds"] >= 0
    assert cells.run([wanted[0], wanted[3], Cell("methods", "good", 2)], Fake(), tmp_path, 2) == []
    assert ran(tmp_path) == ["bad0", "good0", "good1", "good2", "killed0"]


def test_variants_that_experiments_share_are_one_cell_and_other_content_is_another() -> None:
    assert Cell("main", "base", 0, {"a": 1}).name == Cell("methods", "base", 0, {"a": 1}).name
    assert Cell("main", "base", 0, {"a": 1}).name != Cell("main", "base", 0, {"a": 2}).name


def test_an_interruption_ends_what_runs_and_keeps_what_is_whole(tmp_path: Path) -> None:
    wanted = [Cell("main", "good", 0), Cell("main", "slow", 0)]

    def interrupted(part: str, done: int, total: int, values: dict[str, float]) -> None:
        if part == "cells" and done:
            while "slow0" not in ran(tmp_path):
                time.sleep(0.05)
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cells.run(wanted, Fake(), tmp_path, 2, interrupted)
    assert time.monotonic() - started < 50
    assert [path.name for path in (tmp_path / "cells").iterdir()] == [f"{wanted[0].name}.json"]
