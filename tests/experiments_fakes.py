"""Work of experiments in no time, in a module that a worker process imports quickly."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cells import Cell
from world2act.console import Progress


@dataclass(frozen=True)
class FakeCells:
    """Writes down that it ran; some variants do not end well."""

    def __call__(self, cell: Cell, folder: Path, progress: Progress) -> dict[str, Any]:
        with (folder / "ran").open("a") as log:
            log.write(f"{cell.variant}{cell.seed}\n")
        progress("rounds", 1, 1, {"decode": 0.5})
        if cell.variant == "bad":
            raise ValueError("no\nsuch thing")
        if cell.variant == "killed":
            os._exit(9)
        if cell.variant == "slow":
            time.sleep(60)
        return {"value": cell.seed}


@dataclass(frozen=True)
class FakeMethods:
    """Ours solves everything, others nothing; inverse dynamics is broken."""

    def __call__(self, cell: Cell, folder: Path, progress: Progress) -> dict[str, Any]:
        (folder / f"{cell.name}.{os.getpid()}.ran").touch()
        if cell.what["method"] == "inverse-dynamics":
            raise RuntimeError("broken")
        mark = "1" if cell.what["method"] == "world2act" else "0"
        return {"outcomes": {task: mark * cell.what["trials"] for task in cell.what["tasks"]}, "notes": {}}
