"""The REST door against a real Valkey: what it accepts and refuses, jobs, events, artifacts, limits, token."""

from __future__ import annotations

import base64
import json
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import redis
from fastapi import FastAPI
from fastapi.testclient import TestClient

from services.gateway.app import create_app
from services.gateway.doors import Doors
from services.gateway.problems import ProblemError
from services.gateway.requests import EXAMPLES, EvaluateRequest, ImagineRequest, PosttrainRequest, RolloutRequest, Stage1Request
from services.gateway.settings import GatewaySettings
from services.runtime.jobs import JobStore
from services.runtime.messages import JOBS, POLICY_VERSIONS, PolicyVersion
from services.runtime.streams import publish
from services.trainer import params as trainer_params
from tests.processes import ValkeyProcess, free_port

TASKS = ["drawer-open", "reach"]


def settings_for(folder: Path, url: str, **changes: Any) -> GatewaySettings:
    (folder / "data").mkdir(exist_ok=True)
    port = free_port()
    values = {
        "redis_url": url,
        "artifacts_url": f"file://{folder}/artifacts",
        "data_root": folder / "data",
        "triton_http_port": port,
        "vla_port": port,
        "simulator_port": port,
        "check_timeout_s": 0.5,
        "segment_wait_s": 0.3,
        "json_limit_bytes": 20_000,
        "upload_limit_bytes": 200_000,
    }
    return GatewaySettings(**(values | changes))


@pytest.fixture(scope="module")
def app(valkey_server: ValkeyProcess, tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    return create_app(settings_for(tmp_path_factory.mktemp("gateway"), valkey_server.url))


@pytest.fixture
def data(app: FastAPI) -> Path:
    """The data folder."""
    return Path(app.state.doors.settings.data_root)


@pytest.fixture
def client(app: FastAPI, valkey: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """A gateway on an empty Valkey whose simulator, policy and Triton answer."""
    monkeypatch.setattr(Doors, "describe_tasks", lambda self: TASKS)
    monkeypatch.setattr(Doors, "triton_missing", lambda self: None)
    monkeypatch.setattr(Doors, "vla_missing", lambda self: None)
    yield TestClient(app, raise_server_exceptions=False)


def problem(reply: Any, status: int, *words: str) -> dict[str, Any]:
    """`reply` is problem details of `status` whose text has all `words`."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    body = reply.json()
    assert body["status"] == status and body["title"] and "Traceback" not in reply.text
    for word in words:
        assert word in body["detail"], body
    return dict(body)


BAD_SEGMENTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"instruction": ""}, ("instruction", "empty")),
    ({"instruction": "   "}, ("instruction", "empty")),
    ({"instruction": "x" * 10_000}, ("instruction", "500")),
    ({"instruction": 7}, ("instruction", "string")),
    ({}, ("instruction", "episode")),
    ({"instruction": "open it", "episode": "a.hdf5"}, ("instruction", "episode")),
    ({"instruction": "open it", "gripper_width_m": []}, ("gripper_width_m", "empty")),
    ({"instruction": "open it", "gripper_width_m": [0.1, 80.0]}, ("gripper_width_m", "0.5 m", "millimetres")),
    ({"instruction": "open it", "gripper_width_m": [0.1, 0.1], "frames": 3}, ("gripper_width_m", "2", "3")),
    ({"instruction": "open it", "gripper_width_m": [0.1, -1.0]}, ("gripper_width_m",)),
    ({"instruction": "open it", "gripper_width_m": [0.1] * 3, "commanded_width_m": [0.1]}, ("commanded_width_m", "3")),
    ({"instruction": "open it", "gripper_width_m": "wide"}, ("gripper_width_m", "array")),
    ({"instruction": "open it", "demo": "demo_0"}, ("demo", "episode")),
    ({"episode": "a.hdf5", "demo": "a\nb"}, ("demo", "pattern")),
    ({"instruction": "open it", "colour": "red"}, ("colour",)),
]


@pytest.mark.parametrize("body, words", BAD_SEGMENTS, ids=[json.dumps(b)[:40] for b, _ in BAD_SEGMENTS])
def test_bad_segment_requests_name_field_and_limit(client: TestClient, body: dict[str, Any], words: tuple[str, ...]) -> None:
    found = problem(client.post("/segment", json=body), 422, *words)
    assert found["errors"][0]["field"].split(".")[0] == words[0]


def test_nan_and_broken_json_are_422(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    body = b'{"instruction": "open it", "gripper_width_m": [0.1, NaN]}'
    problem(client.post("/segment", content=body, headers=headers), 422, "gripper_width_m", "finite")
    for path in ("/segment", "/rollout"):
        found = problem(client.post(path, content=b'{"task":', headers=headers), 422, "body: is not JSON (")
        assert found["errors"][0]["field"] == "body"
    problem(client.post("/segment", content=b"open it", headers={"content-type": "text/plain"}), 415, "Content-Type")


def test_slow_segmentation_becomes_a_job_that_settles(client: TestClient, valkey: redis.Redis) -> None:
    reply = client.post("/segment", json={"instruction": "open the drawer"})
    assert reply.status_code == 202 and reply.headers["location"] == reply.json()["job"]
    job = reply.json()["id"]
    message = json.loads(str(valkey.lindex("segment", 0)))
    assert message["headers"]["task"] == "world2act.segment" and message["content-type"] == "application/json"
    assert client.get(f"/jobs/{job}").json()["status"] == "queued"
    done = {"status": "SUCCESS", "result": {"skills": ["open the drawer"]}, "task_id": message["headers"]["id"], "children": []}
    valkey.set(f"celery-task-meta-{message['headers']['id']}", json.dumps(done))
    found = client.get(f"/jobs/{job}").json()
    assert found["status"] == "succeeded" and found["result"] == {"skills": ["open the drawer"]}


def write_episode(path: Path, demos: int = 1, noise: int = 0) -> Path:
    with h5py.File(path, "w") as f:
        for i in range(demos):
            demo = f.create_group(f"data/demo_{i}")
            demo.attrs["instruction"] = "open the drawer"
            demo["obs/gripper_width"] = np.full(8, 0.1, np.float32)
            demo["noise"] = np.random.default_rng(0).integers(0, 255, noise, np.uint8)
    return path


def test_episode_uploads_are_checked_and_stored(client: TestClient, valkey: redis.Redis, tmp_path: Path) -> None:
    good = write_episode(tmp_path / "good.hdf5")
    assert client.post("/segment", files={"file": good.read_bytes()}, data={"demo": "demo_0"}).status_code == 202
    message = json.loads(str(valkey.lindex("segment", 0)))
    request = json.loads(base64.b64decode(message["body"]))[1]["request"]
    assert request["demo"] == "demo_0" and request["episode_uri"].endswith(".hdf5")
    assert client.get(f"/artifacts/{request['episode_uri']}").content == good.read_bytes()

    def refused(data: bytes, *words: str, **form: str) -> None:
        problem(client.post("/segment", files={"file": data}, data=form), 422, *words)
        assert valkey.llen("segment") == 1

    refused(b"hello", "file", "not an HDF5")
    refused(good.read_bytes()[:-100], "file", "truncated")
    refused(good.read_bytes(), "demo", "'demo_7'", demo="demo_7")
    refused(good.read_bytes(), "colour", colour="red")
    damaged = bytearray(good.read_bytes())
    damaged[40:1200] = b"\xff" * 1160
    refused(bytes(damaged), "file")
    problem(client.post("/segment", data={"demo": "demo_0"}, files={"other": b"x"}), 422, "other")


def test_episodes_that_refer_to_other_files_are_refused(client: TestClient, tmp_path: Path) -> None:
    def refused(path: Path, *words: str) -> None:
        problem(client.post("/segment", files={"file": path.read_bytes()}), 422, *words)

    secret = write_episode(tmp_path / "secret.hdf5")
    for name, link in (("external", h5py.ExternalLink(str(secret), "/data")), ("soft", h5py.SoftLink("/elsewhere"))):
        path = write_episode(tmp_path / f"{name}.hdf5")
        with h5py.File(path, "a") as f:
            f["data/demo_0/x"] = link
        refused(path, "link")
    raw = tmp_path / "raw.hdf5"
    with h5py.File(raw, "w") as f:
        f.create_dataset("data/demo_0/w", (4,), "u1", external=[("/etc/passwd", 0, 4)])
    refused(raw, "another file")
    virtual = tmp_path / "virtual.hdf5"
    with h5py.File(virtual, "w") as f:
        layout = h5py.VirtualLayout((8,), "f4")
        layout[:] = h5py.VirtualSource(str(secret), "data/demo_0/obs/gripper_width", (8,))
        f.create_virtual_dataset("data/demo_0/w", layout)
    refused(virtual, "another file")
    bomb = tmp_path / "bomb.hdf5"
    with h5py.File(bomb, "w") as f:
        f.create_dataset("data/demo_0/w", (10**9,), "u1", chunks=(10**6,), compression="gzip")
    refused(bomb, "expands")


def test_episode_paths_stay_in_the_data_folder(client: TestClient, data: Path, valkey: redis.Redis) -> None:
    write_episode(data.parent / "outside.hdf5")
    write_episode(data / "inside.hdf5")
    (data / "link.hdf5").symlink_to(data.parent / "outside.hdf5")
    assert client.post("/segment", json={"episode": "inside.hdf5"}).status_code == 202
    (data / "set/meta").mkdir(parents=True)
    (data / "set/meta/info.json").write_text("{}")
    assert client.post("/segment", json={"episode": "set", "demo": "episode_000003", "gripper": [14, 15]}).status_code == 202
    message = json.loads(str(valkey.lindex("segment", 0)))
    request = json.loads(base64.b64decode(message["body"]))[1]["request"]
    before = request.pop("episode_stamp")
    assert request == {"episode_path": "set", "demo": "episode_000003", "gripper": [14, 15]}, "by its place: nothing is copied"
    problem(client.post("/segment", json={"instruction": "open the drawer", "gripper": [6]}), 422, "gripper", "episode")
    (data / "set/meta/info.json").write_text('{"fps": 20}')
    assert client.post("/segment", json={"episode": "set"}).status_code == 202
    message = json.loads(str(valkey.lindex("segment", 0)))
    assert json.loads(base64.b64decode(message["body"]))[1]["request"]["episode_stamp"] != before, (
        "changed data is another request"
    )
    for path in ("../outside.hdf5", str(data.parent / "outside.hdf5"), "link.hdf5", "a/../../outside.hdf5"):
        problem(client.post("/segment", json={"episode": path}), 400, "episode", "outside")
    problem(client.post("/segment", json={"episode": "a\x00b"}), 400, "episode")
    problem(client.post("/segment", json={"episode": "missing.hdf5"}), 404, "episode")
    problem(client.post("/stage1", json={"demos": "../.."}), 400, "demos", "outside")
    write_episode(data / "large.hdf5", noise=300_000)
    assert client.post("/segment", json={"episode": "large.hdf5"}).status_code == 202, "the limit is of uploads"


def test_bodies_over_the_limit_are_413(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    problem(client.post("/segment", content=b"x" * 20_001, headers=headers), 413, "20000 bytes")
    problem(client.post("/posttrain", content=(b"x" * 5_000 for _ in range(5)), headers=headers), 413, "20000 bytes")  # no length
    problem(client.post("/segment", files={"file": b"x" * 300_000}), 413, "200000")


BAD_JOBS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("/rollout", {"task": "fly", "indices": [0]}, ("task", "'fly'", "drawer-open, reach")),
    ("/rollout", {"task": "reach", "indices": []}, ("indices", "at least 1")),
    ("/rollout", {"task": "reach", "indices": [0, 1_000_000]}, ("indices", "[1]", "1000000")),
    ("/rollout", {"task": "reach", "indices": list(range(65))}, ("indices", "64")),
    ("/rollout", {"task": "reach", "indices": ["0"]}, ("indices.0", "integer")),
    ("/rollout", {"task": "reach", "indices": [0], "mode": "dream"}, ("mode", "imagine")),
    ("/rollout", {"task": "reach", "indices": [0], "split": "test"}, ("split", "evaluation")),
    ("/rollout", {"task": "reach", "indices": [0], "version": -2}, ("version", "-1")),
    ("/rollout", {"indices": [0]}, ("task", "required")),
    ("/imagine", {"task": "reach", "instruction": "x" * 501}, ("instruction", "500")),
    ("/imagine", {"task": "reach", "instruction": "go", "skills": [{"prompt": "go", "chunks": 1}]}, ("skills", "not both")),
    ("/imagine", {"task": "reach", "skills": [{"prompt": "go", "chunks": 99}]}, ("skills.0.chunks", "32")),
    ("/posttrain", {"tasks": []}, ("tasks", "at least 1")),
    ("/posttrain", {"tasks": ["fly"]}, ("tasks", "drawer-open, reach")),
    ("/posttrain", {"tasks": ["reach", "reach"]}, ("tasks", "twice")),
    ("/posttrain", {"tasks": ["reach"], "preset": "best"}, ("preset", "default", "paper")),
    ("/posttrain", {"tasks": ["reach"], "eta": 0}, ("eta", "synchronous")),
    ("/posttrain", {"tasks": ["reach"], "mode": "serial", "eta": 2}, ("eta", "serial")),
    ("/posttrain", {"tasks": ["reach"], "lr": 1}, ("lr",)),
    ("/evaluate", {"tasks": ["reach"], "episodes": 0}, ("episodes", "1")),
    ("/evaluate", {"tasks": ["reach"], "split": "posttrain"}, ("split", "evaluation")),
    ("/stage1", {"seed": -1}, ("seed", "0")),
]


@pytest.mark.parametrize("path, body, words", BAD_JOBS, ids=[f"{p} {json.dumps(b)[:40]}" for p, b, _ in BAD_JOBS])
def test_bad_job_requests(
    client: TestClient, valkey: redis.Redis, path: str, body: dict[str, Any], words: tuple[str, ...]
) -> None:
    found = problem(client.post(path, json=body), 422, *words)
    assert found["errors"][0]["field"] == words[0]
    assert not valkey.exists(JOBS), "nothing was queued"


GOOD_JOBS: list[tuple[str, dict[str, Any]]] = [
    (kind, example["value"])
    for kind in ("rollout", "imagine", "posttrain", "evaluate", "stage1")
    for example in EXAMPLES[kind].values()
]
GOOD_JOBS += [
    ("rollout", {"task": "reach", "seeds": [3], "mode": "imagine", "namespace": "abc", "version": 2, "seed": 1, "video": False}),
    ("imagine", {"task": "reach", "skills": [{"prompt": "reach the goal", "chunks": 4}], "index": 2}),
    (
        "posttrain",
        {"tasks": ["reach"], "mode": "synchronous", "rounds": 1, "episodes": 2, "namespace": "n", "eta": 0},
    ),
    ("evaluate", {"tasks": ["reach"], "versions": [{"version": 0}, {"namespace": "n", "version": 1}], "first_index": 5}),
    ("stage1", {"preset": "paper", "steps": 5, "demos": "sub", "seed": 3}),
]


@pytest.mark.parametrize("kind, body", GOOD_JOBS, ids=[f"{k} {json.dumps(b)[:40]}" for k, b in GOOD_JOBS])
def test_accepted_jobs_are_what_the_trainer_takes(client: TestClient, kind: str, body: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(Doors, "describe_tasks", lambda self: [*TASKS, "door-open"])
    reply = client.post(f"/{kind}", json=body)
    assert reply.status_code == 202, reply.text
    job = client.get(reply.json()["job"]).json()
    assert job["kind"] == kind and job["status"] == "queued"
    trainer_params.parse(kind, job["params"])  # raises where the two checks disagree
    if "seeds" in body:
        assert job["params"]["indices"] == body["seeds"]


def test_both_checks_know_the_same_fields() -> None:
    ours = {"rollout": RolloutRequest, "imagine": ImagineRequest, "posttrain": PosttrainRequest, "evaluate": EvaluateRequest}
    for kind, model in (ours | {"stage1": Stage1Request}).items():
        assert set(model.model_fields) <= set(trainer_params.PARAMS[kind].model_fields), kind


@pytest.mark.parametrize(
    "door, path, body",
    [
        ("triton", "/rollout", {"task": "reach", "indices": [0]}),
        ("triton", "/posttrain", {"tasks": ["reach"]}),
        ("vla", "/evaluate", {"tasks": ["reach"]}),
        ("simulator", "/imagine", {"task": "reach"}),
    ],
)
def test_a_door_that_is_down_is_named(
    client: TestClient, valkey: redis.Redis, monkeypatch: Any, door: str, path: str, body: dict[str, Any]
) -> None:
    def no_simulator(self: Doors) -> list[str]:
        raise ProblemError(503, "simulator at nowhere does not answer", service="simulator")

    if door == "simulator":
        monkeypatch.setattr(Doors, "describe_tasks", no_simulator)
    else:
        monkeypatch.setattr(Doors, f"{door}_missing", lambda self: "at nowhere does not answer")
    beat(valkey)
    reply = client.post(path, json=body)
    assert problem(reply, 503, door)["service"] == door and reply.headers["retry-after"]
    ready = client.get("/readyz")
    assert ready.status_code == 200 and list(ready.json()["missing"]) == [door]
    monkeypatch.undo()


def beat(client: redis.Redis, seconds_ago: float = 0.0, *workers: str) -> None:
    """Heartbeats as the workers write them."""
    for worker in workers or ("segmenter", "worldmodel", "rollout", "trainer"):
        client.set(f"w2a:heartbeat:{worker}:0", f"{time.time() - seconds_ago:.3f}")


def test_a_silent_worker_is_named(client: TestClient, valkey: redis.Redis) -> None:
    beat(valkey, 0.0, "worldmodel", "rollout")
    beat(valkey, 40.0, "segmenter", "rollout")
    valkey.set("w2a:heartbeat:rollout:1", f"{time.time():.3f}")  # another replica lives
    ready = client.get("/readyz")
    assert ready.status_code == 200 and ready.json()["status"] == "degraded"
    missing = ready.json()["missing"]
    assert set(missing) == {"segmenter", "trainer"} == set(client.get("/status").json()["missing"])
    assert missing["segmenter"].startswith("gave its last heartbeat 40") and missing["trainer"] == "has never given a heartbeat"


def test_jobs_are_listed_and_cancelled(client: TestClient) -> None:
    ids = [client.post("/stage1", json={"seed": i}).json()["id"] for i in range(3)]
    assert [job["id"] for job in client.get("/jobs").json()] == ids[::-1]
    assert len(client.get("/jobs?limit=2").json()) == 2
    assert client.delete(f"/jobs/{ids[0]}").json()["status"] == "cancelled"
    assert client.delete(f"/jobs/{ids[0]}").json()["status"] == "cancelled"
    for call in (client.get, client.delete):
        problem(call("/jobs/nope"), 404, "nope")
    problem(client.get("/jobs/nope/events"), 404, "nope")
    problem(client.get("/jobs?limit=0"), 422, "limit")
    problem(client.get("/nothing"), 404)
    problem(client.put("/segment"), 405)


def parse(text: str) -> list[dict[str, str]]:
    return [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.replace("\r", "").strip().split("\n\n")]


def test_events_end_with_the_job_and_resume(client: TestClient, valkey: redis.Redis) -> None:
    jobs = JobStore(valkey)
    job = client.post("/stage1", json={}).json()["id"]
    jobs.update(job, status="running", progress=0.5, message="half")
    jobs.event(job, "metrics", {"loss": 0.25})
    jobs.update(job, status="succeeded", progress=1.0, result={"artifact": "x"})
    found = parse(client.get(f"/jobs/{job}/events").text)
    assert [e["event"] for e in found] == ["status", "metrics", "status", "end"]
    assert json.loads(found[1]["data"])["loss"] == 0.25
    assert json.loads(found[-1]["data"])["result"] == {"artifact": "x"}
    rest = parse(client.get(f"/jobs/{job}/events", headers={"Last-Event-ID": found[1]["id"]}).text)
    assert [e["event"] for e in rest] == ["status", "end"]
    problem(client.get(f"/jobs/{job}/events", headers={"Last-Event-ID": "latest"}), 400, "Last-Event-ID")


def test_artifacts_are_served_with_ranges(client: TestClient) -> None:
    name = client.app.state.doors.artifacts.put(bytes(range(100)), "mp4")  # type: ignore[attr-defined]
    whole = client.get(f"/artifacts/{name}")
    assert whole.content == bytes(range(100)) and whole.headers["content-type"] == "video/mp4"
    part = client.get(f"/artifacts/{name}", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == bytes(range(10, 20)) and part.headers["content-range"] == "bytes 10-19/100"
    problem(client.get(f"/artifacts/sha256-{'0' * 64}.mp4"), 404, "not in the store")
    for bad in ("passwd", "..%2Fkeys", f"sha256-{'0' * 64}.mp4%00", f"sha256-{'0' * 63}.mp4"):
        assert client.get(f"/artifacts/{bad}").status_code in (400, 404)


def test_policy_versions_of_a_namespace(client: TestClient, valkey: redis.Redis) -> None:
    for namespace, version in (("a", 1), ("b", 1), ("a", 2)):
        publish(
            valkey, POLICY_VERSIONS, PolicyVersion(namespace=namespace, version=version, artifact=f"x{version}", published=1.0)
        )
    assert [v["version"] for v in client.get("/policies/a").json()] == [1, 2]
    assert client.get("/policies/none").json() == []


def test_imports_that_are_no_bundles_are_refused_before_they_are_stored(client: TestClient, app: FastAPI) -> None:
    stored = sorted(Path(app.state.doors.artifacts.root).rglob("*.safetensors"))
    for data in (b"", b"hello", (10**9).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        problem(client.post("/policies/default", files={"file": data}), 422, "file: is not a safetensors file, or is truncated")
    problem(client.post("/policies/default", files={"other": b"x"}), 422, "file: must be the form's one field")
    problem(client.post("/policies/default", json={}), 415, "multipart/form-data")
    problem(client.post("/policies/a b", files={"file": b"x"}), 422, "namespace")
    problem(client.post("/policies/default", files={"file": b"x" * 300_000}), 413, "200000")
    assert sorted(Path(app.state.doors.artifacts.root).rglob("*.safetensors")) == stored


def test_token_guards_everything_but_health(valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    for changes in ({"gateway_token": "s3cret"}, {"gateway_token_file": tmp_path / "token"}):
        client = TestClient(create_app(settings_for(tmp_path, valkey_server.url, **changes)))
        for path in ("/", "/jobs", "/docs", "/openapi.json", "/status", "/nothing"):
            assert "Bearer" in client.get(path).headers["www-authenticate"]
            problem(client.get(path, headers={"Authorization": "Bearer wrong"}), 401, "token")
        assert client.get("/healthz").status_code == 200
        assert client.get("/jobs", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        assert client.get("/jobs", auth=("anyone", "s3cret")).status_code == 200


def test_other_sites_may_not_post(client: TestClient) -> None:
    problem(client.post("/stage1", json={}, headers={"Origin": "http://elsewhere.example"}), 403, "elsewhere.example")
    assert client.post("/stage1", json={}, headers={"Origin": "http://testserver"}).status_code == 202


def test_public_hosts_need_a_token() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        GatewaySettings(host=host).check_host()
    with pytest.raises(ValueError, match=r"192\.168\.0\.1 is not a loopback"):
        GatewaySettings(host="192.168.0.1").check_host()
    GatewaySettings(host="192.168.0.1", gateway_token="x").check_host()


def test_a_token_file_is_written_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "token"
    settings = GatewaySettings(host="192.168.0.1", gateway_token_file=path, gateway_token_create=True)
    made = settings.token()
    assert len(made) >= 24 and path.read_text().strip() == made and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert settings.token() == made, "kept over restarts"
    given = GatewaySettings(gateway_token_file=path, gateway_token_create=True, gateway_token="s3cret")
    assert given.token() == "s3cret" == path.read_text().strip(), "clients that read the file get the token that was given"
    for changes in (
        {"gateway_token_file": tmp_path / "no" / "token", "gateway_token_create": True},
        {"gateway_token_file": tmp_path},
    ):
        with pytest.raises(ValueError, match="gateway_token_file: cannot read"):
            GatewaySettings(**changes).token()
    with pytest.raises(ValueError, match="gateway_token_file: cannot read"):
        GatewaySettings(gateway_token_file=tmp_path / "other").token()
    assert [p.name for p in tmp_path.iterdir()] == ["token"]


def test_openapi_has_examples_that_are_valid(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/segment", "/rollout", "/posttrain", "/jobs/{job_id}/events", "/artifacts/{name}"} <= set(paths)
    for path in ("/segment", "/rollout", "/imagine", "/posttrain", "/evaluate", "/stage1"):
        assert paths[path]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for page in ("/", "/docs"):
        text = client.get(page).text
        assert "<!doctype html>" in text and "https://" not in text, "works without any other site"
