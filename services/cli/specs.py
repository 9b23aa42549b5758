"""The services of the embedded default: command, ports, readiness. One table."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import redis

from services.cli.settings import PORTS, CliSettings
from services.runtime.embedded import valkey_command
from services.runtime.settings import METRICS_PORTS
from services.runtime.streams import connect
from services.runtime.telemetry import Check

GRACE_S = 10.0


@dataclass(frozen=True)
class ServiceSpec:
    """One process. `ready()` returns None, or a sentence that says what is missing. `stage`: stopped in this order, 0 first."""

    name: str
    command: list[str]
    ready: Check
    env: dict[str, str] = field(default_factory=dict)
    ports: dict[int, str] = field(default_factory=dict)  # port -> the setting that moves it
    after: tuple[str, ...] = ()
    stage: int = 1
    grace_s: float = GRACE_S


def http_ready(url: str, timeout: float = 2.0) -> Callable[[], str | None]:
    """Ready when GET `url` answers 200."""

    def check() -> str | None:
        try:
            with urllib.request.urlopen(url, timeout=timeout):
                return None
        except urllib.error.HTTPError as error:
            return _missing(error.read()[:2000]) or f"{url} answers {error.code}"
        except (OSError, ValueError):
            return f"{url} does not answer"

    return check


def _missing(body: bytes) -> str:
    """What our /readyz says is missing."""
    try:
        found = json.loads(body)
        return "; ".join(f"{name}: {why}" for name, why in dict(found.get("failed") or found["missing"]).items())
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def redis_ready(url: str) -> Callable[[], str | None]:
    """Ready when Redis has loaded its file and answers PING."""

    def check() -> str | None:
        try:
            with connect(url, patient=False) as client:
                return None if client.ping() else "no answer to PING"
        except redis.exceptions.RedisError as error:
            return str(error)[:200]

    return check


def metrics_targets(settings: CliSettings) -> dict[str, str]:
    """Service -> host:port of its /metrics. Redis has none: the gateway tells of it."""
    ports = {"triton": settings.triton_metrics_port, **{service: settings.metrics(service) for service in METRICS_PORTS}}
    return {service: f"{settings.host}:{port}" for service, port in ports.items()}


def service_specs(settings: CliSettings) -> list[ServiceSpec]:
    """Everything that `world2act up` starts. Redis is left out where one is given."""
    first: list[ServiceSpec] = []
    if settings.embeds_redis():
        host, port = settings.redis_address()
        command = valkey_command(host, port, Path(settings.run_dir) / "redis")
        first = [ServiceSpec("redis", command, redis_ready(settings.redis_url), ports={port: "W2A_REDIS_URL"}, stage=3)]
    redis_first = tuple(spec.name for spec in first)

    def python(name: str, *module: str, after: tuple[str, ...] = (), stage: int = 1) -> ServiceSpec:
        ports = {getattr(settings, port): f"W2A_{port.upper()}" for port in PORTS.get(name, ()) if getattr(settings, port)}
        if name == "triton":
            ready = http_ready(f"http://{settings.host}:{settings.triton_http_port}/v2/health/ready")
        else:
            ports[settings.metrics(name)] = "W2A_PORT_OFFSET"
            ready = http_ready(f"http://{settings.host}:{settings.metrics(name)}/readyz")
        command = [sys.executable, "-m", *module]
        return ServiceSpec(name, command, ready, settings.environment(name), ports, redis_first + after, stage)

    return [
        *first,
        python("triton", "services.worldmodel", "triton", stage=2),
        python("simulator", "services.simulator", stage=2),
        python("vla", "services.vla", stage=2),
        python("segmenter", "services.segmenter"),
        python("worldmodel", "services.worldmodel", after=("triton",)),
        python("rollout", "services.trainer", "rollout", after=("simulator", "vla")),
        python("trainer", "services.trainer"),
        python("gateway", "services.gateway", stage=0),
    ]
