"""The imagination worker: w2a:imagine:requests -> Triton -> artifact -> w2a:imagined:<reply>.

At-least-once: a request is acknowledged after its result was published, and a redelivered one is answered from the cache.
While Triton is away the worker holds its requests and waits; it never drops one.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import redis
import structlog
from prometheus_client import Counter, Histogram

from services.runtime.artifacts import ArtifactStore
from services.runtime.messages import IMAGINE_REQUESTS, ImagineRequest, ImagineResult, imagined
from services.runtime.streams import Consumer, connect, publish
from services.runtime.telemetry import configure_logging, redis_check, serve_health, start_heartbeat, stop_on_signals
from services.worldmodel.client import MAX_ROWS, ImagineClient, Served, TritonFailedError, TritonUnavailableError
from services.worldmodel.imagination import Imagined, ServedChangedError, Task, imagine, read_task
from services.worldmodel.settings import WorldModelSettings
from world2act.data.video import encode_mp4

log = structlog.get_logger()
GROUP = "worldmodel"
SERVED_SECONDS = 5.0
"""How long the hashes of the served weights are trusted for cache look-ups. Results always carry their own."""
KEEP_SECONDS = 5.0
FAILURES = 3
"""A request whose computation failed inside Triton this often, alone, is answered with an error."""
FAILED_SECONDS = 5.0
"""Pause after such a failure: time for the launcher to notice a dead backend, so that one death counts once per request."""

REQUESTS = Counter("w2a_imagine_requests_total", "Imagination requests answered", ["outcome"])
ROWS = Counter("w2a_imagine_rows_total", "Rows (clips with all their skills) imagined, cache hits not counted")
CHUNKS = Counter("w2a_imagine_chunks_total", "Chunks (latents) imagined, cache hits not counted")
HITS = Counter("w2a_imagine_cache_hits_total", "Requests answered from the cache")
for _outcome in ("hit", "computed", "refused", "failed"):  # rate() does not see the first step of a counter that appears
    REQUESTS.labels(_outcome)
SECONDS = Histogram(
    "w2a_imagine_seconds", "From taking a request to its result", buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
)
RETRIES = Counter("w2a_imagine_retries_total", "Times the worker had to wait for Triton or Redis")


class ImaginationWorker:
    """Answers ImagineRequests. `run` blocks until `stop` is set; unfinished requests stay pending for the next worker."""

    def __init__(self, client: redis.Redis, store: ArtifactStore, triton: ImagineClient, settings: WorldModelSettings) -> None:
        self.client, self.store, self.triton, self.settings = client, store, triton, settings
        self.consumer = Consumer(client, IMAGINE_REQUESTS, GROUP, f"worldmodel-{settings.instance}", ImagineRequest)
        self._served: tuple[float, Served] | None = None
        self._kept = 0.0

    def run(self, stop: threading.Event) -> None:
        size = self.settings.imagine_batch
        while not stop.is_set():
            try:
                entries = self.consumer.fetch(size)
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
                log.warning("redis is away, waiting", error=str(error)[:200])
                stop.wait(0.5)
                continue
            for first in range(0, len(entries), size):
                self._work(dict(entries[first : first + size]), stop)

    def _work(self, pending: dict[str, ImagineRequest], stop: threading.Event) -> None:
        """Answer `pending` (entry -> request), waiting as long as Triton or Redis is away."""
        delay, started = 0.2, time.time()
        failures: dict[str, int] = {}
        while pending and not stop.is_set():
            try:
                self._answer(pending, started, failures)
                continue
            except ServedChangedError:
                log.info("triton serves other weights now")
            except (TritonUnavailableError, redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
                RETRIES.inc()
                log.warning("waiting", requests=len(pending), error=str(error)[:300])
                stop.wait(FAILED_SECONDS if isinstance(error, TritonFailedError) else delay)
                delay = min(2 * delay, 5.0)
            self._served = None
            self._keep(pending)

    def _keep(self, pending: dict[str, ImagineRequest]) -> None:
        """Tell the group that we are still on these, at most every five seconds."""
        if pending and time.monotonic() - self._kept > KEEP_SECONDS:
            try:
                self.consumer.keep(*pending)
                self._kept = time.monotonic()
            except redis.exceptions.RedisError as error:
                log.warning("could not keep requests", error=str(error)[:200])

    def _current(self) -> Served:
        if self._served is None or time.monotonic() - self._served[0] > SERVED_SECONDS:
            self._served = (time.monotonic(), self.triton.served())
        return self._served[1]

    def _answer(self, pending: dict[str, ImagineRequest], started: float, failures: dict[str, int]) -> None:
        """Answer all of `pending` once; each answered entry leaves it. Equal requests are computed once."""
        served = self._current()
        tasks: dict[str, Task] = {}
        waiting: dict[str, list[str]] = {}
        for entry, request in list(pending.items()):
            try:
                task = read_task(request, self.store, served, self.settings.video_fps)
            except ValueError as error:
                self._refuse(pending, [entry], started, str(error))
                continue
            found = self._recall(task.key)
            if found is not None:
                self._publish(pending, [entry], started, served, found, hit=True)
            else:
                tasks[task.key] = task
                waiting.setdefault(task.key, []).append(entry)
        for group in self._groups(list(tasks.values()), failures):
            self._compute(pending, group, waiting, started, served, failures)

    def _groups(self, tasks: list[Task], failures: dict[str, int]) -> list[list[Task]]:
        """Tasks that fill a call together, so that the first results do not wait for the last; those that were in a failed
        computation before each alone, to find the guilty one."""
        groups: list[list[Task]] = []
        rows = MAX_ROWS
        for task in [t for t in tasks if t.key not in failures]:
            rows += len(task.frames)
            if rows > MAX_ROWS:
                groups.append([])
                rows = len(task.frames)
            groups[-1].append(task)
        return [*groups, *([t] for t in tasks if t.key in failures)]

    def _compute(
        self,
        pending: dict[str, ImagineRequest],
        tasks: list[Task],
        waiting: dict[str, list[str]],
        started: float,
        served: Served,
        failures: dict[str, int],
    ) -> None:
        def generate(*arguments: Any, **named: Any) -> Any:
            self._keep(pending)
            return self.triton.imagine(*arguments, **named)

        try:
            results = imagine(tasks, generate, served)
            stored = [self._store(task, result, served) for task, result in zip(tasks, results, strict=True)]
        except (ServedChangedError, OSError, redis.exceptions.RedisError):
            raise
        except TritonUnavailableError as error:
            if isinstance(error, TritonFailedError):
                for task in tasks:
                    failures[task.key] = failures.get(task.key, 0) + 1
                if len(tasks) == 1 and failures[tasks[0].key] >= FAILURES:
                    self._bury(pending, waiting[tasks[0].key], started, str(error))
                    return
            raise
        except Exception as error:  # refused, or a bug: answer, so that nobody waits forever, and go on
            if len(tasks) > 1:
                for task in tasks:
                    self._compute(pending, [task], waiting, started, served, failures)
            elif isinstance(error, ValueError):
                self._refuse(pending, waiting[tasks[0].key], started, str(error))
            else:
                self._bury(pending, waiting[tasks[0].key], started, f"{type(error).__name__}: {error}")
            return
        for task, names in zip(tasks, stored, strict=True):
            self._publish(pending, waiting[task.key], started, served, names, hit=False)

    def _recall(self, key: str) -> dict[str, Any] | None:
        """What was stored under `key`, if all its artifacts are still there."""
        text = self.store.recall(key)
        if text is None:
            return None
        found: dict[str, Any] = json.loads(text)
        return found if all(self.store.exists(name) for name in (found["artifact"], *found["videos"])) else None

    def _store(self, task: Task, result: Imagined, served: Served) -> dict[str, Any]:
        """Artifacts first, the cache entry that names them last."""
        arrays: dict[str, Any] = {"embeddings": result.embeddings, "mask": result.mask}
        if result.latents is not None:
            arrays["latents"] = result.latents
        hashes = {"worldmodel_hash": served.worldmodel.hash, "adapters_hash": served.adapters_hash}
        videos = [self.store.put(encode_mp4(frames, self.settings.video_fps), "mp4") for frames in result.videos]
        stored = {"artifact": self.store.put_tensors(arrays, hashes), "videos": videos}
        self.store.remember(task.key, json.dumps(stored))
        ROWS.inc(len(task.frames))
        CHUNKS.inc(int(result.mask.sum()))
        return stored

    def _publish(
        self,
        pending: dict[str, ImagineRequest],
        entries: Sequence[str],
        started: float,
        served: Served,
        stored: dict[str, Any],
        *,
        hit: bool,
    ) -> None:
        for i, entry in enumerate(entries):
            cached = hit or i > 0  # of equal requests taken together only the first was computed
            fields = {"worldmodel_hash": served.worldmodel.hash, "adapters_hash": served.adapters_hash, "cache_hit": cached}
            self._reply(pending, entry, started, "hit" if cached else "computed", **stored, **fields)
            if cached:
                HITS.inc()
            self.consumer.ack(entry)
            del pending[entry]

    def _refuse(self, pending: dict[str, ImagineRequest], entries: Sequence[str], started: float, error: str) -> None:
        """An invalid request: whoever asked learns why."""
        for entry in entries:
            log.warning("request refused", id=pending[entry].id, error=error[:300])
            self._reply(pending, entry, started, "refused", error=error[:1000])
            self.consumer.ack(entry)
            del pending[entry]

    def _bury(self, pending: dict[str, ImagineRequest], entries: Sequence[str], started: float, error: str) -> None:
        """A request that cannot be computed for a reason of ours: an error to whoever asked, and a dead letter for us."""
        for entry in entries:
            self._reply(pending, entry, started, "failed", error=error[:1000])
            self.consumer.bury(entry, pending[entry].model_dump_json(), error)
            del pending[entry]

    def _reply(self, pending: dict[str, ImagineRequest], entry: str, started: float, outcome: str, **fields: Any) -> None:
        request, now = pending[entry], time.time()
        result = ImagineResult(id=request.id, reply=request.reply, started=started, finished=now, **fields)
        publish(self.client, imagined(request.reply), result)
        REQUESTS.labels(outcome).inc()
        SECONDS.observe(now - started)


def main(settings: WorldModelSettings) -> None:
    """Run until SIGTERM or SIGINT."""
    configure_logging("worldmodel", settings)
    stop = stop_on_signals()
    client = connect(settings.redis_url)
    watcher = ImagineClient(settings.triton())  # readiness is asked from another thread than work
    checks = {"redis": redis_check(connect(settings.redis_url, patient=False)), "triton": watcher.missing}
    try:
        health = serve_health("worldmodel", settings, checks)
    except OSError as error:
        raise SystemExit(str(error)) from None
    start_heartbeat(client, "worldmodel", settings.instance, stop)
    triton = ImagineClient(settings.triton(), settings.imagine_timeout)
    log.info("ready", triton=settings.triton(), artifacts=settings.artifacts_url)
    ImaginationWorker(client, ArtifactStore(settings.artifacts_url), triton, settings).run(stop)
    health.shutdown()
    log.info("stopped")
