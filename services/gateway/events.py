"""A job's progress as server-sent events, resumable by Last-Event-ID."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import anyio
import redis
from sse_starlette import ServerSentEvent

from services.gateway.doors import Doors
from services.gateway.problems import ProblemError
from services.runtime.jobs import ENDED, Job

PAUSE = 0.25
ENTRY = re.compile(r"^\d{1,20}(-\d{1,20})?$")


def start_after(last_event_id: str | None) -> str:
    """The stream entry to go on after. 400 for what is no entry's id."""
    if not last_event_id:
        return "0"
    if not ENTRY.match(last_event_id):
        raise ProblemError(400, "Last-Event-ID: must be the id of an event of this job, such as 1700000000000-0")
    return last_event_id


def _poll(doors: Doors, job: str, after: str) -> tuple[Job | None, list[tuple[str, str, dict[str, Any]]]]:
    """State first, then events: what ended before the read has its last event in the read."""
    found = doors.jobs.get(job)
    found = doors.settle(found) if found is not None else None
    return found, list(doors.jobs.events(job, after))


async def stream(doors: Doors, job: str, after: str) -> AsyncIterator[ServerSentEvent]:
    """Every event after `after`, then as they come; ends with one `end` event that holds the whole job.

    Waits through an absence of Redis: the client sees comments (pings) meanwhile.
    """
    while True:
        try:
            found, events = await anyio.to_thread.run_sync(_poll, doors, job, after)
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            await anyio.sleep(1.0)
            continue
        for entry, name, data in events:
            after = entry
            yield ServerSentEvent(data=json.dumps(data), event=name, id=entry)
        if found is None:
            return
        if found.status in ENDED and not events:
            yield ServerSentEvent(data=found.model_dump_json(), event="end", id=None if after == "0" else after)
            return
        if not events:
            await anyio.sleep(PAUSE)
