"""The whole system in containers, once for all tests here: images built, `docker compose up --wait`, and `down -v` at the end.

These tests take minutes and gigabytes, so they run only where W2A_CONTAINER_TESTS=1 asks for them: `make containers` always does,
`make test` where a Docker Engine runs. They skip loudly where there is none.
"""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.containers import bases
from tests.containers.engine import Engine, NoEngineError, running_engine
from tests.processes import free_port

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
LEFT_OUT = {"triton-gpu": "needs a GPU", "grafana": "not packaged by Debian"}
"""Services that do not run here, and why."""

STARTED = [name for name in COMPOSE["services"] if name not in {*LEFT_OUT, "demo"}]


SAID: list[str] = []


def say(text: str) -> None:
    """A line for the end of pytest's output."""
    SAID.append(text)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Figures for README's table, and what stood in for what."""
    for line in SAID:
        terminalreporter.write_line(f"containers: {line}")


@dataclass
class System:
    """The Compose project under test."""

    engine: Engine
    project: str
    env: dict[str, str]
    files: list[Path]
    lookalikes: list[str]
    build_s: dict[str, float] = field(default_factory=dict)
    up_s: float = 0.0

    def compose(self, *arguments: str, timeout: float = 300, stdin: bytes = b"") -> str:
        files = [f"--file={path}" for path in self.files]
        return self.engine.docker(
            "compose",
            f"--project-name={self.project}",
            *files,
            "--profile=monitoring",
            *arguments,
            stdin=stdin,
            timeout=timeout,
            cwd=ROOT,
            **self.env,
        )

    def containers(self, service: str) -> list[str]:
        """Ids of the containers of `service`, running or not."""
        return self.compose("ps", "--all", "--quiet", service).split()

    def state(self, service: str) -> dict[str, Any]:
        return dict(self.engine.inspect(self.containers(service)[0])["State"])

    def healthy(self) -> bool:
        """Whether every container runs and passes its own check."""
        states = [self.engine.inspect(c)["State"] for name in STARTED for c in self.containers(name)]
        return all(s["Running"] and not s["Paused"] and s.get("Health", {}).get("Status") == "healthy" for s in states)

    def gateway(self) -> httpx.Client:
        """A client with the token that the gateway made for itself."""
        token = self.compose("exec", "-T", "gateway", "cat", "/var/lib/world2act-token/token").strip()
        port = self.env["W2A_GATEWAY_PORT"]
        return httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token}"}, timeout=60)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant query of Prometheus."""
        said = self.compose(
            "exec", "-T", "prometheus", "promtool", "query", "instant", "-o", "json", "http://127.0.0.1:9090", expression
        )
        return list(json.loads(said))

    def answers(self, expressions: list[str]) -> list[list[dict[str, Any]]]:
        """Many instant queries in one call, from a container beside Prometheus."""
        asked = json.dumps(expressions).encode()
        said = self.compose("exec", "-T", "gateway", "python", "-c", ASK, stdin=asked)
        return list(json.loads(said))


ASK = """import json, sys, urllib.parse, urllib.request
answers = []
for expression in json.load(sys.stdin):
    url = "http://prometheus:9090/api/v1/query?" + urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(url, timeout=10) as reply:
        answers.append(json.load(reply)["data"]["result"])
print(json.dumps(answers))"""


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait until `condition()`; exceptions of a system in trouble count as not yet. Returns the seconds it took."""
    started, last = time.monotonic(), ""
    while time.monotonic() < started + seconds:
        try:
            if condition():
                return time.monotonic() - started
        except Exception as error:
            last = f"{type(error).__name__}: {error}"[:300]
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {seconds:.0f} s {last}")


def run_job(client: httpx.Client, kind: str, body: dict[str, Any], seconds: float = 240) -> dict[str, Any]:
    """Submit a job and wait for its end."""
    reply = client.post(f"/{kind}", json=body)
    assert reply.status_code == 202, reply.text
    job: dict[str, Any] = {}

    def ended() -> bool:
        job.update(client.get(f"/jobs/{reply.json()['id']}").json())
        return job["status"] in ("succeeded", "failed", "cancelled")

    wait_until(ended, seconds, f"{kind} ends")
    return job


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if os.environ.get("W2A_CONTAINER_TESTS") != "1":
        pytest.skip(
            "containers not tested: run `make containers` (a Docker Engine: scripts/engine.sh; 15 GB of disk, half an hour)"
        )
    try:
        with running_engine(tmp_path_factory.mktemp("engine")) as found:
            say(found.how)
            yield found
    except NoEngineError as error:
        pytest.skip(f"containers not tested: {error}")


def _override(secrets: dict[str, Path]) -> dict[str, Any]:
    """What a build on a machine like this needs on top: the host's network and package settings."""
    services = {
        n: {"build": {"network": "host", "secrets": list(secrets)}} for n, s in COMPOSE["services"].items() if "build" in s
    }
    return {"services": services, "secrets": {name: {"file": str(path)} for name, path in secrets.items()}}


@pytest.fixture(scope="session")
def images(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> System:
    """Base images and all of ours, built (with W2A_CONTAINER_BUILD=0 as they are there); nothing runs yet."""
    override = tmp_path_factory.mktemp("compose") / "override.yml"
    env = {"W2A_GATEWAY_PORT": str(free_port()), "COMPOSE_PARALLEL_LIMIT": "1", "COMPOSE_PROFILES": ""}
    system = System(engine, f"w2a-test-{os.getpid()}", env, [ROOT / "docker-compose.yml", override], [])
    if os.environ.get("W2A_CONTAINER_BUILD") == "0":
        override.write_text("{}\n")
        return system
    public = {s["image"] for n, s in COMPOSE["services"].items() if "build" not in s and n in STARTED}
    arguments = [
        re.sub(r"^\$\{\w+:?-(.*)\}$", r"\1", COMPOSE["x-build"]["args"][name]) for name in ("PYTHON_IMAGE", "TRITON_IMAGE")
    ]
    with bases.package_access() as secrets:
        override.write_text(yaml.safe_dump(_override(secrets)))
        system.lookalikes = bases.ensure(engine, [*arguments, *sorted(public)], secrets)
        for image in system.lookalikes:
            say(f"{image} is a look-alike base made of Debian's packages")
        if system.lookalikes:
            system.env["TORCH_INDEX"] = ""  # no way to torch's own index either: the CPU build lies where pip looks
        for name in [n for n, s in COMPOSE["services"].items() if "build" in s and n not in ("triton-gpu", "rollout")]:
            started = time.monotonic()
            system.compose("--profile=demo", "build", name, timeout=1800)
            system.build_s[name] = time.monotonic() - started
    override.write_text("{}\n")
    return system


@pytest.fixture(scope="session")
def system(images: System) -> Iterator[System]:
    """Everything up and healthy."""
    for name, why in LEFT_OUT.items():
        warnings.warn(f"containers: {name} does not run here: {why}", stacklevel=1)
    started = time.monotonic()
    try:
        images.compose("up", "--wait", "--no-build", "--detach", "--wait-timeout=300", *STARTED, timeout=400)
        images.up_s = time.monotonic() - started
        yield images
    except BaseException:
        say(images.compose("ps", "--all") + images.compose("logs", "--tail=15"))
        raise
    finally:
        images.compose("down", "--volumes", "--remove-orphans", "--timeout=10")
