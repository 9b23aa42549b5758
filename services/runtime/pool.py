"""The same work on many items in several processes, in order, whatever dies: for commands that go through a data set.

Items are text, results JSON. A process that dies (out of memory, a crash in a decoder) takes only the item that it had with it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

Result = dict[str, Any]
Work = Callable[[str], Result]


class WorkError(RuntimeError):
    """The work itself failed (not one item): it cannot start, or raised."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    item: tuple[int, str] | None = None


def serve(connection: Connection, start: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """A worker process: receives items, sends results, until an empty item, an error, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business

    answer: dict[str, Any] = {"result": {}}  # the first one says that the work has started
    try:
        work = start(*arguments)
        while True:
            connection.send_bytes(json.dumps(answer).encode())
            if not (item := connection.recv_bytes().decode()):
                return
            answer = {"result": work(item)}
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:
        connection.send_bytes(json.dumps({"error": str(error) or type(error).__name__}).encode())


def in_order(
    items: Iterable[str], start: Callable[..., Work], arguments: tuple[Any, ...] = (), workers: int = 1
) -> Iterator[tuple[str, Result | None]]:
    """(item, result) in the order of `items`; the result is None where the process died of it.

    start: a module's function; start(*arguments) is called once in each process and gives what does an item. Raises WorkError.
    All processes are stopped when the iterator ends, is closed or raises.
    """
    queue = enumerate(items)
    running: list[_Worker] = []
    done: dict[int, tuple[str, Result | None]] = {}
    told = 0
    try:
        running = [_launch(start, arguments) for _ in range(workers)]
        while running:
            heard = wait([w.connection for w in running])
            for worker in [w for w in running if w.connection in heard]:
                if (result := _received(worker)) is not None and worker.item is not None:
                    done[worker.item[0]] = worker.item[1], result
                elif result is None:
                    running.remove(worker)
                    if worker.item is None:
                        raise WorkError(f"a worker process died (exit code {worker.process.exitcode})")
                    done[worker.item[0]] = worker.item[1], None
                    running.append(_launch(start, arguments))
                    continue
                worker.item = next(queue, None)
                with suppress(BrokenPipeError):  # it died just now: it will be heard of as dead
                    worker.connection.send_bytes((worker.item[1] if worker.item else "").encode())
                if worker.item is None:
                    running.remove(worker)
                    worker.process.join(10)
            while told in done:
                yield done.pop(told)
                told += 1
    finally:
        for worker in running:
            worker.process.terminate()
            worker.process.join(10)


def _launch(start: Callable[..., Work], arguments: tuple[Any, ...]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, start, arguments), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _received(worker: _Worker) -> Result | None:
    """What the worker sent, None if it is dead. Raises WorkError for what its work raised."""
    try:
        content = json.loads(worker.connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        worker.process.join(10)
        return None
    if "error" in content:
        raise WorkError(content["error"])
    return cast(Result, content["result"])


def default_workers() -> int:
    """As many as this process may use cores."""
    return len(os.sched_getaffinity(0))
