"""The gateway's side of the other doors: Redis, the segmenter's queue, the simulator, Triton, the artifact store."""

from __future__ import annotations

import urllib.error
import urllib.request
import uuid
from typing import Any

import grpc
import redis
from celery import Celery
from celery.result import AsyncResult

from services.gateway.problems import ProblemError, invalid
from services.gateway.settings import GatewaySettings
from services.runtime import messages
from services.runtime.artifacts import ArtifactStore
from services.runtime.generated import policy_pb2
from services.runtime.generated.policy_pb2_grpc import PolicyStub
from services.runtime.generated.simulator_pb2 import DescribeRequest
from services.runtime.generated.simulator_pb2_grpc import SimulatorStub
from services.runtime.jobs import Job, JobStore
from services.runtime.messages import PolicyVersion
from services.runtime.policies import import_version
from services.runtime.rpc import connect_channel, healthy
from services.runtime.streams import backlog, connect
from services.runtime.telemetry import HEARTBEAT_SECONDS, Check, heartbeats, redis_check

SEGMENT_TASK, SEGMENT_QUEUE = "world2act.segment", "segment"
LOAD_SECONDS = 60.0
REFUSED = (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)
WORKERS, SILENT_S = ("segmenter", "worldmodel", "rollout", "trainer"), 5 * HEARTBEAT_SECONDS
STREAMS = (messages.JOBS, messages.ROLLOUT_REQUESTS, messages.IMAGINE_REQUESTS)


def _publishes_to(job: Job) -> str:
    return str(job.params.get("namespace") or job.id)


class Doors:
    """Connections that a request may need. Nothing here is held open to a service that is down: each call finds out anew."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.redis: redis.Redis = connect(settings.redis_url, patient=False)
        self.jobs = JobStore(self.redis)
        self.artifacts = ArtifactStore(settings.artifacts_url)
        self.celery = Celery("gateway", broker=settings.redis_url, backend=settings.redis_url)
        self.celery.conf.update(
            task_serializer="json",
            result_serializer="json",
            accept_content=["json"],
            task_default_queue=SEGMENT_QUEUE,
            broker_connection_timeout=2.0,
            broker_connection_retry=False,
            broker_transport_options={"socket_timeout": 2.0, "socket_connect_timeout": 2.0, "max_retries": 0},
            redis_socket_timeout=2.0,
            redis_socket_connect_timeout=2.0,
        )

    # -- segmenter -------------------------------------------------------------------------------------------------

    def send_segment(self, request: dict[str, Any]) -> str:
        """Queue a segmentation; returns the Celery id. Raises redis' ConnectionError at once when Redis is down."""
        self.redis.ping()
        task = uuid.uuid4().hex
        self.celery.send_task(
            SEGMENT_TASK, kwargs={"request": request}, task_id=task, queue=SEGMENT_QUEUE, serializer="json", retry=False
        )
        return task

    def segment_result(self, task: str) -> dict[str, Any] | None:
        """The segmenter's answer, None while there is none. Raises ProblemError: 422 for what it refused, 500 where it failed."""
        found = AsyncResult(task, app=self.celery)
        state, value = found.state, found.result
        if state == "SUCCESS" and isinstance(value, dict):
            if value.get("error"):
                sentence = str(value["error"])
                field = sentence.partition(":")[0]
                raise invalid(field, sentence) if field.isidentifier() else ProblemError(422, sentence)
            return value
        if state in ("SUCCESS", "FAILURE", "REVOKED"):
            raise ProblemError(500, f"the segmenter failed: {str(value)[:300]}", service="segmenter")
        return None

    def settle(self, job: Job) -> Job:
        """A segment job is run by Celery: bring its state up to date."""
        if job.kind != "segment" or job.status not in ("queued", "running"):
            return job
        try:
            result = self.segment_result(str(job.params.get("celery_id", "")))
        except ProblemError as problem:
            return self.jobs.update(job.id, status="failed", error=problem.detail, progress=1.0)
        if result is None:
            return job
        return self.jobs.update(job.id, status="succeeded", result=result, progress=1.0)

    # -- simulator, policy, Triton -----------------------------------------------------------------------------------

    def check_tasks(self, tasks: list[str], field: str) -> None:
        """422 that lists the simulator's tasks when one of `tasks` is unknown; 503 when no simulator answers."""
        known = self.describe_tasks()
        wrong = [t for t in tasks if t not in known]
        if wrong:
            raise invalid(field, f"{wrong[0][:80]!r} is unknown; the simulator has {', '.join(sorted(known))}")

    def describe_tasks(self) -> list[str]:
        addresses = self.settings.simulators()
        for address in addresses:
            with connect_channel(address) as channel:
                try:
                    reply = SimulatorStub(channel).Describe(DescribeRequest(), timeout=self.settings.check_timeout_s)  # type: ignore[no-untyped-call]
                except grpc.RpcError:
                    continue
                return [task.name for task in reply.tasks]
        raise ProblemError(503, f"simulator at {', '.join(addresses)} does not answer; try again", service="simulator")

    def need(self, *services: str) -> None:
        """503 naming the first of `services` (triton, vla) that does not answer."""
        checks = {"triton": self.triton_missing, "vla": self.vla_missing}
        for service in services:
            reason = checks[service]()
            if reason:
                raise ProblemError(503, f"{service} {reason}; try again", service=service)

    def triton_missing(self) -> str | None:
        url = f"{self.settings.triton_http()}/v2/health/ready"
        try:
            with urllib.request.urlopen(url, timeout=self.settings.check_timeout_s):
                return None
        except urllib.error.HTTPError as error:
            return f"at {self.settings.triton_http()} is not ready (status {error.code})"
        except (OSError, ValueError):
            return f"at {self.settings.triton_http()} does not answer"

    def import_policy(self, namespace: str, name: str) -> PolicyVersion:
        """Have the policy server check bundle `name` and publish it as the namespace's next version.

        Raises ProblemError: 422 with the server's sentence for what it refuses, 409 where a job publishes there, 503.
        """
        for job in self.jobs.recent(1000):
            if job.kind == "posttrain" and job.status in ("queued", "running") and namespace == _publishes_to(job):
                raise ProblemError(409, f"namespace: job {job.id} publishes its versions in {namespace!r}; choose another")

        def load(version: int) -> None:
            address = self.settings.vla()
            request = policy_pb2.LoadRequest(namespace=namespace, version=version, uri=name)
            with connect_channel(address) as channel:
                try:
                    PolicyStub(channel).Load(request, timeout=LOAD_SECONDS)  # type: ignore[no-untyped-call]
                except grpc.RpcError as error:
                    if error.code() in REFUSED:
                        raise invalid("file", str(error.details()).removeprefix(f"{name}: ")) from None
                    reason = f"at {address} does not answer" if error.code() == grpc.StatusCode.UNAVAILABLE else "failed"
                    raise ProblemError(503, f"vla {reason}; try again", service="vla") from None

        try:
            return import_version(self.redis, namespace, name, load)
        except redis.exceptions.LockError:
            raise ProblemError(409, f"namespace: another import into {namespace!r} is under way; try again") from None

    def vla_missing(self) -> str | None:
        address = self.settings.vla()
        return None if healthy(address, self.settings.check_timeout_s) else f"at {address} does not answer"

    # -- state of the whole ------------------------------------------------------------------------------------------

    def checks(self) -> dict[str, Check]:
        """What the gateway cannot work without."""
        return {"redis": redis_check(self.redis), "artifacts": self._artifacts_missing}

    def _artifacts_missing(self) -> str | None:
        return None if self.artifacts.fs.exists(self.artifacts.root) else "the artifact store's folder is not there"

    def others(self) -> dict[str, Check]:
        """What some requests need; without them the gateway still answers, naming them."""

        def simulator() -> str | None:
            try:
                self.describe_tasks()
            except ProblemError as problem:
                return problem.detail
            return None

        return {"triton": self.triton_missing, "vla": self.vla_missing, "simulator": simulator}

    def silent(self) -> dict[str, str]:
        """Workers that have no door to ask, by their heartbeats; empty while Redis, which is reported itself, is away."""
        try:
            ages = self.heartbeats()
        except redis.exceptions.RedisError:
            return {}
        found = {}
        for worker in WORKERS:
            age = min((a for name, a in ages.items() if name.split(":")[0] == worker), default=None)
            if age is None or age > SILENT_S:
                found[worker] = "has never given a heartbeat" if age is None else f"gave its last heartbeat {age:.0f} s ago"
        return found

    def backlogs(self) -> dict[str, int]:
        """Queue or stream/group -> entries that are not finished."""
        found: dict[str, int] = {f"celery:{SEGMENT_QUEUE}": int(self.redis.llen(SEGMENT_QUEUE))}
        for stream in STREAMS:
            try:
                groups: Any = self.redis.xinfo_groups(stream)
            except redis.exceptions.ResponseError:
                continue  # nobody has used it yet
            for group in groups:
                found[f"{stream}/{group['name']}"] = backlog(self.redis, stream, group["name"])
        found[messages.DEAD] = int(self.redis.xlen(messages.DEAD))
        return found

    def heartbeats(self) -> dict[str, float]:
        return {name: round(age, 1) for name, age in sorted(heartbeats(self.redis).items())}
