"""The gateway as a process, with a real Valkey and a real segmenter; the simulator is a small gRPC server, Triton an HTTP one."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from services.runtime.generated import simulator_pb2
from services.runtime.generated.simulator_pb2_grpc import SimulatorServicer, add_SimulatorServicer_to_server
from services.runtime.jobs import JobStore
from services.runtime.rpc import start_server
from services.runtime.streams import connect
from tests.processes import ValkeyProcess, free_port, running_valkey, wait_for

pytestmark = pytest.mark.integration


class Simulator(SimulatorServicer):
    def Describe(self, request: Any, context: grpc.ServicerContext) -> simulator_pb2.DescribeReply:  # noqa: N802
        return simulator_pb2.DescribeReply(simulator="small", tasks=[simulator_pb2.Task(name="reach")])


class Ready(http.server.BaseHTTPRequestHandler):
    """Triton's health route."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v2/health/ready" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def start_triton(port: int) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class World:
    """Everything around the gateway, and a client of it."""

    def __init__(self, folder: Path, valkey: ValkeyProcess) -> None:
        self.folder, self.valkey = folder, valkey
        self.triton_port, self.port, self.metrics = free_port(), free_port(), free_port()
        add = lambda server: add_SimulatorServicer_to_server(Simulator(), server)  # type: ignore[no-untyped-call]  # noqa: E731
        self.simulator, _, simulator_port = start_server(add, "127.0.0.1:0", workers=2)
        self.environment = {
            **os.environ,
            "W2A_REDIS_URL": valkey.url,
            "W2A_ARTIFACTS_URL": f"file://{folder}/artifacts",
            "W2A_GATEWAY_PORT": str(self.port),
            "W2A_SIMULATOR_PORT": str(simulator_port),
            "W2A_VLA_PORT": str(simulator_port),  # the same server answers the standard health check
            "W2A_TRITON_HTTP_PORT": str(self.triton_port),
            "W2A_JSON_LIMIT_BYTES": "100000",
            "W2A_SEGMENT_WAIT_S": "20",
        }
        self.processes = [self.start("services.gateway", self.metrics), self.start("services.segmenter", free_port())]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def start(self, module: str, metrics: int) -> subprocess.Popen[bytes]:
        with (self.folder / f"{module}.log").open("wb") as log:
            environment = {**self.environment, "W2A_METRICS_PORT": str(metrics)}
            return subprocess.Popen([sys.executable, "-m", module], env=environment, stdout=log, stderr=subprocess.STDOUT)

    def close(self) -> None:
        self.http.close()
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(30)
        self.simulator.stop(0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("gateway")
    with running_valkey(folder / "valkey") as valkey:
        found = World(folder, valkey)
        try:
            wait_for(lambda: found.http.get("/readyz").status_code == 200, 60, "gateway is ready")
            wait_for(lambda: "segmenter:0" in found.http.get("/status").json()["heartbeats"], 60, "segmenter beats")
            yield found
        finally:
            found.close()


def test_segments_through_celery(world: World) -> None:
    reply = world.http.post("/segment", json={"instruction": "pick up the puck and place it at the goal"})
    assert reply.status_code == 200 and reply.json()["skills"] == ["pick up the puck", "place the puck at the goal"]
    widths = [0.1] * 20 + [0.04] * 30
    reply = world.http.post("/segment", json={"instruction": "push the puck to the goal", "gripper_width_m": widths})
    assert reply.status_code == 200 and [s["start"] for s in reply.json()["episodes"][0]["skills"]] == [0, 20]
    refused = world.http.post("/segment", json={"instruction": "open the drawer", "embodiment": "octopus"})
    assert refused.status_code == 422 and "embodiment" in refused.json()["detail"]  # only the segmenter knows embodiments


def test_triton_down_is_503_and_recovers_without_restart(world: World) -> None:
    body = {"task": "reach", "indices": [0], "mode": "imagine"}
    reply = world.http.post("/rollout", json=body)
    assert reply.status_code == 503 and reply.json()["service"] == "triton"
    triton = start_triton(world.triton_port)
    try:
        assert world.http.post("/rollout", json=body).status_code == 202
        assert world.http.post("/rollout", json=body | {"task": "fly"}).json()["detail"].endswith("the simulator has reach")
    finally:
        triton.shutdown()
        triton.server_close()
    assert world.http.post("/rollout", json=body).status_code == 503
    assert world.http.post("/rollout", json=body | {"mode": "execute"}).status_code == 202  # needs no Triton


def test_events_arrive_while_the_job_runs(world: World) -> None:
    job = world.http.post("/stage1", json={}).json()["id"]
    jobs = JobStore(connect(world.valkey.url))

    def run() -> None:
        for i in range(1, 4):
            time.sleep(0.2)
            jobs.update(job, status="running", progress=i / 4)
        time.sleep(0.2)
        jobs.update(job, status="succeeded", progress=1.0)

    threading.Thread(target=run, daemon=True).start()
    seen: list[str] = []
    with world.http.stream("GET", f"/jobs/{job}/events") as reply:
        for line in reply.iter_lines():
            if line.startswith("event:"):
                seen.append(line)
                if len(seen) == 1:
                    assert jobs.get(job).status == "running"  # type: ignore[union-attr]  # not only after the end
    assert seen == ["event: status"] * 4 + ["event: end"]


def test_large_body_is_refused_while_it_is_sent(world: World) -> None:
    headers = {"content-type": "application/json"}
    for body in (b"x" * 5_000_000, (b"x" * 100_000 for _ in range(50))):
        reply = world.http.post("/posttrain", content=body, headers=headers)
        assert reply.status_code == 413 and "100000 bytes" in reply.json()["detail"]
    assert world.http.get("/healthz").status_code == 200


def test_redis_down_is_503_and_recovers_without_restart(world: World) -> None:
    world.valkey.kill()
    for call in (
        lambda: world.http.get("/jobs"),
        lambda: world.http.post("/segment", json={"instruction": "open the drawer"}),
        lambda: world.http.post("/stage1", json={}),
    ):
        reply = call()
        assert reply.status_code == 503 and reply.json()["service"] == "redis" and reply.elapsed.total_seconds() < 10
    assert world.http.get("/healthz").status_code == 200
    ready = world.http.get("/readyz")
    assert ready.status_code == 503 and "redis" in ready.json()["missing"]
    world.valkey.start()
    assert world.http.get("/jobs").status_code == 200
    assert world.http.post("/segment", json={"instruction": "close the drawer"}).status_code == 200


def test_metrics_count_by_route(world: World) -> None:
    text = httpx.get(f"http://127.0.0.1:{world.metrics}/metrics").text
    assert 'w2a_gateway_requests_total{method="POST",route="/rollout",status="503"}' in text
    assert 'w2a_gateway_request_seconds_count{method="GET",route="/jobs/{job_id}/events"}' in text
    assert httpx.get(f"http://127.0.0.1:{world.metrics}/readyz").status_code == 200


def test_busy_port_and_public_host_are_one_line(world: World) -> None:
    for change, words in (
        ({}, f"cannot bind 127.0.0.1:{world.port}"),
        ({"W2A_HOST": "192.0.2.1"}, "W2A_GATEWAY_TOKEN"),
    ):
        command = [sys.executable, "-m", "services.gateway"]
        found = subprocess.run(command, env={**world.environment, **change}, capture_output=True, text=True, timeout=60)
        assert found.returncode == 2 and words in found.stderr and "Traceback" not in found.stderr


def test_ends_at_once_with_an_open_event_stream(world: World) -> None:
    port = free_port()
    environment = {**world.environment, "W2A_GATEWAY_PORT": str(port), "W2A_METRICS_PORT": str(free_port())}
    process = subprocess.Popen([sys.executable, "-m", "services.gateway"], env=environment, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: httpx.get(f"{url}/healthz").status_code == 200, 60, "second gateway")
        job = httpx.post(f"{url}/stage1", json={}).json()["id"]
        with httpx.stream("GET", f"{url}/jobs/{job}/events"):
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
