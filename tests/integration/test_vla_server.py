"""The policy server as a real process: batching across clients, hot reload, refusals, restart."""

from __future__ import annotations

import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import numpy as np
import pytest
import redis
import torch
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from services.runtime.generated import policy_pb2
from services.runtime.generated.policy_pb2_grpc import PolicyStub
from services.runtime.rpc import connect_channel
from services.runtime.telemetry import heartbeats
from services.runtime.tensors import to_tensor
from tests.processes import ValkeyProcess, free_port, wait_for
from tests.vla_server import VlaProcess, failure, make_bundle, observation
from world2act.bundle import ActionLayout
from world2act.models import store
from world2act.models.worldmodel import WorldModel

pytestmark = pytest.mark.integration
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, valkey_server: ValkeyProcess) -> Iterator[VlaProcess]:
    process = VlaProcess(
        tmp_path_factory.mktemp("vla"), valkey_server.url, vla_max_wait_ms=30, vla_keep_versions=3, vla_max_batch=16
    )
    yield process.start()
    process.close()


def test_describe_and_health(server: VlaProcess, valkey_server: ValkeyProcess) -> None:
    reply = server.stub.Describe(policy_pb2.PolicyDescribeRequest())
    assert (reply.policy, reply.chunk, reply.action_size, reply.state_size, reply.max_batch) == ("tiny", 4, 4, 4, 16)
    assert (reply.base_hash, reply.worldmodel_hash, reply.adapters_hash) == (
        server.origin.base,
        server.origin.worldmodel,
        server.origin.adapters,
    )
    assert list(reply.cameras) == ["primary", "wrist"] and (reply.image_height, reply.image_width) == (64, 64)
    for path in ("healthz", "readyz"):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/{path}", timeout=5) as answer:
            assert answer.status == 200
    client = redis.Redis.from_url(valkey_server.url, decode_responses=True)
    wait_for(lambda: heartbeats(client).get("vla:0", 99) < 5, 10, "heartbeat")
    client.close()


@pytest.mark.parametrize("vision", ["latent", "pixels"])
def test_the_server_acts_as_the_library_does(server: VlaProcess, vision: str) -> None:
    """Base, residual and clipped sum against the bundle run directly, for both kinds of vision."""
    uri = server.publish(1, vision=vision)
    assert server.load(1, uri, namespace=vision) == [1]
    base, residual, combined, version = server.act([1, 2, 3], 1, vision)
    assert version == 1 and combined.shape == (3, 4, 4) and np.abs(residual).max() > 0.05
    rows = [observation(s) for s in (1, 2, 3)]
    views = [
        np.concatenate([np.frombuffer(o.images[c].data, np.uint8).reshape(64, 64, 3) for c in ("primary", "wrist")], 1)
        for o in rows
    ]
    grids = torch.from_numpy(np.stack([np.concatenate([v, np.zeros_like(v)]) for v in views]))
    states = torch.from_numpy(np.stack([np.frombuffer(o.state.data, np.float32) for o in rows]))
    encode = WorldModel.load(server.zoo / "worldmodel.safetensors").encode
    bundle = make_bundle(server.origin, 1, vision)
    expected = bundle.act(grids, states, torch.from_numpy(base.copy()), ["open the drawer"] * 3, encode)
    assert np.abs(expected[0].numpy() - residual).max() < 1e-4 and np.abs(expected[1].numpy() - combined).max() < 1e-4
    alone = server.act([1, 2, 3], 0, vision)
    assert alone[3] == 0 and not alone[1].any() and alone[2].tobytes() == base.tobytes()


def test_batches_across_clients_change_nothing(server: VlaProcess) -> None:
    """Eight clients, three versions: batches are shared, and every row equals the row asked for alone, to the bit."""
    for version in (1, 2):
        server.load(version, namespace="batch")
    jobs = [(seed, seed % 3) for seed in range(48)]
    single = [server.act([seed], version, "batch") for seed, version in jobs]
    before = server.metrics()
    channels = [connect_channel(f"127.0.0.1:{server.port}") for _ in range(8)]
    stubs = [PolicyStub(channel) for channel in channels]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: server.act([job[0]], job[1], "batch", stubs[job[0] % 8]), jobs))
    for channel in channels:
        channel.close()
    for one, other in zip(single, together, strict=True):
        assert one[3] == other[3] and all(a.tobytes() == b.tobytes() for a, b in zip(one[:3], other[:3], strict=True))
    after = server.metrics()
    rows, batches = (after[f"w2a_vla_batch_rows_{k}"] - before[f"w2a_vla_batch_rows_{k}"] for k in ("sum", "count"))
    assert rows == 48 and batches < 30
    for key in ('w2a_vla_requests_total{code="OK",method="Act"}', 'w2a_vla_latency_seconds_count{residual="yes"}'):
        assert after[key] > before[key]
    assert after["w2a_vla_loaded_versions"] >= 2


def test_hot_reload_under_fire(server: VlaProcess) -> None:
    """Requests without pause while versions 1 to 5 are loaded: no error, and each client sees -1 only move forward."""
    stop, seen, errors = threading.Event(), [[] for _ in range(4)], []  # type: ignore[var-annotated]
    expected: dict[int, bytes] = {}

    def client(number: int) -> None:
        with connect_channel(f"127.0.0.1:{server.port}") as channel:
            stub = PolicyStub(channel)
            while not stop.is_set():
                try:
                    _, _, combined, version = server.act([7], -1, "fire", stub)
                    seen[number].append(version)
                    if expected.setdefault(version, combined.tobytes()) != combined.tobytes():
                        errors.append(f"version {version} acted in two ways")
                except grpc.RpcError as error:
                    errors.append(error.details())

    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    uris = {version: server.publish(version) for version in range(1, 6)}
    for version, uri in uris.items():
        target = [len(s) + 3 for s in seen]
        wait_for(lambda target=target: all(len(s) >= t for s, t in zip(seen, target, strict=True)), 20, "requests flow")  # type: ignore[misc]
        assert server.load(version, uri, "fire") == list(range(max(1, version - 2), version + 1))  # three are kept
    wait_for(lambda: all(s and s[-1] == 5 for s in seen), 20, "the newest version acts")
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(s == sorted(s) for s in seen) and len(set(expected.values())) == len(expected) >= 3
    code, words = failure(lambda: server.act([7], 1, "fire"))
    assert (
        code == Code.FAILED_PRECONDITION and words == "version: 1 is not loaded in namespace 'fire' (loaded: 3, 4, 5); call Load"
    )
    assert server.load(1, uris[1], "fire") == [1, 4, 5] and server.act([7], 1, "fire")[3] == 1
    assert server.act([7], -1, "fire")[3] == 5


def test_bundles_that_do_not_belong_here_are_refused(server: VlaProcess) -> None:
    def refused(content: bytes, expected: Code = Code.DATA_LOSS) -> str:
        uri = server.artifacts.put(content, "safetensors")
        code, words = failure(lambda: server.load(1, uri, "refused"))
        assert code == expected
        return words

    bundle, other = make_bundle(server.origin, 1), "f" * 64
    for part, name in (("base", "base policy"), ("worldmodel", "world model"), ("adapters", "adapters")):
        foreign = replace(bundle, origin=replace(server.origin, **{part: other}))
        words = refused(foreign.to_bytes(), Code.FAILED_PRECONDITION)
        assert f"trained beside {name} {other[:12]}, but the one in use is {getattr(server.origin, part)[:12]}" in words
    tensors, metadata, _ = store.parse(bundle.to_bytes(), "residual", "bundle")
    assert "missing statistics: actions.mean" in refused(
        store.to_bytes({k: v for k, v in tensors.items() if k != "actions.mean"}, metadata)
    )
    assert "missing statistics: state_std" in refused(
        store.to_bytes({k: v for k, v in tensors.items() if k != "state_std"}, metadata)
    )
    assert "action layout has dx in [-2, 2]" in refused(
        make_bundle(server.origin, 1, layout=ActionLayout(low=(-2.0,) * 4, high=(2.0,) * 4)).to_bytes(), Code.FAILED_PRECONDITION
    )
    assert "not a safetensors file" in refused(bundle.to_bytes()[:1000])
    assert "kind must be 'residual'" in refused((server.zoo / "base.safetensors").read_bytes())

    missing = f"sha256-{other}.safetensors"
    assert failure(lambda: server.load(1, missing)) == (Code.DATA_LOSS, f"artifact: {missing} is not in the store")
    code, words = failure(lambda: server.load(1, "../../etc/passwd"))
    assert code == Code.INVALID_ARGUMENT and words.startswith("uri: must be an artifact's name")
    code, words = failure(lambda: server.load(0, missing))
    assert code == Code.INVALID_ARGUMENT and words.startswith("version: must be >= 1")
    assert failure(lambda: server.act([1], 1, "refused"))[0] == Code.FAILED_PRECONDITION  # nothing half-loaded stays


def test_bad_requests(server: VlaProcess) -> None:
    def answer(**changes: object) -> str:
        request = {"observations": [observation(0)], "version": 0, **changes}
        code, words = failure(lambda: server.stub.Act(policy_pb2.ActRequest(**request), timeout=10))
        assert code == Code.INVALID_ARGUMENT
        return words

    bad = observation(0)
    del bad.images["wrist"]
    assert answer(observations=[bad]) == "observations[0].images: camera 'wrist' is missing; needed are primary, wrist"
    bad = observation(0)
    bad.state.CopyFrom(to_tensor(np.full(4, np.nan, np.float32)))
    assert "observations[1].state: must be finite" in answer(observations=[observation(0), bad])
    assert answer(observations=[observation(0, "")]) == "observations[0].instruction: must not be empty"
    assert "at most 500 characters, got 10000" in answer(observations=[observation(0, "x" * 10_000)])
    assert answer(observations=[]) == "observations: must be 1 to 16 in one request, got 0"
    assert answer(observations=[observation(0)] * 17) == "observations: must be 1 to 16 in one request, got 17"
    assert answer(version=-2) == "version: must be >= -1, got -2"
    assert answer(namespace="../x").startswith("namespace: must be 1 to 80")
    assert server.metrics()['w2a_vla_requests_total{code="INVALID_ARGUMENT",method="Act"}'] >= 8


def test_kill_9_then_restart_then_load_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One channel through it all: after a restart the client is told that its version is gone, and loads it. Redis is away."""
    server = VlaProcess(tmp_path_factory.mktemp("vla-killed")).start()
    try:
        uri = server.publish(4)
        server.load(4, uri)
        before = server.act([3], 4)
        server.kill()
        assert failure(lambda: server.act([3], 4))[0] == Code.UNAVAILABLE
        server.start()
        wait_for(lambda: server.act([3], 0)[3] == 0, 20, "the client reconnects")
        code, words = failure(lambda: server.act([3], 4))
        assert (
            code == Code.FAILED_PRECONDITION
            and words == "version: 4 is not loaded in namespace 'default' (loaded: none); call Load"
        )
        assert server.load(4, uri) == [4] and server.load(4, uri) == [4]
        after = server.act([3], -1)
        assert after[3] == 4 and all(a.tobytes() == b.tobytes() for a, b in zip(before[:3], after[:3], strict=True))

        with ThreadPoolExecutor(4) as pool:  # SIGTERM: what was accepted is answered, then a clean end
            answers = [pool.submit(server.act, [n], -1) for n in range(4)]
            wait_for(lambda: sum(a.done() for a in answers) >= 1, 10, "requests flow")
            assert server.kill(signal.SIGTERM) == 0
            outcomes = [a.exception() for a in answers]
        assert all(o is None or (isinstance(o, grpc.RpcError) and o.code() == Code.UNAVAILABLE) for o in outcomes)
        assert "Traceback" not in server.log.read_text()

        other = WorldModel()  # weights that do not belong together: one sentence, no traceback, status 1
        torch.nn.init.constant_(other.vae.mean, 1.0)
        other.save(server.zoo / "worldmodel.safetensors", {})
        assert server.spawn().wait(150) == 1
        last = server.log.read_text().strip().splitlines()[-1]
        assert "cannot serve" in last and "adapters: trained on world model" in last
    finally:
        server.close()


def test_robots_clients_reach_a_server_that_has_no_trainer(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A residual from a file and openpi's own client: what policy.proto answers, the client gets. A public door needs a token."""
    folder = tmp_path_factory.mktemp("vla-doors")
    server = VlaProcess(
        folder, vla_openpi_port=free_port(), vla_door_token="let-me-in", vla_bundle=folder / "residual.safetensors"
    )
    try:
        make_bundle(server.origin, 5).save(folder / "residual.safetensors")
        server.start()
        row = observation(1)
        images = {name: np.frombuffer(row.images[name].data, np.uint8).reshape(64, 64, 3) for name in ("primary", "wrist")}
        client = WebsocketClientPolicy("127.0.0.1", int(str(server.settings["vla_openpi_port"])), "let-me-in")
        answer = client.infer(
            {
                "observation/image": images["primary"],
                "observation/wrist_image": images["wrist"],
                "observation/state": np.frombuffer(row.state.data, np.float32),
                "prompt": row.instruction,
            }
        )
        _, _, combined, version = server.act([1], -1)
        assert version == answer["policy_version"] == 5 and answer["actions"].tobytes() == combined[0].tobytes()
        assert server.metrics()['w2a_vla_door_requests_total{door="openpi",outcome="ok"}'] == 1
        assert server.kill(signal.SIGTERM) == 0  # with a client still connected
        assert "let-me-in" not in server.log.read_text() and "Traceback" not in server.log.read_text()
        server.settings |= {"vla_door_token": "", "vla_door_host": "0.0.0.0"}
        assert server.spawn().wait(150) == 1
        assert (
            "vla_door_token: must be set where a door binds more than loopback" in server.log.read_text().strip().splitlines()[-1]
        )
    finally:
        server.close()
