"""The system in containers: it comes up, works, says what is broken, recovers, gives what the processes give, and leaves nothing.

Tests run in the order of this file. The figures for README's table are printed at the end of the first ones.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.containers.conftest import COMPOSE, ROOT, STARTED, System, run_job, say, wait_until
from tests.integration.test_monitoring import panels, rules
from tests.processes import free_port
from world2act import __version__

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
OURS = sorted({s["image"] for n, s in COMPOSE["services"].items() if "build" in s and n != "triton-gpu"})
LIMITS_MB = {"gateway": 250, "segmenter": 800, "worldmodel": 600, "simulator": 1200, "cli": 1500}
"""Largest images; those with torch (CPU) may have 2,000."""

ROLLOUT = {
    "task": "button-press",
    "split": "posttrain",
    "indices": [0, 1],
    "mode": "both",
    "version": 0,
    "video": True,
    "seed": 3,
}


@pytest.mark.parametrize("image", OURS)
def test_images_are_small_and_hold_no_tools(images: System, image: str) -> None:
    name, found = image.split("/")[1].split(":")[0], images.engine.inspect(image)
    size = found["Size"] / 1e6
    say(f"image {image}: {size:,.0f} MB, built in {images.build_s.get(name, 0):.0f} s")
    assert size < LIMITS_MB.get(name, 2000)
    config = found["Config"]
    assert config["User"] == "10001:10001"
    assert (
        config["Labels"]["org.opencontainers.image.version"] == __version__ and config["Labels"]["org.opencontainers.image.title"]
    )
    tools = (
        "for t in gcc cc make git pip pip3 curl; do command -v $t; done; ls /opt/venv/lib/python3.11/site-packages | grep -ix pip"
    )
    said = images.engine.docker("run", "--rm", "--network=none", "--entrypoint=sh", image, "-c", f"({tools}); true")
    assert not said.strip(), said
    with pytest.raises(Exception, match="Read-only file system"):
        images.engine.docker("run", "--rm", "--read-only", "--network=none", "--entrypoint=sh", image, "-c", "echo > /opt/x")


def test_everything_becomes_healthy(system: System) -> None:
    say(f"all healthy after {system.up_s:.0f} s")
    wait_until(system.healthy, 60, "all healthy")
    ids = {service: system.containers(service)[0] for service in STARTED}
    lines = system.engine.docker("stats", "--no-stream", "--format", "{{.ID}} {{.MemUsage}}", *ids.values()).splitlines()
    used = {line.split()[0]: line.split()[1] for line in lines}
    for service, container in ids.items():
        say(f"memory at rest: {service} {used[container[:12]]}")


def test_only_the_gateway_and_grafana_are_published_and_the_gateway_wants_its_token(system: System) -> None:
    for service in STARTED:
        bound = system.engine.inspect(system.containers(service)[0])["NetworkSettings"]["Ports"] or {}
        hosts = {b["HostIp"] for ports in bound.values() for b in ports or []}
        assert hosts == ({"127.0.0.1"} if service == "gateway" else set()), service
    with httpx.Client(base_url=f"http://127.0.0.1:{system.env['W2A_GATEWAY_PORT']}") as stranger:
        assert stranger.get("/healthz").status_code == 200 and stranger.get("/jobs").status_code == 401


def test_segment_and_rollout(system: System) -> None:
    with system.gateway() as client:
        assert client.get("/readyz").json() == {"status": "ready", "missing": {}}
        reply = client.post("/segment", json={"instruction": "pick up the puck and place it at the goal"})
        assert reply.status_code == 200 and len(reply.json()["skills"]) >= 2, reply.text
        job = run_job(client, "rollout", ROLLOUT)
        assert job["status"] == "succeeded" and len(job["result"]["rollouts"]) == 2, job
        for rollout in job["result"]["rollouts"]:
            for kind in ("imagined_video", "executed_video"):
                assert client.get(f"/artifacts/{rollout[kind]}").content[4:8] == b"ftyp"


def test_prometheus_scrapes_every_target(system: System) -> None:
    def all_up() -> bool:
        found = {row["metric"]["job"]: row["value"][1] for row in system.query("up")}
        jobs = {name for name in STARTED if name not in ("redis", "prometheus")}
        return jobs <= set(found) and all(found[job] == "1" for job in jobs)

    wait_until(all_up, 90, "every service is scraped")


def test_every_panel_and_rule_has_data(system: System) -> None:
    silent = {expression: name for name, expression in [*panels(), *rules()]}
    asked, indices = len(silent), itertools.count()
    with system.gateway() as client:
        job = run_job(client, "posttrain", {"tasks": ["reach"], "rounds": 1, "episodes": 2, "steps": 20}, 600)
        assert job["status"] == "succeeded", job

        def all_answered() -> bool:
            # Again and again: a rate needs work in between two scrapes.
            body = {**ROLLOUT, "split": "evaluation", "indices": [next(indices)], "mode": "execute", "video": False}
            assert run_job(client, "rollout", body, 120)["status"] == "succeeded"
            for expression, rows in zip(list(silent), system.answers(list(silent)), strict=True):
                if any(row["value"][1] != "NaN" for row in rows):
                    del silent[expression]
            return not silent

        try:
            wait_until(all_answered, 240, f"an answer to each of {asked} queries")
        except AssertionError as error:
            raise AssertionError(f"{error}; silent: {', '.join(silent.values())}") from None
    say(f"{asked} queries of panels and rules answer")


def test_more_simulators_are_found_and_used(system: System) -> None:
    system.compose("scale", "--no-deps", "simulator=2")
    wait_until(system.healthy, 300, "the new simulator is healthy")
    replicas = system.containers("simulator")
    assert len(replicas) == 2
    with system.gateway() as client:
        job = run_job(client, "rollout", {**ROLLOUT, "indices": [2, 3, 4, 5], "mode": "execute", "video": False})
        assert job["status"] == "succeeded", job
    for replica in replicas:
        lines = system.engine.docker("exec", replica, "python", "-c", SCRAPE).splitlines()
        assert any(float(line.split()[1]) > 0 for line in lines if line.startswith("w2a_simulator_resets_total")), lines
    system.compose("scale", "--no-deps", "simulator=1")


SCRAPE = """import urllib.request
print(urllib.request.urlopen("http://127.0.0.1:9104/metrics").read().decode())"""


def test_the_demo_runs_beside_the_services(system: System) -> None:
    """The main job, small."""
    small = ["--tasks=drawer-close", "--trials=2", "--episodes=2", "--rounds=1"]
    report = "/var/lib/world2act/report.html"
    said = system.compose(
        "--profile=demo", "run", "--rm", "--no-deps", "-T", "demo", "demo", "--no-start", f"--out={report}", *small, timeout=900
    )
    assert "drawer-close" in said, said
    page = system.compose("exec", "-T", "gateway", "cat", report)
    assert page.lstrip().lower().startswith("<!doctype html") and "drawer-close" in page


# -- faults: the system says so, and recovers --------------------------------------------------------------------------


def stop(system: System, service: str) -> Callable[[], object]:
    system.compose("stop", "--timeout=10", service)
    return lambda: system.compose("start", service)


def pause(system: System, service: str) -> Callable[[], object]:
    system.compose("pause", service)
    return lambda: system.compose("unpause", service)


def kill(system: System, service: str) -> Callable[[], object]:
    """kill -9 of its process from outside, where we may: then the restart policy alone has to bring it back."""
    state = system.state(service)
    if os.geteuid() == 0:
        os.kill(state["Pid"], signal.SIGKILL)
        wait_until(lambda: system.state(service)["StartedAt"] != state["StartedAt"], 60, f"{service} is started again")
        return lambda: None
    system.compose("kill", service)
    return lambda: system.compose("start", service)


def disconnect(system: System, service: str) -> Callable[[], object]:
    network, container = f"{system.project}_inside", system.containers(service)[0]
    system.engine.docker("network", "disconnect", network, container)
    return lambda: system.engine.docker("network", "connect", "--alias", service, network, container)


NAMED = {"redis": "redis", "triton": "triton", "vla": "vla", "simulator": "simulator", "gateway": "redis"}
"""Service -> what the gateway's /readyz calls its loss; workers have their own names, and without a network it misses Redis."""


def says_so(system: System, client: httpx.Client, service: str) -> bool:
    """Whether the loss of `service` is visible: in /readyz, or, of the gateway itself, by its silence."""
    try:
        missing = client.get("/readyz", timeout=20).json()["missing"]
    except httpx.TransportError:
        return service == "gateway"
    return NAMED.get(service, service) in missing


@pytest.mark.parametrize("fault", [stop, pause, kill, disconnect], ids=lambda f: f.__name__)
@pytest.mark.parametrize("service", [name for name in STARTED if name != "prometheus"])
def test_a_lost_service_is_named_and_comes_back(system: System, service: str, fault: Any) -> None:
    with system.gateway() as client:
        undo = fault(system, service)
        try:
            if fault is not kill:  # it may be back before anybody can see that it was away
                wait_until(lambda: says_so(system, client, service), 90, f"{service} is reported")
        finally:
            undo()
        wait_until(
            lambda: client.get("/readyz", timeout=20).json()["status"] == "ready", 180, f"ready again after {fault.__name__}"
        )
        wait_until(system.healthy, 180, "all healthy again")
        reply = client.post("/segment", json={"instruction": f"open the drawer and {service} {fault.__name__}"[:60]})
        assert reply.status_code == 200, reply.text


def test_an_alert_names_the_lost_service(system: System) -> None:
    def firing(alert: str) -> bool:
        return bool(system.query(f'ALERTS{{alertname="{alert}", job="vla", alertstate="firing"}}'))

    undo = stop(system, "vla")
    try:
        wait_until(lambda: firing("TargetDown"), 240, "Prometheus fires TargetDown for vla")
    finally:
        undo()
    wait_until(lambda: not firing("TargetDown"), 120, "the alert ends")
    wait_until(system.healthy, 180, "all healthy again")


def test_work_goes_on_after_all_faults(system: System) -> None:
    with system.gateway() as client:
        job = run_job(client, "rollout", {**ROLLOUT, "indices": [6], "video": False})
        assert job["status"] == "succeeded", job


# -- the same as processes ---------------------------------------------------------------------------------------------

POSTTRAIN = {"tasks": ["button-press"], "mode": "serial", "rounds": 1, "episodes": 2, "steps": 5, "seed": 7, "namespace": "same"}
EVALUATE = {"tasks": ["button-press"], "episodes": 2, "namespace": "same", "split": "tuning"}


@contextmanager
def processes(folder: Path) -> Any:
    """`world2act up` on ports of its own; yields a client."""
    offset = str(free_port() % 9000 + 2000)
    env = {k: v for k, v in os.environ.items() if not k.startswith("W2A_")}
    env |= {"W2A_PORT_OFFSET": offset, "W2A_RUN_DIR": str(folder), "W2A_ARTIFACTS_URL": f"file://{folder}/artifacts"}
    command = [sys.executable, "-m", "services.cli.main"]
    subprocess.run([*command, "up", "--detach"], env=env, check=True, cwd=ROOT, timeout=600)
    try:
        yield httpx.Client(base_url=f"http://127.0.0.1:{8080 + int(offset)}", timeout=60)
    finally:
        subprocess.run([*command, "down"], env=env, check=True, cwd=ROOT, timeout=120)


def outcome(client: httpx.Client) -> dict[str, Any]:
    """What must not depend on how the services run: names of artifacts (hashes of their bytes) and the table of success."""
    rollout, trained, evaluated = (
        run_job(client, kind, body, 600)
        for kind, body in (("rollout", ROLLOUT), ("posttrain", POSTTRAIN), ("evaluate", EVALUATE))
    )
    for job in (rollout, trained, evaluated):
        assert job["status"] == "succeeded", job
    versions = client.get("/policies/same").json()
    return {
        "rollouts": rollout["result"]["rollouts"],
        "policies": [(v["version"], v["artifact"]) for v in versions],
        "table": evaluated["result"]["rows"],
    }


def test_containers_and_processes_give_the_same(system: System, tmp_path: Path) -> None:
    with system.gateway() as client:
        ours = outcome(client)
    with processes(tmp_path) as client:
        theirs = outcome(client)
    volatile = {"started", "finished", "cache_hit"}
    for side in (ours, theirs):
        side["rollouts"] = [{k: v for k, v in r.items() if k not in volatile} for r in side["rollouts"]]
    for part in ("rollouts", "table", "policies"):
        assert json.dumps(ours[part], indent=1) == json.dumps(theirs[part], indent=1), part
        say(f"same in containers and as processes: {part}")


def test_down_leaves_nothing(system: System) -> None:
    system.compose("down", "--volumes", "--remove-orphans", "--timeout=10")
    for kind in ("container", "volume", "network"):
        options = ["--all"] if kind == "container" else []
        left = system.engine.docker(
            kind, "ls", *options, "--quiet", f"--filter=label=com.docker.compose.project={system.project}"
        )
        assert not left.strip(), f"{kind}: {left}"
