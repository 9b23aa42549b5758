"""The rollout coordinator: worker threads that take episodes from the stream, execute them over gRPC, and publish results."""

from __future__ import annotations

import contextlib
import threading
import time
from functools import partial
from typing import Any, cast

import grpc
import numpy as np
import redis
import safetensors.numpy
import structlog

from services.runtime.artifacts import ArtifactStore
from services.runtime.generated.simulator_pb2 import CloseRequest
from services.runtime.generated.simulator_pb2_grpc import SimulatorStub
from services.runtime.jobs import ENDED, JobStore
from services.runtime.messages import ROLLOUT_REQUESTS, ImagineRequest, RolloutRequest, RolloutResult
from services.runtime.rpc import connect_channel, healthy, replicas
from services.runtime.streams import connect
from services.runtime.telemetry import Check, redis_check, serve_health, start_heartbeat
from services.trainer import metrics
from services.trainer.consume import StoppingError, persist, serve_stream
from services.trainer.doors import AWAY, BROKEN, Policy, Simulator
from services.trainer.episode import Recorded, closed_loop, closed_loop_starts, run_episode, store
from services.trainer.ledger import Ledger
from services.trainer.settings import TrainerSettings
from world2act.types import FloatArray

log = structlog.get_logger()
GROUP = "rollout"
BROKEN_TRIES = 3


class CancelledError(Exception):
    """The episode's job was cancelled, or ended, before the episode could run."""


def action_std(settings: TrainerSettings, size: int) -> FloatArray:
    """Standard deviation per action axis (A,), the unit of rollout noise: a setting, or the adapters' statistics.

    Raises ValueError where neither is there or the adapters are for another action size.
    """
    if settings.action_std > 0:
        return np.full(size, settings.action_std, np.float32)
    path = settings.zoo / "adapters.safetensors"
    if not path.is_file():
        raise ValueError(f"noise: its unit is unknown: {path} is missing and W2A_ACTION_STD is not set")
    std = np.array(safetensors.numpy.load_file(path)["actions.std"], np.float32)
    if len(std) != size:
        raise ValueError(f"noise: {path} has statistics of {len(std)} action axes, the simulator has {size}")
    return std


class Lease:
    """Remembers an environment in Redis while it is held, so that it can be given back if this process is killed."""

    def __init__(self, client: redis.Redis, key: str, address: str) -> None:
        self.client, self.key, self.address, self.member = client, key, address, ""

    def taken(self, env_id: str) -> None:
        self.member = f"{self.address}|{env_id}"
        self.client.sadd(self.key, self.member)

    def returned(self) -> None:
        if self.member:
            self.client.srem(self.key, self.member)


class Coordinator:
    """Executes requests; any number of threads and processes may do so at once."""

    def __init__(self, settings: TrainerSettings, client: redis.Redis, stop: threading.Event) -> None:
        self.settings, self.client, self.stop = settings, client, stop
        self.ledger = Ledger(client)
        self.jobs = JobStore(client)
        self.artifacts = ArtifactStore(settings.artifacts_url)
        self.leases = f"w2a:leases:rollout:{settings.instance}"

    def handle(self, request: RolloutRequest, worker: int = 0) -> None:
        """Execute and publish `request` unless its result is already there. Raises StoppingError when asked to stop."""
        persist(lambda: self._handle(request, worker), self.stop)

    def _handle(self, request: RolloutRequest, worker: int) -> None:
        if self.ledger.finished(request.job, request.id):
            return
        structlog.contextvars.bind_contextvars(job=request.job, episode=request.id)
        for outcome in metrics.OUTCOMES:  # at 0 before it counts: rate() does not see the first step of a counter that appears
            metrics.EPISODES.labels(request.task[:40], request.split[:20], outcome)
        imagine: ImagineRequest | None = None
        try:
            started, recorded = self._execute(request, worker)
            result = store(self.artifacts, request, recorded, self.settings.video_fps)
            if request.imagine:
                steps, guidance = self.settings.imagine_steps, self.settings.imagine_guidance
                starts, prompts = closed_loop_starts(
                    self.artifacts, result.trajectory, recorded.frames, recorded.prompts, request.horizon
                )
                imagine = closed_loop(request.job, starts, prompts, request.horizon, steps, guidance)
            changes = {"started": started, "finished": time.time(), "imagine_id": imagine.id if imagine else ""}
            result = result.model_copy(update=changes)
        except CancelledError:
            result = failed(request, "cancelled")
        except grpc.RpcError as error:
            result = failed(request, f"{error.code().name}: {error.details()}")
        except ValueError as error:
            result = failed(request, str(error))
        self.ledger.finish(result, imagine)
        outcome = "error" if result.error else "success" if result.success else "no success"
        metrics.EPISODES.labels(request.task[:40], request.split[:20], outcome).inc()
        metrics.CHUNKS.inc(result.chunks)
        if result.error:
            log.warning("episode failed", task=request.task, error=result.error[:300])

    def _execute(self, request: RolloutRequest, worker: int) -> tuple[float, Recorded]:
        """The episode, started again while a door is away; returns when the counting attempt began, and what it recorded."""
        version = request.version
        if version < 0:
            version = self.ledger.newest(request.namespace) or -1
        deadline = time.monotonic() + self.settings.rollout_patience
        broken = attempt = 0
        while True:
            if self.stop.is_set():
                raise StoppingError
            job = self.jobs.get(request.job)
            if self.jobs.cancelled(request.job) or (job is not None and job.status in ENDED):
                raise CancelledError
            started = time.time()
            try:
                recorded = self._attempt(request, version, worker + attempt)
                metrics.EPISODE_SECONDS.observe(time.time() - started)
                self.jobs.waits(request.job)
                return started, recorded
            except grpc.RpcError as error:
                broken += error.code() in BROKEN
                worth_it = error.code() in AWAY or (error.code() in BROKEN and broken < BROKEN_TRIES)
                if not worth_it or time.monotonic() > deadline:
                    raise
                metrics.RETRIES.labels(error.code().name).inc()
                log.info("episode waits for a door", code=error.code().name, details=str(error.details())[:200])
                self.jobs.waits(request.job, f"{error.details()} ({error.code().name})")
                attempt += 1
                self.stop.wait(min(2.0, 0.1 * 2**attempt))

    def _attempt(self, request: RolloutRequest, version: int, turn: int) -> Recorded:
        # Channels live for one attempt: a channel to a door that died waits ever longer before it connects again.
        addresses = replicas(self.settings.simulators())  # asked for each attempt: replicas come and go
        with connect_channel(addresses[turn % len(addresses)]) as sim, connect_channel(self.settings.vla()) as vla:
            lease = Lease(self.client, self.leases, addresses[turn % len(addresses)])
            simulator, policy = Simulator(sim, lease.taken), Policy(vla, self.ledger.artifact)
            std = action_std(self.settings, len(simulator.spec.action)) if request.noise else np.zeros_like(simulator.high)
            try:
                return run_episode(request, simulator, policy, version, std, self.settings.environment_wait)
            finally:
                simulator.close()
                lease.returned()

    def return_leases(self) -> None:
        """Give back what a process of this name held when it was killed: its environments would stay taken until they expire."""
        for address, env_id in (str(member).split("|", 1) for member in cast(Any, self.client.smembers(self.leases))):
            with contextlib.suppress(grpc.RpcError), connect_channel(address) as channel:
                stub: Any = SimulatorStub(channel)  # type: ignore[no-untyped-call]
                stub.Close(CloseRequest(env_ids=[env_id]), timeout=5)
        self.client.delete(self.leases)

    def buried(self, payload: str, error: str) -> None:
        """A request that went to the dead letters still gets an answer: its job must not wait for it."""
        try:
            request = RolloutRequest.model_validate_json(payload)
        except ValueError:
            return  # unreadable: nobody can be waiting for an episode without a name
        self.ledger.finish(failed(request, error))


def failed(request: RolloutRequest, error: str) -> RolloutResult:
    """The result of an episode that could not be executed."""
    now = time.time()
    return RolloutResult(
        id=request.id,
        job=request.job,
        task=request.task,
        split=request.split,
        index=request.index,
        round=request.round,
        started=now,
        finished=now,
        error=error[:500] or "unknown",
    )


def checks(settings: TrainerSettings, client: redis.Redis) -> dict[str, Check]:
    """Readiness: Redis, every simulator, the policy."""

    def door(address: str) -> Check:
        def check() -> str | None:
            sick = [replica for replica in replicas([address]) if not healthy(replica)]
            return f"no healthy server at {', '.join(sick)}" if sick else None

        return check

    simulators = {f"simulator {a}": door(a) for a in settings.simulators()}
    return {"redis": redis_check(client), "vla": door(settings.vla()), **simulators}


def serve(settings: TrainerSettings, stop: threading.Event) -> None:
    """Run until `stop`."""
    client = connect(settings.redis_url)
    coordinator = Coordinator(settings, client, stop)
    health = serve_health("rollout", settings, checks(settings, connect(settings.redis_url, patient=False)))
    start_heartbeat(client, "rollout", settings.instance, stop)
    with contextlib.suppress(StoppingError):
        persist(coordinator.return_leases, stop)
    serve_stream(
        settings,
        client,
        ROLLOUT_REQUESTS,
        GROUP,
        RolloutRequest,
        handlers=[partial(coordinator.handle, worker=number) for number in range(settings.rollout_workers)],
        claim_seconds=settings.rollout_claim_seconds,
        buried=coordinator.buried,
        depth=metrics.ROLLOUT_QUEUE,
        stop=stop,
    )
    health.shutdown()
