"""Jobs: what the gateway accepts and the trainer runs. State is a Redis hash, progress a Redis stream, cancellation a flag."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal, cast

import redis
from pydantic import BaseModel

from services.runtime.messages import JOBS, JobRequest
from services.runtime.streams import publish

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ENDED = ("succeeded", "failed", "cancelled")
KEEP_SECONDS = 30 * 24 * 3600
WAIT_SECONDS = 120
EVENTS = 20_000
"""About so many of a job are kept."""

# One step, because a client that lost Redis before the answer asks again: the event must not stand there twice.
_TELL_ONCE = """
if redis.call('SADD', KEYS[2], ARGV[1]) == 0 then return 0 end
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[4], '*', 'name', ARGV[2], 'data', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('EXPIRE', KEYS[2], ARGV[5])
return 1
"""


class JobCancelledError(Exception):
    """The user deleted the job; whoever runs it stops at the next step."""


class Job(BaseModel):
    """A job as GET /jobs/{id} shows it. Times are Unix seconds."""

    id: str
    kind: str
    status: Status = "queued"
    params: dict[str, Any] = {}
    progress: float = 0.0
    message: str = ""
    result: dict[str, Any] = {}
    error: str = ""
    created: float = 0.0
    started: float = 0.0
    finished: float = 0.0


class JobStore:
    """Reads and writes jobs. Every change of state is also an event, which GET /jobs/{id}/events streams."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self._tell_once = client.register_script(_TELL_ONCE)

    def _key(self, job: str) -> str:
        return f"w2a:job:{job}"

    def create(self, kind: str, params: dict[str, Any], *, queue: bool = True) -> Job:
        """Store a queued job and put its request on the jobs stream; `queue=False`: its creator sees to its running."""
        job = Job(id=uuid.uuid4().hex[:16], kind=kind, params=params, created=time.time())
        self._save(job)
        if queue:
            publish(self.client, JOBS, JobRequest.model_validate({"id": job.id, "kind": kind, "params": params}))
        return job

    def _save(self, job: Job, client: redis.Redis | None = None) -> None:
        (self.client if client is None else client).set(self._key(job.id), job.model_dump_json(), ex=KEEP_SECONDS)

    def get(self, job: str) -> Job | None:
        data = self.client.get(self._key(job))
        return Job.model_validate_json(str(data)) if data else None

    def recent(self, limit: int = 100) -> list[Job]:
        """The `limit` newest jobs, newest first."""
        keys = list(self.client.scan_iter(self._key("?" * 16), count=1000))
        found = [Job.model_validate_json(str(data)) for data in cast(Any, self.client.mget(keys) if keys else []) if data]
        return sorted(found, key=lambda job: job.created, reverse=True)[:limit]

    def update(self, job: str, **changes: Any) -> Job:
        """Change fields; an ended job does not change its status again."""
        found = self.get(job)
        if found is None:
            raise KeyError(job)
        if found.status in ENDED:
            changes.pop("status", None)
        updated = found.model_copy(update=changes)
        shown = {"status": updated.status, "progress": updated.progress, "message": updated.message, "error": updated.error}
        with self.client.pipeline(transaction=True) as pipe:  # who sees the state also finds its event
            self._save(updated, pipe)
            self._append(pipe, job, "status", shown)
            pipe.execute()
        return updated

    def event(self, job: str, name: str, data: dict[str, Any], once: str = "") -> None:
        """Append a progress event. once: tells events of one name apart; the second of a kind is not appended."""
        if not once:
            return self._append(self.client, job, name, data)
        key = self._key(job)
        shown = json.dumps({"time": time.time(), **data})
        self._tell_once([f"{key}:events", f"{key}:told"], [f"{name}/{once}", name, shown, EVENTS, KEEP_SECONDS])

    def _append(self, client: redis.Redis, job: str, name: str, data: dict[str, Any]) -> None:
        key = f"{self._key(job)}:events"
        fields: dict[Any, Any] = {"name": name, "data": json.dumps({"time": time.time(), **data})}
        client.xadd(key, fields, maxlen=EVENTS, approximate=True)
        client.expire(key, KEEP_SECONDS)

    def events(self, job: str, after: str = "0", block_ms: int | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(entry id, name, data) after `after`; with `block_ms` waits that long for the first."""
        reply = cast(Any, self.client.xread({f"{self._key(job)}:events": after}, count=1000, block=block_ms))
        for _, entries in reply or []:
            for entry, fields in entries:
                yield entry, fields["name"], json.loads(fields["data"])

    def cancel(self, job: str) -> Job:
        """Ask whoever runs it to stop; a queued job ends at once."""
        self.client.set(f"{self._key(job)}:cancel", "1", ex=KEEP_SECONDS)
        found = self.get(job)
        if found is None:
            raise KeyError(job)
        if found.status == "queued":
            return self.update(job, status="cancelled", finished=time.time(), message="cancelled before it started")
        return found

    def cancelled(self, job: str) -> bool:
        return bool(self.client.exists(f"{self._key(job)}:cancel"))

    def waits(self, job: str, reason: str = "") -> None:
        """Say what an episode of the job waits for, or that it goes on; forgotten by itself where nobody waits any more."""
        if reason:
            self.client.set(f"{self._key(job)}:waits", reason[:300], ex=WAIT_SECONDS)
        else:
            self.client.delete(f"{self._key(job)}:waits")

    def waits_for(self, job: str) -> str:
        """What an episode of the job waits for; empty where all goes on."""
        return str(self.client.get(f"{self._key(job)}:waits") or "")

    def raise_if_cancelled(self, job: str) -> None:
        if self.cancelled(job):
            raise JobCancelledError(job)
