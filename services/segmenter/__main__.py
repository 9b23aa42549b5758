"""`python -m services.segmenter`: the worker, with metrics, health and heartbeat.

SIGTERM or Ctrl-C ends it after the task at hand.
"""

from __future__ import annotations

import sys
import threading

import structlog
from celery.signals import worker_ready, worker_shutting_down

from services.runtime.streams import connect
from services.runtime.telemetry import configure_logging, redis_check, serve_health, start_heartbeat
from services.segmenter.app import QUEUE, make_app
from services.segmenter.settings import SegmenterSettings


def main() -> int:
    """Run until a signal; the exit status."""
    settings = SegmenterSettings()
    configure_logging("segmenter", settings)
    log = structlog.get_logger()
    client = connect(settings.redis_url)
    stop, consuming = threading.Event(), threading.Event()
    checks = {"redis": redis_check(client), "worker": lambda: None if consuming.is_set() else "does not take tasks yet"}
    worker_ready.connect(lambda **_: consuming.set(), weak=False)
    worker_shutting_down.connect(lambda **_: consuming.clear(), weak=False)
    try:
        server = serve_health("segmenter", settings, checks)
    except OSError as error:
        log.error("cannot start", error=str(error))
        return 1
    start_heartbeat(client, "segmenter", settings.instance, stop)
    # One process, one task at a time (pool "solo"): tasks are short, and more throughput is more workers.
    worker = make_app(settings).Worker(
        pool="solo",
        queues=[QUEUE],
        hostname=f"segmenter-{settings.instance}@{settings.host}",
        loglevel="WARNING",  # Celery's own; this service logs each request itself
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    log.info("starting", queue=QUEUE)
    try:
        worker.start()
    finally:
        stop.set()
        server.shutdown()
    return int(worker.exitcode or 0)


if __name__ == "__main__":
    sys.exit(main())
