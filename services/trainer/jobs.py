"""The jobs process: takes jobs from the stream and runs each in a worker thread. A job that was under way when the process
died, or when Redis went away, is taken up again; what it had already requested, counted and published is not repeated."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import redis
import structlog
import torch

from services.runtime.artifacts import ArtifactError
from services.runtime.jobs import ENDED, JobCancelledError, JobStore
from services.runtime.messages import JOBS, JobRequest
from services.runtime.streams import connect
from services.runtime.telemetry import serve_health, start_heartbeat
from services.trainer import evaluate, metrics, posttrain, rollouts, stage1
from services.trainer.consume import StoppingError, persist, serve_stream
from services.trainer.context import JobContext
from services.trainer.params import parse
from services.trainer.rollout import checks
from services.trainer.settings import TrainerSettings
from world2act.optimisation import device_of

log = structlog.get_logger()
GROUP = "trainer"

RUNNERS: dict[str, Callable[[JobContext, Any], dict[str, Any]]] = {
    "rollout": rollouts.run,
    "imagine": rollouts.run_imagine,
    "evaluate": evaluate.run,
    "posttrain": posttrain.run,
    "stage1": stage1.run,
}


class JobRunner:
    """Runs one request at a time; several threads may share one runner."""

    def __init__(self, settings: TrainerSettings, client: redis.Redis, stop: threading.Event) -> None:
        self.settings, self.client, self.stop = settings, client, stop
        self.jobs = JobStore(client)

    def handle(self, request: JobRequest) -> None:
        """Run `request` to its end, through outages of Redis. Raises StoppingError when the process is asked to stop."""
        metrics.JOBS_RUNNING.inc()
        try:
            persist(lambda: self._run(request), self.stop)
        finally:
            metrics.JOBS_RUNNING.dec()

    def _run(self, request: JobRequest) -> None:
        job = self.jobs.get(request.id)
        if job is None or job.status in ENDED:
            log.info("job needs no run", job=request.id, status=job.status if job else "unknown")
            return
        context = JobContext(request.id, self.settings, self.client, self.stop)
        context.recall_events()
        self.jobs.update(request.id, status="running", started=job.started or time.time(), message="running")
        log.info("job runs", job=request.id, kind=request.kind, again=bool(job.started))
        try:
            context.check()
            result = RUNNERS[request.kind](context, parse(request.kind, request.params))
        except JobCancelledError:
            self._end(request, "cancelled", message="cancelled")
        except (ValueError, ArtifactError) as error:
            self._end(request, "failed", error=str(error)[:1000], message="failed")
        except (StoppingError, redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            raise
        except Exception as error:
            log.exception("job failed", job=request.id)
            self._end(request, "failed", error=f"{type(error).__name__}; the trainer's log has the reason", message="failed")
        else:
            self._end(request, "succeeded", result=result, progress=1.0, message="done")

    def _end(self, request: JobRequest, status: str, **changes: Any) -> None:
        self.jobs.update(request.id, status=status, finished=time.time(), **changes)
        metrics.JOBS.labels(request.kind, status).inc()
        log.info("job ended", job=request.id, kind=request.kind, status=status, error=changes.get("error", ""))

    def buried(self, payload: str, error: str) -> None:
        """A job whose message went to the dead letters has failed, visibly."""
        try:
            request = JobRequest.model_validate_json(payload)
            self._end(request, "failed", error=error[:1000], message="failed")
        except (ValueError, KeyError):
            log.warning("dead letter names no job", error=error[:200])


def serve(settings: TrainerSettings, stop: threading.Event) -> None:
    """Run until `stop`. Raises ValueError for a signing key that is none, or a GPU that is not there."""
    settings.signer()
    device_of(settings.trainer_device)
    torch.set_num_threads(settings.torch_threads)
    client = connect(settings.redis_url)
    runner = JobRunner(settings, client, stop)
    health = serve_health("trainer", settings, checks(settings, connect(settings.redis_url, patient=False)))
    start_heartbeat(client, "trainer", settings.instance, stop)
    for kind, status in itertools.product(RUNNERS, ENDED):  # rate() does not see the first step of a counter that appears
        metrics.JOBS.labels(kind, status)
    serve_stream(
        settings,
        client,
        JOBS,
        GROUP,
        JobRequest,
        handlers=[runner.handle] * settings.job_workers,
        claim_seconds=settings.job_claim_seconds,
        buried=runner.buried,
        depth=metrics.JOB_QUEUE,
        stop=stop,
    )
    health.shutdown()
