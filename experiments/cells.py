"""Cells, the smallest pieces of an experiment: one JSON file each; what exists is not computed again; cores work in parallel."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from world2act.console import Progress, no_progress

Work = Callable[["Cell", Path], dict[str, Any]]
"""Computes a cell's result (JSON values) in a process of its own; the folder holds what cells share."""


@dataclass(frozen=True)
class Cell:
    """One training seed of one variant. stage: cells of a lower stage are finished before those of a higher one begin.

    what: everything that decides the result, JSON values; its hash is in the file's name, so that a changed cell is a new one.
    """

    experiment: str
    variant: str
    seed: int
    what: dict[str, Any] = field(default_factory=dict)
    stage: int = 1

    @property
    def name(self) -> str:
        """File name without its suffix."""
        content = json.dumps(asdict(self) | {"experiment": ""}, sort_keys=True)
        return f"{self.variant}-{self.seed}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"

    def path(self, folder: Path) -> Path:
        """Where the result lies: variants that several experiments share are computed once."""
        return folder / "cells" / f"{self.name}.json"


def read(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The result of `cell`, or None."""
    path = cell.path(folder)
    return json.loads(path.read_text()) if path.exists() else None


def _one(work: Work, cell: Cell, folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    started = time.monotonic()
    result = work(cell, folder)
    content = {"cell": asdict(cell), "wall_seconds": round(time.monotonic() - started, 1), **result}
    path = cell.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)


def run(cells: Sequence[Cell], work: Work, folder: Path, workers: int, progress: Progress = no_progress) -> list[str]:
    """Compute every cell that has no result yet, `workers` at a time. Returns what failed, one line each; the rest is kept."""
    unique = {cell.name: cell for cell in cells}
    missing = [cell for cell in unique.values() if not cell.path(folder).exists()]
    finished, failures = len(unique) - len(missing), []
    progress("cells", finished, len(unique), {})
    for stage in sorted({cell.stage for cell in missing}):
        members = [cell for cell in missing if cell.stage == stage]
        with ProcessPoolExecutor(max(1, min(workers, len(members))), multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(_one, work, cell, folder): cell for cell in members}
            for future in as_completed(futures):
                finished += 1
                progress("cells", finished, len(unique), {})
                error = future.exception()
                if error is not None:
                    cell = futures[future]
                    trace = "".join(traceback.format_exception(error))
                    log = cell.path(folder).with_suffix(".error")
                    log.parent.mkdir(parents=True, exist_ok=True)
                    log.write_text(trace)
                    failures.append(f"{cell.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        if failures:
            break  # the next stage needs this one
    return failures
