"""`python -m services.simulator`, the real process: leases, chunks, killed environments, bad input, health."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import numpy as np
import psutil
import pytest

from services.runtime.generated import simulator_pb2 as pb
from services.runtime.generated.simulator_pb2_grpc import SimulatorStub
from services.runtime.generated.tensor_pb2 import Tensor
from services.runtime.rpc import connect_channel, healthy
from services.runtime.tensors import from_tensor, to_tensor
from services.simulator.envs import base
from services.simulator.envs.metaworld import SPEC
from tests.processes import free_port, wait_for
from tests.stand_ins import packages
from world2act.splits import Split, scene_seed
from world2act.types import FloatArray

pytestmark = pytest.mark.integration
TIMEOUT = 150  # generous: a starved machine is slow, not wrong
CHUNK = np.random.default_rng(0).uniform(-1, 1, (4, 4)).astype(np.float32)


@dataclass
class Service:
    process: subprocess.Popen[bytes]
    stub: SimulatorStub
    address: str
    metrics: str
    leased: set[str] = field(default_factory=set)

    def environments(self) -> list[psutil.Process]:
        """The environment processes (multiprocessing starts one helper process beside them)."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    def reset(self, task: str = "push", index: int = 0, **fields: object) -> pb.ResetReply:
        reply = self.stub.Reset(pb.ResetRequest(task=task, split="tuning", index=index, **fields), timeout=TIMEOUT)
        self.leased.add(reply.env_id)
        return reply

    def step(self, *env_ids: str, actions: FloatArray = CHUNK, frames: int = pb.FRAMES_LAST) -> pb.StepReply:
        chunks = [pb.Chunk(env_id=env_id, actions=to_tensor(actions)) for env_id in env_ids]
        return self.stub.Step(pb.StepRequest(chunks=chunks, frames=frames), timeout=TIMEOUT)

    def close(self, *env_ids: str) -> None:
        self.stub.Close(pb.CloseRequest(env_ids=env_ids), timeout=TIMEOUT)


@contextmanager
def running(environments: int = 2, path: str = "", **settings: object) -> Iterator[Service]:
    """path: packages that come before the installed ones."""
    port, metrics = free_port(), free_port()
    variables = {"SIMULATOR_PORT": port, "METRICS_PORT": metrics, "SIMULATOR_ENVIRONMENTS": environments, **settings}
    environment = {**os.environ, **{f"W2A_{name}": str(value) for name, value in variables.items()}}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (path, environment.get("PYTHONPATH"))))
    process = subprocess.Popen([sys.executable, "-m", "services.simulator"], env=environment)
    address = f"127.0.0.1:{port}"
    try:
        wait_for(lambda: process.poll() is not None or healthy(address), TIMEOUT, "simulator serves")
        with connect_channel(address) as channel:
            yield Service(process, SimulatorStub(channel), address, f"http://127.0.0.1:{metrics}")
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as service:
        yield service


@pytest.fixture(autouse=True)
def no_lease_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "service" in request.fixturenames:
        service = request.getfixturevalue("service")
        service.close(*service.leased)
        service.leased.clear()


@contextmanager
def refused(code: grpc.StatusCode, *words: str) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() == code, caught.value.details()
    for word in words:
        assert word in caught.value.details()


def test_describe_is_the_environments_own(service: Service) -> None:
    reply = service.stub.Describe(pb.DescribeRequest())
    assert (reply.simulator, reply.chunk, reply.environments, reply.gripper_width_index) == ("metaworld", 4, 2, 3)
    assert [(c.name, c.height, c.width, c.cell) for c in reply.cameras] == [("primary", 64, 64, 0), ("wrist", 64, 64, 1)]
    assert {"reach", "push", "pick-place", "drawer-open", "drawer-close", "button-press", "door-open"} == {
        t.name for t in reply.tasks
    }
    assert [a.unit for a in reply.state] == ["m"] * 4 and len(reply.action) == 4


def test_an_episode_equals_the_same_scene_in_process(service: Service) -> None:
    env = base.make("metaworld")
    expected = env.reset("push", scene_seed(Split.TUNING, 3))
    reply = service.reset(index=3)
    assert reply.instruction == "push the puck to the green goal"
    assert (from_tensor(reply.state) == expected.state).all()
    for frames, name in ((pb.FRAMES_LAST, "last"), (pb.FRAMES_NONE, "none"), (pb.FRAMES_ALL, "all")):
        result = service.step(reply.env_id, frames=frames).results[0]
        step = env.step(CHUNK, name)
        assert (from_tensor(result.states) == step.states).all() and result.success == step.success
        for camera in ("primary", "wrist"):
            got = from_tensor(result.images[camera])
            assert got.shape == step.images[camera].shape and (got == step.images[camera]).all()
    env.close()
    service.close(reply.env_id)


def test_leases_wait_run_out_and_come_back(service: Service) -> None:
    held = [service.reset(index=i).env_id for i in range(2)]
    assert len(set(held)) == 2
    started = time.monotonic()
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "no free environment within 0.4 s"):
        service.reset(wait_seconds=0.4)
    assert 0.3 < time.monotonic() - started < 20
    results = service.step(*held).results
    assert [r.env_id for r in results] == held
    timer = threading.Timer(0.5, service.close, held[:1])
    timer.start()
    third = service.reset(index=9, wait_seconds=60).env_id
    assert third not in held
    with refused(grpc.StatusCode.NOT_FOUND, "env_id", "unknown or its lease expired"):
        service.step(held[0])
    again = service.reset(index=5, env_id=third)
    assert again.env_id == third, "an environment can be reset under its lease"
    service.close(held[1], third, "never existed")
    service.close(held[1])


def test_the_episode_limit_is_told_and_kept(service: Service) -> None:
    env_id = service.reset("reach").env_id
    limit = SPEC.task("reach").max_chunks
    dones = [service.step(env_id, frames=pb.FRAMES_NONE).results[0].done for _ in range(limit)]
    assert dones == [False] * (limit - 1) + [True]
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "episode limit is reached"):
        service.step(env_id)
    service.reset("reach", env_id=env_id)
    service.step(env_id)
    service.close(env_id)


def test_a_killed_environment_is_unavailable_then_recovers(service: Service) -> None:
    held = [service.reset(index=i).env_id for i in range(2)]
    before = service.environments()
    assert len(before) == 2
    before[0].send_signal(signal.SIGKILL)
    with refused(grpc.StatusCode.UNAVAILABLE, "reset"):
        service.step(*held)
    codes = []
    for env_id in held:  # reset the episodes that are lost; a survivor goes on
        try:
            service.step(env_id)
        except grpc.RpcError as error:
            codes.append(error.code())
            service.reset(env_id=env_id)
            service.step(env_id)
    assert codes and set(codes) == {grpc.StatusCode.UNAVAILABLE}
    assert len(service.environments()) == 2
    # one dies in the middle of a call: it is stopped, and the other one is seen to work on its part of the call
    victim, other = service.environments()
    with ThreadPoolExecutor(1) as threads:
        victim.suspend()
        before_call = sum(other.cpu_times()[:2])
        call = threads.submit(service.step, *held, frames=pb.FRAMES_ALL)
        wait_for(lambda: sum(other.cpu_times()[:2]) > before_call, TIMEOUT, "the call reaches the environments")
        assert not call.done()
        victim.kill()
        with refused(grpc.StatusCode.UNAVAILABLE, "process died", "all episodes of this call are lost"):
            call.result(TIMEOUT)
    for env_id in held:
        with refused(grpc.StatusCode.UNAVAILABLE):
            service.step(env_id)
        service.reset(env_id=env_id)
        service.step(env_id)
    service.close(*held)
    metrics = urllib.request.urlopen(f"{service.metrics}/metrics").read().decode()
    restarts = next(line for line in metrics.splitlines() if line.startswith("w2a_simulator_restarts_total"))
    assert float(restarts.split()[1]) == 2


def test_an_idle_death_is_repaired_unasked(service: Service) -> None:
    victim = service.environments()[0]
    victim.kill()
    wait_for(lambda: len(service.environments()) == 2 and victim not in service.environments(), 60, "restart")
    held = [service.reset(index=i).env_id for i in range(2)]
    assert len(set(held)) == 2, "both environments serve again"
    service.step(*held)
    service.close(*held)


def with_actions(tensor: Tensor, env_id: str) -> pb.StepRequest:
    return pb.StepRequest(chunks=[pb.Chunk(env_id=env_id, actions=tensor)])


def test_bad_resets(service: Service) -> None:
    for fields, words in (
        ({"task": "no-such"}, ("task: 'no-such' is unknown", "drawer-open")),
        ({"task": "x" * 10_000}, ("task:", "choose one of")),
        ({"split": "train"}, ("split: 'train' is unknown", "posttrain")),
        ({"split": ""}, ("split: ''",)),
        ({"index": -1}, ("index: -1 is outside [0, 1000000)",)),
        ({"index": 10**6}, ("index: 1000000 is outside",)),
        ({"wait_seconds": -1.0}, ("wait_seconds: -1.0 is outside",)),
        ({"wait_seconds": float("nan")}, ("wait_seconds: nan",)),
    ):
        request = {"task": "push", "split": "tuning", "index": 0, **fields}
        with refused(grpc.StatusCode.INVALID_ARGUMENT, *words):
            service.stub.Reset(pb.ResetRequest(**request), timeout=TIMEOUT)
    with refused(grpc.StatusCode.NOT_FOUND, "env_id: 'ghost'"):
        service.reset(env_id="ghost")
    held = [service.reset(wait_seconds=5).env_id for _ in range(2)]  # no refused call kept a lease
    service.close(*held)


def test_bad_steps(service: Service) -> None:
    env_id = service.reset().env_id
    good = to_tensor(CHUNK)
    nan = CHUNK.copy()
    nan[1, 2] = np.nan
    for request, words in (
        (pb.StepRequest(), ("chunks: 0 chunks, the limit is 1 to 2",)),
        (pb.StepRequest(chunks=[pb.Chunk(env_id=str(i), actions=good) for i in range(3)]), ("chunks: 3 chunks",)),
        (pb.StepRequest(chunks=[pb.Chunk(env_id=env_id, actions=good)] * 2), ("chunks[1].env_id: appears twice",)),
        (pb.StepRequest(chunks=[pb.Chunk(env_id=env_id, actions=good)], frames=7), ("frames: 7 is unknown", "FRAMES_ALL")),
        (with_actions(to_tensor(CHUNK[:, :3]), env_id), ("chunks[0].actions: shape must be (m, 4), got (4, 3)",)),
        (with_actions(to_tensor(CHUNK.astype(np.float64)), env_id), ("chunks[0].actions: dtype must be float32, got float64",)),
        (with_actions(to_tensor(np.tile(CHUNK, (2, 1))), env_id), ("8 actions, the limit is 1 to 4",)),
        (with_actions(to_tensor(nan), env_id), ("values must be finite",)),
        (with_actions(to_tensor(CHUNK * 3), env_id), ("is outside [-1, 1]",)),
        (with_actions(Tensor(dtype="object", shape=[4, 4], data=b""), env_id), ("chunks[0].actions: dtype 'object'",)),
        (with_actions(Tensor(dtype="float32", shape=[4, 4], data=b"123"), env_id), ("chunks[0].actions: 3 bytes",)),
        (with_actions(Tensor(), env_id), ("chunks[0].actions: dtype ''",)),
    ):
        with refused(grpc.StatusCode.INVALID_ARGUMENT, *words):
            service.stub.Step(request, timeout=TIMEOUT)
    with refused(grpc.StatusCode.NOT_FOUND, "env_id: 'ghost'"):
        service.step("ghost", env_id)
    fresh = base.make("metaworld")  # and nothing moved
    fresh.reset("push", scene_seed(Split.TUNING, 0))
    assert (from_tensor(service.step(env_id).results[0].states) == fresh.step(CHUNK, "none").states).all()
    fresh.close()
    service.close(env_id)


def test_health_readiness_and_metrics(service: Service) -> None:
    assert healthy(service.address)
    for path in ("healthz", "readyz"):
        assert urllib.request.urlopen(f"{service.metrics}/{path}").status == 200
    metrics = urllib.request.urlopen(f"{service.metrics}/metrics").read().decode()
    for name in ("w2a_simulator_actions_total", 'w2a_simulator_resets_total{task="push"}', "w2a_simulator_step_seconds_count"):
        assert name in metrics


def test_idle_leases_expire_and_sigterm_leaves_no_process() -> None:
    with running(1, SIMULATOR_LEASE_SECONDS=3.0) as service:
        env_id = service.reset().env_id
        for _ in range(4):
            time.sleep(1.0)
            service.step(env_id, frames=pb.FRAMES_NONE)  # use keeps a lease alive
        second = service.reset(wait_seconds=60).env_id
        assert second != env_id
        with refused(grpc.StatusCode.NOT_FOUND, "expired"):
            service.step(env_id)
        children = psutil.Process(service.process.pid).children(recursive=True)
        service.process.terminate()
        assert service.process.wait(60) == 0
        assert not psutil.wait_procs(children, timeout=30)[1]


def test_a_killed_server_takes_its_environments_along() -> None:
    with running(1) as service:
        children = service.environments()
        service.process.kill()
        assert children and not psutil.wait_procs(children, timeout=TIMEOUT)[1]


def test_robocasas_words_of_a_scene_pass_the_door() -> None:
    """Its adapter on a stand-in: every scene has its own instruction."""
    settings = {"SIMULATOR_NAME": "robocasa", "ROBOCASA_IMAGE_SIZE": 32}
    with running(1, str(packages.folder("robocasa")), **settings) as service:
        reply = service.stub.Describe(pb.DescribeRequest())
        assert [(c.name, c.cell) for c in reply.cameras] == [("left", 0), ("right", 1), ("wrist", 2)]
        assert len(reply.tasks) == 24 and len(reply.action) == 12
        first = service.reset("PnPCounterToCab")
        told = {service.reset("PnPCounterToCab", index, env_id=first.env_id).instruction for index in range(6)}
        assert len(told) > 1 and all(words.startswith("pick the ") for words in told)
        actions = np.full((4, 12), 0.1, np.float32)
        result = service.step(first.env_id, actions=actions, frames=pb.FRAMES_ALL).results[0]
        assert from_tensor(result.images["wrist"]).shape == (4, 32, 32, 3)


def test_a_busy_port_and_an_unknown_simulator_end_with_a_sentence(service: Service) -> None:
    for variable, value, words in (
        ("W2A_SIMULATOR_PORT", service.address.split(":")[1], "is another process using the port?"),
        ("W2A_SIMULATOR_NAME", "no-such", "simulator_name: 'no-such' is unknown"),
        ("W2A_SIMULATOR_NAME", "robocasa365", "robocasa365 needs RoboCasa 1, which is not installed"),
    ):
        environment = {**os.environ, "W2A_SIMULATOR_ENVIRONMENTS": "1", "W2A_METRICS_PORT": str(free_port()), variable: value}
        command = [sys.executable, "-m", "services.simulator"]
        ended = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT)
        assert ended.returncode == 1
        assert words in ended.stderr.decode() and "Traceback" not in ended.stderr.decode()
