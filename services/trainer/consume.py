"""A stream consumer for long messages: it keeps what it works on, and tells somebody when it gives a message up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis
import structlog
from prometheus_client import Gauge

from services.runtime.messages import Message
from services.runtime.streams import Consumer, backlog
from services.trainer.settings import TrainerSettings

log = structlog.get_logger()
T = TypeVar("T", bound=Message)


class StoppingError(Exception):
    """The process was asked to stop: the message stays pending, and the next process takes it up."""


class KeptConsumer(Consumer[T]):
    """As Consumer, for handlers that may run far longer than `claim_ms`.

    While a handler runs, a thread claims its message again every third of `claim_ms`, so that nobody else does. `buried(payload,
    error)` hears of every message that went to the dead letters.
    """

    def __init__(self, *args: Any, buried: Callable[[str, str], None] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.buried = buried

    def _handle(self, entry: str, message: T, handler: Callable[[T], None]) -> None:
        done = threading.Event()
        keeper = threading.Thread(target=self._keep_until, args=(entry, done), daemon=True, name=f"keep-{entry}")
        keeper.start()
        try:
            super()._handle(entry, message, handler)
        finally:
            done.set()

    def _keep_until(self, entry: str, done: threading.Event) -> None:
        while not done.wait(self.claim_ms / 3000):
            try:
                self.keep(entry)
            except redis.exceptions.RedisError as error:
                log.warning("message not kept", stream=self.stream, entry=entry, error=str(error)[:200])

    def bury(self, entry: str, payload: str, error: str) -> None:
        """See Consumer.bury; `buried` runs first, so that who waits for an answer gets one."""
        if self.buried is not None:
            try:
                self.buried(payload, error)
            except redis.exceptions.RedisError:
                raise
            except Exception:
                log.exception("a dead letter could not be reported", stream=self.stream, entry=entry)
        super().bury(entry, payload, error)


def serve_stream(
    settings: TrainerSettings,
    client: redis.Redis,
    stream: str,
    group: str,
    model: type[T],
    *,
    handlers: Sequence[Callable[[T], None]],
    claim_seconds: float,
    buried: Callable[[str, str], None],
    depth: Gauge,
    stop: threading.Event,
) -> None:
    """Give messages of `stream` to `handlers`, each in a thread of its own, until `stop`; `depth` shows how many are not done."""

    def work(number: int, handler: Callable[[T], None]) -> None:
        consumer: KeptConsumer[T] = KeptConsumer(
            client,
            stream,
            group,
            f"{settings.instance}-{number}",
            model,
            claim_ms=int(1000 * claim_seconds),
            max_deliveries=20,
            retryable=(StoppingError,),
            buried=buried,
        )
        while not stop.is_set():
            try:
                consumer.run(handler, stop)
            except Exception:
                log.exception("worker starts again", worker=number)
                stop.wait(1.0)

    threads = [threading.Thread(target=work, args=pair, name=f"{group}-{pair[0]}") for pair in enumerate(handlers)]
    for thread in threads:
        thread.start()
    log.info(f"{group} ready", workers=len(threads))
    while not stop.wait(2.0):
        try:
            depth.set(backlog(client, stream, group))
        except redis.exceptions.RedisError as error:
            log.warning("queue depth unknown", error=str(error)[:200])
    for thread in threads:
        thread.join(timeout=10)


def persist(action: Callable[[], None], stop: threading.Event, pause: float = 1.0) -> None:
    """Run `action` again, from its start, whenever Redis goes away under it. Raises StoppingError when `stop` is set."""
    while True:
        if stop.is_set():
            raise StoppingError
        try:
            return action()
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError) as error:
            log.warning("redis is away; starting again from what it holds", error=str(error)[:200])
            stop.wait(pause)
