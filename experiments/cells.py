"""Cells, the smallest pieces of an experiment: one JSON file each; what exists is not computed again; cores work in parallel."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from world2act.console import Progress, no_progress

Work = Callable[["Cell", Path, Progress], dict[str, Any]]
"""Computes a cell's result (JSON values) in a process of its own; the folder holds what cells share."""
SECONDS_BETWEEN = 1.0
"""In which a process tells of its progress at most once."""


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


def write_whole(path: Path, content: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(content)
    temporary.replace(path)


def _one(work: Work, cell: Cell, folder: Path, progress: Progress) -> None:
    started = time.monotonic()
    result = work(cell, folder, progress)
    content = {"cell": asdict(cell), "wall_seconds": round(time.monotonic() - started, 1), **result}
    write_whole(cell.path(folder), json.dumps(content, indent=1))


def _guarded(function: Callable[..., None], arguments: tuple[Any, ...], log: Path, said: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to children too: the parent decides when they end
    last: dict[str, float] = {}

    def progress(part: str, done: int, total: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if done >= total or now - last.get(part, -SECONDS_BETWEEN) >= SECONDS_BETWEEN:
            last[part] = now
            said.send((part, done, total, values))

    try:
        function(*arguments, progress)
    except Exception as error:
        write_whole(log, f"{type(error).__name__}: {' '.join(str(error).split())}\n{traceback.format_exc()}")
        raise SystemExit(1) from None


def processes(
    calls: dict[str, tuple[Callable[..., None], tuple[Any, ...]]],
    workers: int,
    logs: Path,
    progress: Progress = no_progress,
) -> Iterator[tuple[str, str | None]]:
    """Run each call (importable function, arguments) in a process of its own, `workers` at a time.

    The function gets a Progress as its last argument; what it tells arrives at `progress` under "<name>: <part>".
    Yields (name, None), or (name, why it failed), as they end; `logs`/<name>.error holds the trace. One that is killed takes no
    other with it. When the consumer stops, by Ctrl-C too, those that still run are ended.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(calls)
    running: dict[Connection, tuple[SpawnProcess, str]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < max(1, workers):
                name = waiting.pop(0)
                log = logs / f"{name}.error"
                log.unlink(missing_ok=True)
                heard, said = context.Pipe(duplex=False)
                process = context.Process(target=_guarded, args=(*calls[name], log, said), name=name, daemon=True)
                process.start()
                said.close()  # the process has its own end: when it ends, however it ends, ours reads the end of the pipe
                running[heard] = process, name
            for ready in connection.wait(list(running)):
                assert isinstance(ready, Connection)
                process, name = running[ready]
                try:
                    part, done, total, values = ready.recv()
                    progress(f"{name}: {part}", done, total, values)
                except EOFError:
                    del running[ready]
                    ready.close()
                    process.join()
                    yield name, _why(process, logs / f"{name}.error")
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _why(process: SpawnProcess, log: Path) -> str | None:
    if process.exitcode == 0:
        return None
    return log.read_text().splitlines()[0] if log.exists() else f"its process ended with status {process.exitcode}"


def run(cells: Sequence[Cell], work: Work, folder: Path, workers: int, progress: Progress = no_progress) -> list[str]:
    """Compute every cell that has no result yet, `workers` at a time. Returns what failed, one line each; the rest is kept."""
    unique = {cell.name: cell for cell in cells}
    missing = [cell for cell in unique.values() if not cell.path(folder).exists()]
    finished, failures = len(unique) - len(missing), []
    progress("cells", finished, len(unique), {})
    for stage in sorted({cell.stage for cell in missing}):
        members = {cell.name: (_one, (work, cell, folder)) for cell in missing if cell.stage == stage}
        for name, error in processes(members, workers, folder / "cells", progress):
            finished += 1
            if error is not None:
                failures.append(f"{name}: {error}")
            progress("cells", finished, len(unique), {"failed": float(len(failures))} if failures else {})
        if failures:
            break  # the next stage needs this one
    return failures
