"""The runtime that services share: codec, artifacts, streams (on a real Valkey), jobs, health."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from structlog.testing import capture_logs

from services.runtime import rpc, telemetry
from services.runtime.artifacts import ArtifactError, ArtifactStore, content_key
from services.runtime.generated.tensor_pb2 import Tensor
from services.runtime.jobs import JobStore
from services.runtime.messages import DEAD, DeadLetter, PolicyVersion
from services.runtime.settings import CommonSettings
from services.runtime.streams import Consumer, backlog, publish, read_all
from services.runtime.telemetry import heartbeats, serve_health, start_heartbeat
from services.runtime.tensors import DTYPES, from_tensor, pack, to_tensor, unpack, unpack_metadata
from tests.processes import free_port


@given(
    hnp.arrays(st.sampled_from([np.dtype(d) for d in DTYPES]), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
def test_tensor_round_trip(array: np.ndarray) -> None:
    back = from_tensor(to_tensor(array))
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(dtype="object", shape=[1], data=b"12345678"),
        Tensor(dtype="float32", shape=[2], data=b"1234"),
        Tensor(dtype="float32", shape=[-1], data=b""),
        Tensor(dtype="uint8", shape=[1] * 9, data=b"1"),
        Tensor(dtype="float64", shape=[2**40, 2**20], data=b""),
    ],
)
def test_tensor_from_the_wire_is_checked(tensor: Tensor) -> None:
    with pytest.raises(ValueError, match="images"):
        from_tensor(tensor, "images")


def test_artifacts_are_content_addressed_and_checked(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    arrays = {"b": np.arange(3, dtype=np.float32), "a": np.zeros((2, 2), np.uint8)}
    name = store.put_tensors(arrays, {"task": "reach"})
    assert store.put_tensors(dict(reversed(list(arrays.items()))), {"task": "reach"}) == name
    assert np.array_equal(store.get_tensors(name)["b"], arrays["b"])
    assert store.get_metadata(name) == {"task": "reach"}
    Path(store.path(name)).write_bytes(b"corrupt")
    with pytest.raises(ArtifactError, match="corrupt"):
        store.get(name)
    for bad in ("../../etc/passwd", "sha256-12.json", name.replace("sha256", "sha1")):
        with pytest.raises(ArtifactError):
            store.get(bad)
    with pytest.raises(ArtifactError, match="not in the store"):
        store.get("sha256-" + "0" * 64 + ".json")
    key = content_key("imagine", {"b": 1, "a": 2})
    assert key == content_key("imagine", {"a": 2, "b": 1}) and store.recall(key) is None
    store.remember(key, name)
    assert store.recall(key) == name
    assert not list(tmp_path.rglob("*.tmp"))


def test_pack_is_deterministic() -> None:
    a = {"x": np.ones(3), "y": np.zeros(2)}
    metadata = {name: name for name in ["task", "split", "index", "version", "prompts", "key"]}
    packed = pack(a, metadata)
    assert all(pack(dict(reversed(list(a.items()))), dict(reversed(list(metadata.items())))) == packed for _ in range(20))
    assert np.array_equal(unpack(packed)["x"], a["x"]) and unpack_metadata(packed) == metadata
    assert set(unpack(pack(a))) == {"x", "y"} and unpack_metadata(pack(a)) == {}


def version(n: int) -> PolicyVersion:
    return PolicyVersion(namespace="n", version=n, artifact="a", published=0.0)


def test_stream_delivers_each_message_and_claims_from_the_dead(valkey: redis.Redis) -> None:
    dead = Consumer(valkey, "s", "g", "dead", PolicyVersion, claim_ms=50)
    dead.ensure_group()
    for n in range(3):
        publish(valkey, "s", version(n))
    assert [m.version for _, m in dead.fetch(2)] == [0, 1]  # and dies before it acknowledges
    assert backlog(valkey, "s", "g") == 3
    time.sleep(0.1)
    heir = Consumer(valkey, "s", "g", "heir", PolicyVersion, claim_ms=50)
    seen: list[int] = []
    stop = threading.Event()

    def handle(message: PolicyVersion) -> None:
        seen.append(message.version)
        if len(seen) == 3:
            stop.set()

    heir.run(handle, stop)
    assert sorted(seen) == [0, 1, 2] and backlog(valkey, "s", "g") == 0


def test_a_restarted_consumer_first_gets_what_it_left(valkey: redis.Redis) -> None:
    first = Consumer(valkey, "r", "g", "worker", PolicyVersion)
    first.ensure_group()
    publish(valkey, "r", version(7))
    assert len(first.fetch()) == 1
    again = Consumer(valkey, "r", "g", "worker", PolicyVersion)
    assert [m.version for _, m in again.fetch()] == [7]


def test_poison_goes_to_the_dead_letters_and_the_queue_goes_on(valkey: redis.Redis) -> None:
    consumer = Consumer(valkey, "p", "g", "c", PolicyVersion, claim_ms=1, max_deliveries=2, retryable=(TimeoutError,))
    consumer.ensure_group()
    valkey.xadd("p", {"json": "{not json"})
    valkey.xadd("p", {"other": "x"})
    publish(valkey, "p", version(1))  # its handler raises
    publish(valkey, "p", version(2))  # is tried again and again
    publish(valkey, "p", version(3))
    stop = threading.Event()
    tries = 0

    def handle(message: PolicyVersion) -> None:
        nonlocal tries
        if message.version == 1:
            raise ZeroDivisionError("boom")
        if message.version == 2:
            tries += 1
            time.sleep(0.005)
            raise TimeoutError("later")

    thread = threading.Thread(target=consumer.run, args=(handle, stop))
    thread.start()
    deadline = time.time() + 20
    while time.time() < deadline and int(valkey.xlen(DEAD)) < 4:
        time.sleep(0.02)
    stop.set()
    thread.join(10)
    letters = [m for _, m in read_all(valkey, DEAD, DeadLetter)]
    assert len(letters) == 4
    assert {m.error.split(":")[0].split(" ")[0] for m in letters} == {"unreadable", "ZeroDivisionError", "gave"}
    assert tries == 2 and backlog(valkey, "p", "g") == 0


def test_job_life(valkey: redis.Redis) -> None:
    jobs = JobStore(valkey)
    job = jobs.create("evaluate", {"tasks": ["reach"]})
    assert jobs.update(job.id, status="running", progress=0.5).progress == 0.5
    for _ in range(2):  # as a client that lost the answer asks again
        jobs.event(job.id, "metric", {"loss": 1.0}, once="update-1")
    assert jobs.update(job.id, status="succeeded").status == "succeeded"
    assert jobs.update(job.id, status="running").status == "succeeded", "an ended job stays ended"
    names = [name for _, name, _ in jobs.events(job.id)]
    assert names == ["status", "metric", "status", "status"]
    queued = jobs.create("rollout", {})
    assert jobs.cancel(queued.id).status == "cancelled" and jobs.cancelled(queued.id)
    assert jobs.get("nope") is None


def test_health_readiness_and_heartbeat(valkey: redis.Redis) -> None:
    port = free_port()
    broken: list[str] = ["triton: connection refused"]
    server = serve_health("vla", CommonSettings(metrics_port=port), {"triton": lambda: broken[0] if broken else None})

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    assert get("/healthz")[0] == 200
    status, body = get("/readyz")
    assert status == 503 and json.loads(body)["failed"] == {"triton": "triton: connection refused"}
    broken.clear()
    assert get("/readyz")[0] == 200 and "python_info" in get("/metrics")[1] and get("/x")[0] == 404
    with pytest.raises(OSError, match=f"metrics port {port}"):
        serve_health("vla", CommonSettings(metrics_port=port), {})
    server.shutdown()
    stop = threading.Event()
    start_heartbeat(valkey, "vla", "0", stop)
    deadline = time.time() + 5
    while time.time() < deadline and not heartbeats(valkey):
        time.sleep(0.02)
    stop.set()
    assert heartbeats(valkey)["vla:0"] < 5


def test_a_heartbeat_without_redis_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "HEARTBEAT_SECONDS", 0.01)
    stop, tries = threading.Event(), list[int]()

    class Client:  # no Redis, then one, then none
        def set(self, *_: object, **__: object) -> None:
            tries.append(0)
            if not 5 <= len(tries) <= 8:
                raise redis.exceptions.ConnectionError("refused")

    with capture_logs() as logs:
        thread = start_heartbeat(cast(redis.Redis, Client()), "vla", "0", stop)
        while len(tries) < 12:
            time.sleep(0.01)
        stop.set()
        thread.join()
    assert [entry["log_level"] for entry in logs] == ["warning", "info", "warning"]


def test_a_name_stands_for_all_its_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(host: str, port: str, **_: object) -> list[tuple[object, ...]]:
        if host == "gone":
            raise socket.gaierror("Name or service not known")
        numbers = {"simulator": ["10.0.0.9", "10.0.0.7"], "six": ["fd00::7"]}.get(host, [host])
        kinds = [socket.AF_INET6 if ":" in number else socket.AF_INET for number in numbers]
        return [(kind, socket.SOCK_STREAM, 6, "", (number, int(port))) for kind, number in zip(kinds, numbers, strict=True)]

    monkeypatch.setattr(socket, "getaddrinfo", known)
    found = rpc.replicas(["simulator:50061", "10.0.0.7:50061", "gone:1", "six:2"])
    assert found == ["10.0.0.7:50061", "10.0.0.9:50061", "gone:1", "[fd00::7]:2"]


def test_an_empty_instance_is_the_hosts_name() -> None:
    assert CommonSettings(instance="").instance == socket.gethostname() and CommonSettings().instance == "0"
