"""What every job gets: its stores, and the two reasons to stop."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import redis
import structlog
from pydantic import ValidationError

from services.runtime.artifacts import ArtifactStore
from services.runtime.jobs import JobStore
from services.runtime.messages import (
    ImagineRequest,
    ImagineResult,
    Message,
    RolloutRequest,
    RolloutResult,
    imagined,
    trajectories,
)
from services.trainer.consume import StoppingError
from services.trainer.ledger import Ledger
from services.trainer.settings import TrainerSettings

log = structlog.get_logger()
POLL_MS = 300


@dataclass
class JobContext:
    """One running job. `emitted`: what its event stream already holds, so that a job that is taken up again repeats nothing."""

    id: str
    settings: TrainerSettings
    client: redis.Redis
    stop: threading.Event
    emitted: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.client)
        self.jobs = JobStore(self.client)
        self.artifacts = ArtifactStore(self.settings.artifacts_url)

    def check(self) -> None:
        """Raises StoppingError when the process ends, JobCancelledError when the user deleted the job."""
        if self.stop.is_set():
            raise StoppingError
        self.jobs.raise_if_cancelled(self.id)

    def recall_events(self) -> None:
        """Fill `emitted` from the job's event stream."""
        after = "0"
        while batch := list(self.jobs.events(self.id, after)):
            after = batch[-1][0]
            self.emitted.update((name, str(data["key"])) for _, name, data in batch if "key" in data)

    def event(self, name: str, key: str, data: dict[str, Any]) -> None:
        """A progress event that is sent once, whatever is killed and repeated; `key` tells events of one name apart."""
        if (name, key) not in self.emitted:
            self.jobs.event(self.id, name, {"key": key, **data}, once=key)
            self.emitted.add((name, key))

    def progress(self, value: float, message: str) -> None:
        """The job's progress in [0, 1] and what it is doing, or waits for."""
        if reason := self.jobs.waits_for(self.id):
            message = f"{message}, waits: {reason}"
        self.jobs.update(self.id, progress=round(min(max(value, 0.0), 1.0), 4), message=message)


class Reader:
    """Reads whole streams from their beginning, keeping its own place; unreadable entries are logged and passed over."""

    def __init__(self, client: redis.Redis, streams: Mapping[str, type[Message]]) -> None:
        self.client, self.models = client, dict(streams)
        self.places: dict[Any, Any] = dict.fromkeys(self.models, "0")

    def poll(self, block_ms: int = POLL_MS) -> list[Message]:
        """New messages in the order of their streams; waits up to `block_ms` for the first."""
        found: list[Message] = []
        for stream, entries in cast(Any, self.client.xread(self.places, count=200, block=block_ms)) or []:
            for entry, fields in entries:
                self.places[stream] = entry
                try:
                    found.append(self.models[stream].model_validate_json(fields.get("json", "")))
                except ValidationError as error:
                    log.warning("unreadable message passed over", stream=stream, entry=entry, error=str(error)[:300])
        return found


def answers(context: JobContext) -> Reader:
    """A reader of everything that comes back to this job: executed episodes and imaginations."""
    return Reader(context.client, {trajectories(context.id): RolloutResult, imagined(context.id): ImagineResult})


def run_all(
    context: JobContext,
    rollouts: list[RolloutRequest],
    imagines: list[ImagineRequest],
    on_progress: Any = None,
) -> tuple[dict[str, RolloutResult], dict[str, ImagineResult]]:
    """Have everything executed and imagined, with at most `in_flight` episodes asked for at a time; results by request id.

    Calls on_progress(done, of) as they come. Raises ValueError with the reason when one failed.
    """
    executed: dict[str, RolloutResult] = {}
    imagined_: dict[str, ImagineResult] = {}
    wanted, wanted_imagines = {r.id for r in rollouts}, {i.id for i in imagines}
    for request in imagines:
        context.ledger.publish_imagine(request)
    reader = answers(context)
    sent = 0
    while len(executed) < len(wanted) or len(imagined_) < len(wanted_imagines):
        context.check()
        while sent < len(rollouts) and sent - len(executed) < context.settings.in_flight:
            context.ledger.request(rollouts[sent])
            sent += 1
        for message in reader.poll():
            if isinstance(message, RolloutResult) and message.id in wanted:
                if message.error:
                    raise ValueError(f"{message.task} {message.split} {message.index}: {message.error}")
                executed.setdefault(message.id, message)
            elif isinstance(message, ImagineResult) and message.id in wanted_imagines:
                if message.error:
                    raise ValueError(f"imagine: {message.error}")
                imagined_.setdefault(message.id, message)
        if on_progress is not None:
            on_progress(len(executed) + len(imagined_), len(wanted) + len(wanted_imagines))
    return executed, imagined_
