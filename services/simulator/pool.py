"""Environments in their own processes, lent to callers.

A slot is one process. A caller leases a free slot, resets and steps it, and closes it; a lease that nobody uses expires.
A process that dies, hangs or fails is replaced; whoever had an episode there gets `LostError` until it resets.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import prometheus_client
import structlog

from services.simulator.envs import base
from services.simulator.worker import Arrays, decode, encode, images_of, spec_from_json, work
from world2act.types import FloatArray

log = structlog.get_logger()
CONTEXT = multiprocessing.get_context("spawn")  # fork would copy gRPC's threads and locks
START_SECONDS = 120.0
MAX_WAITING = 48
WATCH_SECONDS = 0.5
RETRY_SECONDS = 5.0  # a process that dies before its first answer is not started again at once

RESTARTS = prometheus_client.Counter("w2a_simulator_restarts_total", "environment processes replaced")
LEASED = prometheus_client.Gauge("w2a_simulator_leased", "environments leased now")
EXPIRED = prometheus_client.Counter("w2a_simulator_leases_expired_total", "leases that ended because nobody used them")


class NotLeasedError(KeyError):
    """No such lease: never given, closed, or expired."""


class ExhaustedError(RuntimeError):
    """No environment became free in time."""


class LostError(RuntimeError):
    """The environment's process died or failed: its episode is lost, reset and start again."""


class Slot:
    """One environment process and its lease. `lock` is held by whoever talks to the process."""

    def __init__(self, simulator: str) -> None:
        self.simulator = simulator
        self.lock = threading.Lock()
        self.env_id: str | None = None
        self.used = 0.0
        self.task = ""  # of the running episode; empty before the first reset
        self.done = False
        self.lost = False
        self.process: BaseProcess | None = None
        self.start()

    def start(self) -> None:
        self.connection: Connection
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=work, args=(theirs, self.simulator), daemon=True)
        self.process.start()
        theirs.close()
        self.answered = False
        self.started = time.monotonic()

    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def replace(self, reason: str) -> None:
        """Kill the process and start another (which loads in the background). The running episode is lost."""
        log.warning("environment process replaced", reason=reason, pid=self.process.pid if self.process else None)
        RESTARTS.inc()
        self.stop()
        self.lost = self.lost or bool(self.task)
        self.task, self.done = "", False
        self.start()

    def stop(self) -> None:
        self.connection.close()
        if self.process is not None:
            self.process.kill()
            self.process.join(5)

    def send(self, message: bytes) -> None:
        try:
            self.connection.send_bytes(message)
        except OSError:
            raise LostError("its process died") from None

    def receive(self, seconds: float) -> tuple[dict[str, str], Arrays]:
        """The reply. Raises LostError when the process dies, fails or takes too long; InvalidInputError when it refuses."""
        limit = seconds if self.answered else max(seconds, START_SECONDS)  # the first answer waits for the imports
        try:
            if not self.connection.poll(limit):
                raise LostError(f"no answer within {limit:g} s")
            head, arrays = decode(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise LostError("its process died") from None
        self.answered = True
        if head["status"] == "invalid":
            raise base.InvalidInputError(head["message"])
        if head["status"] != "ok":
            raise LostError(f"the simulator failed: {head['message']}")
        return head, arrays


class Pool:
    """`environments` slots of `simulator`. Thread-safe. Raises InvalidInputError if unknown, LostError if it does not start."""

    def __init__(self, simulator: str, environments: int, lease_seconds: float, call_seconds: float) -> None:
        if simulator not in base.REGISTRY:
            raise base.InvalidInputError(
                f"simulator_name: {simulator[:80]!r} is unknown; choose one of {', '.join(base.REGISTRY)}"
            )
        self.lease_seconds, self.call_seconds = lease_seconds, call_seconds
        self._slots = [Slot(simulator) for _ in range(environments)]
        self._free = threading.Condition()  # guards env_id and used of all slots
        self._waiting = 0
        self._closed = threading.Event()
        self.spec = self._describe()
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="pool")
        self._watcher.start()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def pids(self) -> list[int]:
        return [slot.process.pid for slot in self._slots if slot.process is not None and slot.process.pid is not None]

    def alive(self) -> int:
        """How many environment processes run."""
        return sum(slot.alive() for slot in self._slots)

    def lease(self, wait_seconds: float) -> str:
        """Lease a free environment; returns its id. Raises ExhaustedError after `wait_seconds`, or when too many wait."""
        deadline = time.monotonic() + wait_seconds
        with self._free:
            while (slot := next((s for s in self._slots if s.env_id is None), None)) is None:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise ExhaustedError(f"no free environment within {wait_seconds:g} s; the pool has {len(self)}")
                if self._waiting >= MAX_WAITING:
                    raise ExhaustedError(f"{MAX_WAITING} callers wait for a free environment already")
                self._waiting += 1
                try:
                    self._free.wait(remaining)
                finally:
                    self._waiting -= 1
            slot.env_id, slot.used = uuid.uuid4().hex, time.monotonic()
            LEASED.inc()
            return slot.env_id

    def release(self, env_id: str) -> None:
        """End a lease; unknown ids are ignored, so that closing twice is harmless."""
        with self._free:
            for slot in self._slots:
                if slot.env_id == env_id:
                    self._end(slot)

    def reset(self, env_id: str, task: str, seed: int) -> base.Observation:
        """Start an episode. Raises NotLeasedError, LostError."""
        with self._held([env_id]) as (slot,):
            slot.task, slot.done, slot.lost = "", False, False
            if not slot.alive():
                slot.replace("its process died while idle")
            try:
                slot.send(encode({"op": "reset", "task": task, "seed": str(seed)}))
                head, arrays = slot.receive(self.call_seconds)
            except LostError as error:
                slot.replace(str(error))
                raise LostError(f"env_id {env_id}: {error}; reset again") from None
            slot.task = task
            return base.Observation(images_of(arrays), arrays["state"], head["instruction"])

    def step(self, chunks: Mapping[str, FloatArray], frames: base.Frames) -> dict[str, base.StepResult]:
        """Run one chunk in each environment, all at the same time; env_id -> result.

        Nothing moves unless every chunk is valid. Raises InvalidInputError, NotLeasedError, or LostError: then *all*
        environments of the call have lost their episodes, since some may have moved without the caller seeing it.
        """
        order = sorted(chunks)  # one order for all callers: two locks taken in two orders would block for ever
        with self._held(order) as slots:
            for env_id, slot in zip(order, slots, strict=True):
                if slot.lost or (slot.task and not slot.alive()):
                    slot.lost = True
                    raise LostError(f"env_id {env_id}: its process died; reset and start the episode again")
                if not slot.task:
                    raise base.InvalidInputError(f"env_id {env_id}: no episode is running; reset first")
                if slot.done:
                    raise base.InvalidInputError(f"env_id {env_id}: the episode limit is reached; reset first")
            return self._exchange(order, slots, chunks, frames)

    def _exchange(
        self, order: Sequence[str], slots: Sequence[Slot], chunks: Mapping[str, FloatArray], frames: base.Frames
    ) -> dict[str, base.StepResult]:
        """Send to all, then hear from all."""
        results: dict[str, base.StepResult] = {}
        failed: dict[str, str] = {}
        for env_id, slot in zip(order, slots, strict=True):
            try:
                slot.send(encode({"op": "step", "frames": frames}, {"actions": chunks[env_id]}))
            except LostError as error:
                failed[env_id] = str(error)
        for env_id, slot in zip(order, slots, strict=True):
            if env_id in failed:
                continue
            try:
                head, arrays = slot.receive(self.call_seconds)
                slot.done = head["done"] == "1"
                results[env_id] = base.StepResult(images_of(arrays), arrays["states"], head["success"] == "1", slot.done)
            except (LostError, base.InvalidInputError) as error:
                failed[env_id] = str(error)
        if failed:
            for env_id, slot in zip(order, slots, strict=True):
                slot.lost = True
                if env_id in failed:
                    slot.replace(failed[env_id])
                slot.task = ""
            reasons = "; ".join(f"env_id {env_id}: {reason}" for env_id, reason in failed.items())
            raise LostError(f"{reasons}; all episodes of this call are lost, reset them")
        return results

    def close(self) -> None:
        """Stop all processes."""
        self._closed.set()
        self._watcher.join(5)
        for slot in self._slots:
            slot.stop()

    @contextmanager
    def _held(self, env_ids: Sequence[str]) -> Iterator[list[Slot]]:
        """The slots of these leases, locked, their idle clocks stopped. Raises NotLeasedError naming the id."""
        with ExitStack() as stack:
            slots = []
            for env_id in env_ids:
                slot = self._find(env_id)
                stack.enter_context(slot.lock)
                if slot.env_id != env_id:  # expired or closed while we waited for the lock
                    raise NotLeasedError(env_id)
                slots.append(slot)
            try:
                yield slots
            finally:
                now = time.monotonic()
                for slot in slots:
                    slot.used = now

    def _find(self, env_id: str) -> Slot:
        with self._free:
            for slot in self._slots:
                if slot.env_id == env_id:
                    slot.used = time.monotonic()
                    return slot
        raise NotLeasedError(env_id)

    def _end(self, slot: Slot) -> None:
        slot.env_id, slot.task, slot.done, slot.lost = None, "", False, False
        LEASED.dec()
        self._free.notify()

    def _describe(self) -> base.EnvironmentSpec:
        slot = self._slots[0]
        slot.send(encode({"op": "describe"}))
        head, _ = slot.receive(START_SECONDS)
        return spec_from_json(head["spec"])

    def _watch(self) -> None:
        """Ends idle leases and replaces dead processes that nobody is talking to."""
        while not self._closed.wait(WATCH_SECONDS):
            for slot in self._slots:
                if not slot.lock.acquire(blocking=False):
                    continue  # in use: its caller notices a death itself
                try:
                    if not slot.alive() and (slot.answered or time.monotonic() - slot.started > RETRY_SECONDS):
                        slot.replace("its process died while idle")
                    with self._free:
                        if slot.env_id is not None and time.monotonic() - slot.used > self.lease_seconds:
                            log.warning("lease expired", env_id=slot.env_id)
                            EXPIRED.inc()
                            self._end(slot)
                finally:
                    slot.lock.release()
