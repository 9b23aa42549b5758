"""The segmenter as a real worker process on a real Valkey: results, idempotence, kill -9, bad requests, poison."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import redis
from celery import Celery

from services.runtime.artifacts import ArtifactStore
from services.runtime.messages import DEAD
from services.runtime.telemetry import heartbeats
from tests.processes import ValkeyProcess, free_port, running_valkey, wait_for
from tests.scripted_llm import Server, refused, said

pytestmark = pytest.mark.integration

OPEN = 0.0883
GRASP = np.r_[np.full(20, OPEN), np.linspace(OPEN, 0.035, 6), np.full(23, 0.035)]  # narrower than 0.0433 m from frame 25


def hdf5(widths: list[np.ndarray], instruction: str = "push the puck to the goal", task: str = "push") -> bytes:
    """A demonstration file of ours, without images: nothing here looks at them."""
    buffer = io.BytesIO()
    own = {"env_name": task, "simulator": "metaworld", "control_hz": 40.0, "chunk": 4, "cameras": {"primary": 0}}
    with h5py.File(buffer, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({**own, "gripper_open_width": OPEN, "gripper_width_index": 0})
        data.attrs["split"] = "validation"
        for i, w in enumerate(widths):
            demo = data.create_group(f"demo_{i}")
            demo.attrs.update({"task": task, "instruction": instruction, "index": i, "success": True, "perturbed": False})
            demo.attrs["num_samples"] = len(w) - 1
            demo["actions"] = np.zeros((len(w) - 1, 4), np.float32)
            for key, values in (("gripper_width", w.astype(np.float32)), ("state", w.astype(np.float32)[:, None])):
                demo[f"obs/{key}"], demo[f"final_obs/{key}"] = values[:-1], values[-1]
    return buffer.getvalue()


class Rig:
    """A Valkey, an artifact store, a client that sends by name as the gateway does, and workers."""

    def __init__(self, valkey: ValkeyProcess, folder: Path) -> None:
        self.valkey, self.folder = valkey, folder
        self.store = ArtifactStore(f"file://{folder}/artifacts")
        self.client = redis.Redis.from_url(valkey.url, decode_responses=True)
        self.celery = Celery("client", broker=valkey.url, backend=valkey.url)
        self.metrics_port = 0

    def send(self, request: Any) -> Any:
        return self.celery.send_task("world2act.segment", kwargs={"request": request}, queue="segment")

    def ask(self, request: Any, seconds: float = 20.0) -> dict[str, Any]:
        return dict(self.send(request).get(timeout=seconds))

    def start_worker(self, **settings: str) -> subprocess.Popen[bytes]:
        self.metrics_port = free_port()
        environment = {
            **os.environ,
            "W2A_REDIS_URL": self.valkey.url,
            "W2A_ARTIFACTS_URL": f"file://{self.folder}/artifacts",
            "W2A_METRICS_PORT": str(self.metrics_port),
            "W2A_SEGMENT_VISIBILITY_SECONDS": "2",
            **settings,
        }
        with (self.folder / "worker.log").open("ab") as log:
            process = subprocess.Popen([sys.executable, "-m", "services.segmenter"], env=environment, stdout=log, stderr=log)
        wait_for(lambda: b'"ready"' in self.get("/readyz"), 30, "worker ready")
        return process

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=5) as reply:
            return bytes(reply.read())

    @contextmanager
    def worker(self, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        process = self.start_worker(**settings)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One worker that all tests which do it no harm share."""
    folder = tmp_path_factory.mktemp("running")
    with running_valkey(folder / "valkey") as valkey:
        rig = Rig(valkey, folder)
        with rig.worker():
            yield rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """No worker yet."""
    with running_valkey(tmp_path / "valkey") as valkey:
        yield Rig(valkey, tmp_path)


def test_widths_and_instruction(running: Rig) -> None:
    result = running.ask({"instruction": "push the puck to the goal", "gripper_width_m": GRASP.tolist()})
    (episode,) = result["episodes"]
    assert [(s["prompt"], s["start"], s["end"]) for s in episode["skills"]] == [
        ("grasp the puck", 0, 28),
        ("push the puck to the goal", 28, 48),
    ]
    assert all(s["reason"] for s in episode["skills"]) and episode["discarded"] is None
    assert episode["events"][0]["onset"] == 25 and episode["gripper_width_m"][0] == OPEN
    assert result["statistics"]["sync_rate"] == 1.0


def test_instruction_alone(running: Rig) -> None:
    result = running.ask({"instruction": "wipe the table and then open the drawer"})
    assert result["skills"] == ["wipe the table", "open the drawer"] and result["episodes"] == []


def test_file_with_all_or_one_demonstration(running: Rig) -> None:
    uri = running.store.put(hdf5([GRASP, np.full(41, OPEN), GRASP]), "hdf5")
    result = running.ask({"episode_uri": uri, "demo": None})
    assert [e["demo"] for e in result["episodes"]] == ["demo_0", "demo_1", "demo_2"]
    assert [e["discarded"] is None for e in result["episodes"]] == [True, False, True]
    assert "step missing" in result["episodes"][1]["discarded"] and result["episodes"][1]["skills"] == []
    assert result["statistics"]["synced"] == 2 and result["statistics"]["clips"] == 4
    one = running.ask({"episode_uri": uri, "demo": "demo_2"})
    assert [e["demo"] for e in one["episodes"]] == ["demo_2"]


def test_same_request_is_done_once(running: Rig) -> None:
    request = {"instruction": "open the drawer", "gripper_width_m": [OPEN] * 33}
    first, second = running.ask(request), running.ask(request)
    assert first == second
    metrics = running.get("/metrics").decode()
    assert 'w2a_segment_requests_total{outcome="cached"} 1.0' in metrics


def test_heartbeat_and_health(running: Rig) -> None:
    wait_for(lambda: heartbeats(running.client)["segmenter:0"] < 5, 10, "heartbeat")
    assert b"alive" in running.get("/healthz")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"instruction": "open the drawer", "gripper_width_m": []}, "gripper_width_m: is empty"),
        ({"instruction": "open the drawer", "gripper_width_m": [0.1, float("nan")]}, "gripper_width_m: value 1 is NaN"),
        ({"instruction": "open the drawer", "gripper_width_m": [80.0, 79.0]}, "millimetres"),
        ({"instruction": "open the drawer", "gripper_width_m": "wide"}, "gripper_width_m"),
        ({"instruction": ""}, "instruction: is empty"),
        ({"instruction": "x" * 10_000}, "instruction: has 10000 characters, the limit is 500"),
        ({"instruction": "open", "embodiment": "octopus"}, "embodiment: 'octopus'"),
        ({"instruction": "open", "colour": 1}, "colour: "),
        ({"gripper_width_m": [0.1]}, "instruction: is missing"),
        ({"episode_uri": "../../etc/passwd"}, "is not of the form sha256-"),
        ({"episode_uri": "sha256-" + "0" * 64 + ".hdf5"}, "is not in the store"),
        ("a string", "request: "),
        (None, "request: "),
    ],
)
def test_bad_requests(running: Rig, request_: Any, expected: str) -> None:
    assert expected in running.ask(request_)["error"]


def external_link(file: h5py.File) -> None:
    del file["data/demo_0/obs/gripper_width"]
    file["data/demo_0/obs/gripper_width"] = h5py.ExternalLink("/etc/other.hdf5", "/x")


def external_storage(file: h5py.File) -> None:
    del file["data/demo_0/obs/gripper_width"]
    file["data/demo_0/obs"].create_dataset("gripper_width", (8,), "f4", external=[("/etc/hostname", 0, 32)])


def no_widths(file: h5py.File) -> None:
    del file["data/demo_0/obs/gripper_width"]


def wrong_length(file: h5py.File) -> None:
    del file["data/demo_0/actions"]
    file["data/demo_0/actions"] = np.zeros((7, 4), np.float32)


def no_demos(file: h5py.File) -> None:
    del file["data/demo_0"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (external_link, "episode: demo_0: the file: /data/demo_0: obs/gripper_width is a link"),
        (external_storage, "/data/demo_0/obs/gripper_width: is stored in another file"),
        (no_widths, "the file: /data/demo_0: dataset obs/gripper_width is missing"),
        (wrong_length, "the file: /data/demo_0: num_samples differs from the 7 actions stored"),
        (no_demos, "holds no demonstration"),
    ],
)
def test_bad_files(running: Rig, change: Any, expected: str) -> None:
    buffer = io.BytesIO(hdf5([GRASP]))
    with h5py.File(buffer, "r+") as file:
        change(file)
    uri = running.store.put(buffer.getvalue(), "hdf5")
    assert expected in running.ask({"episode_uri": uri})["error"]


def test_not_hdf5_and_truncated(running: Rig) -> None:
    said = running.ask({"episode_uri": running.store.put(b"PK" * 99, "hdf5")})["error"]
    assert said == "episode: the file: is not an HDF5 file"
    whole = hdf5([GRASP] * 20)
    for part in (whole[:100], whole[: len(whole) // 2], whole[:-200]):
        assert "truncated or damaged" in running.ask({"episode_uri": running.store.put(part, "hdf5")})["error"]


def test_poison_messages_do_not_stop_the_queue(running: Rig) -> None:
    before = running.client.xlen(DEAD)
    poison = ["not even JSON", "[1, 2]", "{}", b"\xff\xfe", '{"body": "x", "headers": {}, "properties": {"delivery_info": {}}}']
    for entry in poison:
        running.client.lpush("segment", entry)
    running.celery.send_task("world2act.unknown", kwargs={}, queue="segment")
    running.celery.send_task("world2act.segment", kwargs={"wrong": 1}, queue="segment")
    assert running.ask({"instruction": "close the drawer"})["task"] == "drawer-close"
    assert running.client.xlen(DEAD) == before + len(poison)
    assert "not even JSON" in running.client.xrange(DEAD)[0][1]["json"]


def test_a_body_that_does_not_decode(running: Rig) -> None:
    """An envelope that is well formed around a body that is not; and a content type that is not JSON."""
    properties = {"delivery_info": {"exchange": "", "routing_key": "segment"}, "delivery_tag": "t1", "body_encoding": "base64"}
    envelope = {"headers": {"task": "world2act.segment", "id": "x1"}, "content-encoding": "utf-8", "properties": properties}
    before = running.client.xlen(DEAD)
    for content_type, body in (
        ("application/json", "!!"),
        ("application/json", "e30="),
        ("application/x-python-serialize", "gAQu"),
    ):
        running.client.lpush("segment", json.dumps({**envelope, "content-type": content_type, "body": body}))
    assert running.ask({"instruction": "press the button"})["task"] == "button-press"
    assert running.client.xlen(DEAD) == before + 3


def test_kill_9_in_the_middle_then_done_once(rig: Rig) -> None:
    """The killed worker's task comes back to its successor, ends once, and leaves nothing behind."""
    uri = rig.store.put(hdf5([GRASP] * 200), "hdf5")
    with rig.worker() as first:
        task = rig.send({"episode_uri": uri})
        wait_for(lambda: any(rig.client.scan_iter("w2a:segment:attempts:*")), 20, "task begun")
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not task.ready()
    attempts = next(rig.client.scan_iter("w2a:segment:attempts:*"))
    with rig.worker():
        result = task.get(timeout=40)
        assert result["statistics"]["episodes"] == 200
        metrics = rig.get("/metrics").decode()
        assert 'w2a_segment_requests_total{outcome="done"} 1.0' in metrics
        assert 'w2a_segment_episodes_total{outcome="synced"} 200.0' in metrics
        wait_for(lambda: rig.client.hlen("unacked") == 0 and rig.client.llen("segment") == 0, 10, "queue empty")
    assert not rig.client.exists(attempts)
    assert len(list(rig.client.scan_iter("w2a:segment:result:*"))) == 1


def test_request_that_kills_its_workers_becomes_a_dead_letter(rig: Rig) -> None:
    request = {"instruction": "press the button"}
    from services.runtime.artifacts import content_key
    from world2act import __version__

    rig.client.set(f"w2a:segment:attempts:{content_key('segment', __version__, request)}", 3)  # three workers died of it
    with rig.worker():
        assert "given up" in rig.ask(request)["error"]
        assert rig.client.xlen(DEAD) == 1
        assert rig.ask({"instruction": "close the drawer"})["task"] == "drawer-close"


def test_redis_restart(rig: Rig) -> None:
    """The worker outlives its broker and goes on without a restart."""
    with rig.worker() as worker:
        rig.valkey.kill()
        wait_for(lambda: worker.poll() is None, 1)
        rig.valkey.start()
        assert rig.ask({"instruction": "open the door"}, 30)["task"] == "door-open"


def test_terminates_cleanly(rig: Rig) -> None:
    with rig.worker() as worker:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(15) == 0


def test_busy_metrics_port(rig: Rig) -> None:
    with rig.worker():
        environment = {**os.environ, "W2A_REDIS_URL": rig.valkey.url, "W2A_METRICS_PORT": str(rig.metrics_port)}
        command = [sys.executable, "-m", "services.segmenter"]
        second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert second.returncode == 1 and f"cannot bind metrics port {rig.metrics_port}" in second.stderr
    assert "Traceback" not in second.stderr


def test_planner_llm_through_the_worker(rig: Rig) -> None:
    """One worker, a scripted model: a slow start, a wrong answer, the right ones; then from what is kept. No key in any file."""
    key = "sk-very-secret-0123456789"
    steps = [{"prompt": "grasp the puck", "ends": "contact_on"}, {"prompt": "push the puck to the goal", "ends": "end"}]
    plan = {"task": "push", "steps": steps, "explanation": "two steps"}
    alignment = {"boundaries": [{"step": 0, "index": 25, "reason": "it closes"}], "missing": [], "explanation": "one grasp"}
    server = Server()
    server.turns = [refused(429, "slow down", Retry_After="0"), said("Sure!"), said(plan), said(alignment)]
    request = {"instruction": "push the puck to the goal", "gripper_width_m": GRASP.tolist()}
    try:
        with rig.worker(W2A_LLM_BASE_URL=server.url, W2A_LLM_KEY=key, W2A_RUN_DIR=str(rig.folder / "run")):
            result = rig.ask({**request, "planner": "llm"})
            (episode,) = result["episodes"]
            assert [(s["prompt"], s["start"], s["end"]) for s in episode["skills"]] == [
                ("grasp the puck", 0, 28),
                ("push the puck to the goal", 28, 48),
            ]
            assert "it closes" in episode["skills"][0]["reason"] and result["llm"]["requests"] == 4
            assert "llm" not in rig.ask(request), "the rules are another request"
            assert rig.ask({**request, "planner": "llm", "embodiment": "metaworld"})["llm"]["requests"] == 0
            assert b'w2a_segment_llm_tokens_total{kind="prompt"} 300.0' in rig.get("/metrics")
        assert len(server.requests) == 4 and server.requests[0]["key"] == f"Bearer {key}"
        written = [p.read_bytes() for p in rig.folder.rglob("*") if p.is_file() and "valkey" not in p.parts]
        assert written and not any(key.encode() in content for content in written)
        assert len((rig.folder / "run" / "llm.jsonl").read_text().splitlines()) >= 3
    finally:
        server.close()


def test_planner_llm_without_a_model(running: Rig) -> None:
    result = running.ask({"instruction": "open the drawer", "planner": "llm"})
    assert result["error"].startswith("planner: no language model is configured")
