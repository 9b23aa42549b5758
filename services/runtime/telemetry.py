"""Logs, metrics, health, readiness and heartbeats: the same in every service."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import prometheus_client
import psutil
import redis
import structlog
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from services.runtime.settings import METRICS_PORTS, CommonSettings

log = structlog.get_logger()
Check = Callable[[], str | None]
"""Returns None when fine, else one sentence that says what is missing."""

HEARTBEAT_SECONDS = 2.0


def configure_logging(service: str, settings: CommonSettings) -> None:
    """structlog to stderr: one line an event; JSON with W2A_LOG_JSON=true."""
    renderer = (
        structlog.processors.JSONRenderer() if settings.log_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log_level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    structlog.contextvars.bind_contextvars(service=service)


class ProcessTree(Collector):
    """CPU seconds of this process and of all that it started, alive or ended: most of a simulator's work is its children's."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        seconds = sum(os.times()[:4])  # own, and of children that were waited for
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                seconds += sum(child.cpu_times()[:4])
        yield CounterMetricFamily("w2a_cpu_seconds", "CPU time of the service with its child processes", value=seconds)


prometheus_client.REGISTRY.register(ProcessTree())


def serve_health(service: str, settings: CommonSettings, checks: Mapping[str, Check]) -> ThreadingHTTPServer:
    """/metrics, /healthz (the process lives) and /readyz (every check passes, else 503 naming the ones that do not)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, prometheus_client.generate_latest(), prometheus_client.CONTENT_TYPE_LATEST)
            elif self.path == "/healthz":
                self._answer(200, b'{"status": "alive"}', "application/json")
            elif self.path == "/readyz":
                failed = run_checks(checks)
                body = json.dumps({"status": "not ready" if failed else "ready", "failed": failed}).encode()
                self._answer(503 if failed else 200, body, "application/json")
            else:
                self._answer(404, b"not found", "text/plain")

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            with contextlib.suppress(ConnectionError):  # whoever asked did not wait for the answer
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are not worth a log line."""

    port = settings.metrics_port or METRICS_PORTS[service]
    try:
        server = ThreadingHTTPServer((settings.host, port), Handler)
    except OSError as error:
        raise OSError(f"{service}: cannot bind metrics port {port}: {error.strerror}") from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True, name="health").start()
    return server


def run_checks(checks: Mapping[str, Check]) -> dict[str, str]:
    """Name -> sentence for each check that does not pass."""
    failed = {}
    for name, check in checks.items():
        try:
            reason = check()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:300]
        if reason:
            failed[name] = reason
    return failed


def redis_check(client: redis.Redis) -> Check:
    """Passes while Redis answers PING."""

    def check() -> str | None:
        return None if client.ping() else "no answer to PING"

    return check


def start_heartbeat(client: redis.Redis, service: str, instance: str, stop: threading.Event) -> threading.Thread:
    """Write the time to `w2a:heartbeat:<service>:<instance>` every two seconds: its age is the service's liveness.

    Without Redis the service goes on; the log hears of it once, and again when Redis is back.
    """

    def beat() -> None:
        away = False
        while not stop.is_set():
            try:
                client.set(f"w2a:heartbeat:{service}:{instance}", f"{time.time():.3f}", ex=3600)
                if away:
                    log.info("heartbeats are written again")
                away = False
            except redis.exceptions.RedisError as error:
                if not away:
                    log.warning("heartbeats are not written", error=str(error)[:200])
                away = True
            stop.wait(HEARTBEAT_SECONDS)

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    return thread


def heartbeats(client: redis.Redis) -> dict[str, float]:
    """service:instance -> seconds since its last heartbeat."""
    now = time.time()
    ages: dict[str, float] = {}
    for key in client.scan_iter("w2a:heartbeat:*", count=1000):
        value = client.get(key)
        if value is not None:
            ages[str(key).removeprefix("w2a:heartbeat:")] = now - float(str(value))
    return ages


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set, so that a service ends cleanly."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
