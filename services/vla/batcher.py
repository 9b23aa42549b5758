"""Batching across clients with a bounded wait: one thread computes, request threads wait for their rows."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

import prometheus_client
import structlog

log = structlog.get_logger()
BATCH_ROWS = prometheus_client.Histogram(
    "w2a_vla_batch_rows", "Observations in one batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256)
)
BATCH_REQUESTS = prometheus_client.Histogram("w2a_vla_batch_requests", "Requests in one batch", buckets=(1, 2, 4, 8, 16, 32, 64))
QUEUED = prometheus_client.Gauge("w2a_vla_queued_requests", "Requests that wait for a batch")


class Sized(Protocol):
    def __len__(self) -> int: ...


Request = TypeVar("Request", bound=Sized)
Result = TypeVar("Result")


class Batcher(Generic[Request, Result]):
    """Collects requests until `max_rows` rows are there or the oldest has waited `max_wait` seconds, then computes them together.

    `compute` takes the requests of a batch and returns for each its result or the exception that it alone gets.
    A request never waits longer than `max_wait` unless a batch is being computed; then what has gathered goes next, at once.
    """

    def __init__(
        self, compute: Callable[[Sequence[Request]], Sequence[Result | Exception]], max_rows: int, max_wait: float
    ) -> None:
        self._compute, self._max_rows, self._max_wait = compute, max_rows, max_wait
        self._waiting: deque[tuple[float, Request, Future[Result]]] = deque()
        self._rows = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Result]:
        """A future of the request's result; cancel it and its rows are not computed if they have not begun."""
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._waiting.append((time.monotonic(), request, future))
            self._rows += len(request)
            QUEUED.set(len(self._waiting))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Compute what waits, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def _take(self) -> list[tuple[Request, Future[Result]]] | None:
        """The next batch; None when closed and empty."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            due = self._waiting[0][0] + self._max_wait
            while self._rows < self._max_rows and not self._closed and (left := due - time.monotonic()) > 0:
                self._changed.wait(left)
            taken: list[tuple[Request, Future[Result]]] = []
            rows = 0
            while self._waiting and (not taken or rows + len(self._waiting[0][1]) <= self._max_rows):
                _, request, future = self._waiting.popleft()
                rows += len(request)
                taken.append((request, future))
            self._rows -= rows
            QUEUED.set(len(self._waiting))
            return taken

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            batch = [(request, future) for request, future in taken if future.set_running_or_notify_cancel()]
            if not batch:
                continue
            BATCH_ROWS.observe(sum(len(request) for request, _ in batch))
            BATCH_REQUESTS.observe(len(batch))
            results: Sequence[Result | Exception]
            try:
                results = self._compute([request for request, _ in batch])
            except Exception as error:
                log.exception("batch failed", requests=len(batch))
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
