"""The Celery application and its one task, `world2act.segment`.

Delivery is at least once: a task is acknowledged when it is done, and one whose worker died comes back after the visibility
timeout. So the task is idempotent: its key is the hash of the request, its result is stored once under that key, and a second
delivery, or a second equal request, answers from there. A request that kills its worker again and again goes to the dead letters.
JSON only, in and out; anything else is refused by Celery before it is decoded.
"""

from __future__ import annotations

import json
import time
from typing import Any

import redis
import structlog
from celery import Celery
from prometheus_client import Counter, Histogram

from services.runtime.artifacts import ArtifactStore, content_key
from services.runtime.llm import LLMUnavailableError
from services.runtime.messages import DEAD, DeadLetter
from services.runtime.streams import connect, publish
from services.segmenter.segment import Cutter, run_request
from services.segmenter.settings import SegmenterSettings
from services.segmenter.transport import tolerant_transport
from world2act import __version__

TASK = "world2act.segment"
QUEUE = "segment"

log = structlog.get_logger()
REQUESTS = Counter("w2a_segment_requests_total", "requests by outcome: done, cached, bad, dead", ["outcome"])
EPISODES = Counter("w2a_segment_episodes_total", "episodes by outcome: synced, discarded", ["outcome"])
TOKENS = Counter("w2a_segment_llm_tokens_total", "tokens of the language model: prompt, completion", ["kind"])
SECONDS = Histogram("w2a_segment_seconds", "time of one request, not from the cache")


def make_app(settings: SegmenterSettings) -> Celery:
    """The Celery application of this service. Connects to nothing yet."""
    client = connect(settings.redis_url)
    store = ArtifactStore(settings.artifacts_url)

    def bury(payload: str, error: str) -> None:
        log.error("dead letter", stream=QUEUE, error=error)
        REQUESTS.labels("dead").inc()
        publish(client, DEAD, DeadLetter(stream=QUEUE, entry="", payload=payload[:2000], error=error))

    model = Cutter.of_model(settings, store)
    app = Celery("segmenter", broker=settings.redis_url, backend=settings.redis_url)
    app.conf.update(
        broker_transport=tolerant_transport(bury),
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        result_accept_content=["json"],
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_track_started=True,
        task_default_queue=QUEUE,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        result_expires=settings.segment_result_seconds,
        result_backend_always_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": settings.segment_visibility_seconds,
            # kombu looks for tasks of dead workers every 100 s by default, and a worker killed while looking bars the others.
            "unacked_restore_interval": 2,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 10,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
    )

    @app.task(  # type: ignore[untyped-decorator]
        name=TASK,
        typing=False,
        resultrepr_maxsize=64,  # a result holds a series, which is not for the log
        autoretry_for=(OSError, redis.exceptions.RedisError),
        retry_backoff=True,
        max_retries=5,
    )
    def segment(*args: Any, **kwargs: Any) -> dict[str, Any]:
        if args or set(kwargs) != {"request"}:
            return {"error": "request: the task takes one keyword argument, 'request'"}
        return segment_once(kwargs["request"], settings, store, client, model)

    return app


def segment_once(
    request: Any, settings: SegmenterSettings, store: ArtifactStore, client: redis.Redis, model: Cutter | None = None
) -> dict[str, Any]:
    """The result of `request`: stored under its content key by the first delivery that ends, and answered from there after."""
    by_model = model is not None and isinstance(request, dict) and request.get("planner") == "llm"
    asked = [settings.llm_base_url, settings.llm_model] if by_model else []
    key = content_key("segment", __version__, request, *asked)
    done, attempts = f"w2a:segment:result:{key}", f"w2a:segment:attempts:{key}"
    if (stored := client.get(done)) is not None:
        REQUESTS.labels("cached").inc()
        return dict(json.loads(str(stored)))
    started = int(str(client.incr(attempts)))
    client.expire(attempts, settings.segment_result_seconds)
    if started > settings.segment_attempts:
        error = f"request: its worker died {started - 1} times; it is given up (dead letter {DEAD})"
        publish(client, DEAD, DeadLetter(stream=QUEUE, entry=key, payload=json.dumps(request)[:2000], error=error))
        client.delete(attempts)
        REQUESTS.labels("dead").inc()
        return {"error": error}
    before = time.perf_counter()
    try:
        result = run_request(request, settings, store, model)
    except LLMUnavailableError:
        client.delete(attempts)  # no worker died; what the model has answered is kept, so the next try goes on from there
        raise
    seconds = time.perf_counter() - before
    if not result.pop("again", False):
        client.set(done, json.dumps(result), nx=True, ex=settings.segment_result_seconds)
    client.delete(attempts)
    SECONDS.observe(seconds)
    for kind in ("prompt", "completion"):
        TOKENS.labels(kind).inc(result.get("llm", {}).get(f"{kind}_tokens", 0))
    REQUESTS.labels("bad" if "error" in result else "done").inc()
    for episode in result.get("episodes", []):
        EPISODES.labels("discarded" if episode["discarded"] else "synced").inc()
    log.info(
        "segmented", key=key[:12], episodes=len(result.get("episodes", [])), seconds=round(seconds, 3), error=result.get("error")
    )
    return result
