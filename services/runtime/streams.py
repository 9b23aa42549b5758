"""Redis Streams with consumer groups: at-least-once delivery, so handlers are idempotent by the message's id.

A consumer claims what a dead one left (XAUTOCLAIM after `claim_ms`), sends what it cannot parse, or what failed
`max_deliveries` times, to the dead-letter stream, and survives Redis being away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

import redis
import structlog
from pydantic import ValidationError
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from services.runtime.messages import DEAD, DeadLetter, Message

log = structlog.get_logger()
T = TypeVar("T", bound=Message)


def connect(url: str, *, patient: bool = True) -> redis.Redis:
    """A client with decoded replies. `patient` retries for about ten seconds (workers); else fails at once (the gateway)."""
    retry = Retry(ExponentialBackoff(cap=1.0, base=0.05), 12 if patient else 0)
    errors: list[type[Exception]] = [redis.exceptions.ConnectionError, redis.exceptions.TimeoutError]
    timeout = 30.0 if patient else 2.0
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        retry=retry,
        retry_on_error=errors,
        socket_timeout=timeout,
        socket_connect_timeout=2.0,
        protocol=2,
    )


def publish(client: redis.Redis, stream: str, message: Message, *, maxlen: int = 100_000) -> str:
    """Append `message`; the stream keeps about `maxlen` entries. Returns the entry's id."""
    return cast(str, client.xadd(stream, {"json": message.model_dump_json()}, maxlen=maxlen, approximate=True))


def backlog(client: redis.Redis, stream: str, group: str) -> int:
    """Entries of `stream` that `group` has not finished: undelivered plus pending. Producers wait when it grows."""
    try:
        groups = client.xinfo_groups(stream)
    except redis.exceptions.ResponseError:
        return 0
    return sum(int(g["lag"] or 0) + int(g["pending"]) for g in groups if g["name"] == group)


def read_all(
    client: redis.Redis, stream: str, model: type[T], after: str = "0", block_ms: int | None = None
) -> Iterator[tuple[str, T]]:
    """Entries after id `after`, without a group: for one reader that keeps its own place. Unparsable ones are logged."""
    reply = cast(Any, client.xread({stream: after}, count=500, block=block_ms))
    for _, entries in reply or []:
        for entry, fields in entries:
            try:
                yield entry, model.model_validate_json(fields.get("json", ""))
            except ValidationError as error:
                log.warning("unreadable message skipped", stream=stream, entry=entry, error=str(error)[:300])


class Consumer(Generic[T]):
    """Reads `stream` as `name` in `group` and calls `handler(message)`; acknowledges when it returns."""

    def __init__(
        self,
        client: redis.Redis,
        stream: str,
        group: str,
        name: str,
        model: type[T],
        *,
        claim_ms: int = 30_000,
        max_deliveries: int = 5,
        retryable: tuple[type[Exception], ...] = (),
    ) -> None:
        self.client, self.stream, self.group, self.name, self.model = client, stream, group, name, model
        self.claim_ms, self.max_deliveries, self.retryable = claim_ms, max_deliveries, retryable
        self._cursor = "0-0"
        self._resumed = False

    def ensure_group(self) -> None:
        """Create stream and group if they are not there (again, after a Redis without persistence came back empty)."""
        try:
            self.client.xgroup_create(self.stream, self.group, id="0", mkstream=True)
        except redis.exceptions.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def fetch(self, count: int = 1, block_ms: int = 1000) -> list[tuple[str, T]]:
        """Up to `count` messages: first those that a dead consumer left, then new ones. Poison goes to the dead letters."""
        entries: list[tuple[str, dict[str, str]]] = []
        try:
            if not self._resumed:  # after a restart under the same name: first what this consumer itself left unfinished
                own = cast(Any, self.client.xreadgroup(self.group, self.name, {self.stream: "0"}, count=1000))
                self._resumed = True
                entries = [(e, f) for _, found in own or [] for e, f in found if f and not self._given_up(e, f)]
                if entries:
                    return [(e, m) for e, f in entries if (m := self._parse(e, f)) is not None]
            claimed = cast(
                Any, self.client.xautoclaim(self.stream, self.group, self.name, self.claim_ms, self._cursor, count=count)
            )
            self._cursor = claimed[0]
            entries = [(e, f) for e, f in claimed[1] if f]
            if not entries:
                reply = cast(Any, self.client.xreadgroup(self.group, self.name, {self.stream: ">"}, count=count, block=block_ms))
                entries = [(e, f) for _, found in reply or [] for e, f in found]
            else:
                entries = [(e, f) for e, f in entries if not self._given_up(e, f)]
        except redis.exceptions.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self.ensure_group()
            return []
        return [(e, m) for e, f in entries if (m := self._parse(e, f)) is not None]

    def _parse(self, entry: str, fields: dict[str, str]) -> T | None:
        try:
            return self.model.model_validate_json(fields.get("json", ""))
        except ValidationError as error:
            self.bury(entry, fields.get("json", str(fields)), f"unreadable: {error.errors(include_url=False)[:3]}")
            return None

    def _given_up(self, entry: str, fields: dict[str, str]) -> bool:
        pending = cast(Any, self.client.xpending_range(self.stream, self.group, entry, entry, 1))
        if pending and pending[0]["times_delivered"] > self.max_deliveries:
            self.bury(entry, fields.get("json", ""), f"gave up after {pending[0]['times_delivered'] - 1} deliveries")
            return True
        return False

    def bury(self, entry: str, payload: str, error: str) -> None:
        """Move an entry to the dead-letter stream; the queue goes on."""
        log.error("dead letter", stream=self.stream, entry=entry, error=error[:300])
        publish(
            self.client,
            DEAD,
            DeadLetter(stream=self.stream, entry=entry, payload=payload[:2000], error=error[:1000]),
            maxlen=10_000,
        )
        self.ack(entry)

    def ack(self, *entries: str) -> None:
        self.client.xack(self.stream, self.group, *entries)

    def keep(self, *entries: str) -> None:
        """Tell the group that these are still being worked on, so that nobody claims them."""
        self.client.xclaim(self.stream, self.group, self.name, 0, list(entries), justid=True)

    def run(self, handler: Callable[[T], None], stop: threading.Event, on_idle: Callable[[], None] | None = None) -> None:
        """Handle messages one by one until `stop`. A handler's `retryable` error leaves the message pending (it comes back after
        `claim_ms`); any other error buries it."""
        while not stop.is_set():
            try:
                batch = self.fetch()
                for entry, message in batch:
                    self._handle(entry, message, handler)
                if not batch and on_idle:
                    on_idle()
            except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
                log.warning("redis is away, waiting", stream=self.stream, error=str(error)[:200])
                stop.wait(0.5)

    def _handle(self, entry: str, message: T, handler: Callable[[T], None]) -> None:
        started = time.monotonic()
        try:
            handler(message)
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            raise
        except self.retryable as error:
            log.warning("message will be tried again", stream=self.stream, entry=entry, error=str(error)[:300])
            return
        except Exception as error:
            self.bury(entry, message.model_dump_json(), f"{type(error).__name__}: {error}")
            return
        self.ack(entry)
        log.debug("handled", stream=self.stream, entry=entry, seconds=round(time.monotonic() - started, 3))
