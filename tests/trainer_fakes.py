"""Stand-ins for the trainer's neighbours: recorded trajectories and targets on the streams, and small gRPC doors.

The trainer's tests are about delivery, order, restarts and bits, so their data is drawn from seeds, not simulated.
"""

# ruff: noqa: N802  (gRPC method names)

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import redis
import torch

from services.runtime.artifacts import ArtifactStore
from services.runtime.generated import policy_pb2, simulator_pb2
from services.runtime.generated.policy_pb2_grpc import PolicyServicer, add_PolicyServicer_to_server
from services.runtime.generated.simulator_pb2_grpc import SimulatorServicer, add_SimulatorServicer_to_server
from services.runtime.messages import (
    IMAGINE_REQUESTS,
    ROLLOUT_REQUESTS,
    ImagineRequest,
    ImagineResult,
    RolloutRequest,
    RolloutResult,
    imagined,
    trajectories,
)
from services.runtime.rpc import RpcError, guarded, start_server
from services.runtime.streams import Consumer, publish
from services.runtime.tensors import from_tensor, to_tensor
from services.trainer.episode import closed_loop, closed_loop_starts
from services.trainer.ledger import Ledger
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.normalisation import Statistics
from world2act.stage2 import Targets
from world2act.types import D, M, Trajectory

LATENT = (16, 4, 4)
BASE_HASH = "b" * 64
WORLDMODEL_HASH = "a" * 64
TASKS = ("drawer-open", "pick-place", "reach")


def make_adapters(zoo: Path) -> Adapters:
    """Random adapters, saved where the trainer looks for them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        adapters = Adapters(AdapterSettings(), Statistics(torch.zeros(4), torch.full((4,), 0.5)), WORLDMODEL_HASH)
    adapters.save(zoo / "adapters.safetensors", {"what": "random, for tests"})
    return Adapters.load(zoo / "adapters.safetensors")


def _rng(*parts: object) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big"))


def recorded_trajectory(task: str, index: int, key: str, split: str = "posttrain", version: int = 0) -> Trajectory:
    """What was executed in this scene, whenever and wherever one asks."""
    rng = _rng("trajectory", task, index)
    n = int(rng.integers(2, 6))
    return Trajectory(
        task=task,
        split=split,
        index=index,
        version=version,
        frames=rng.integers(0, 255, (n, 8, 8, 3)).astype(np.uint8),
        states=rng.standard_normal((n, 4)).astype(np.float32),
        base=rng.uniform(-1, 1, (n, M, 4)).astype(np.float32),
        executed=rng.uniform(-1, 1, (n, M, 4)).astype(np.float32),
        prompts=("pick up the puck", *["place the puck"] * (n - 1)),
        instruction=f"do {task}",
        key=key,
    )


def recorded_targets(task: str, index: int, n: int) -> Targets:
    """What was imagined from its n states."""
    rng = _rng("targets", task, index)
    embeddings = torch.tensor(rng.standard_normal((n, D)), dtype=torch.float32)
    visual = torch.tensor(rng.standard_normal((n, *LATENT)), dtype=torch.float32)
    return Targets(embeddings, torch.ones(n, dtype=torch.bool), visual)


class Recorded:
    """Answers rollout and imagine requests with the recorded data, in an order of its own and some of it twice.

    executed: how often each episode was executed; versions: round and policy version asked for each; stopping: whether any
    request would have let success end its episode.
    """

    def __init__(
        self, client: redis.Redis, artifacts: str, *, seed: int = 0, duplicates: bool = False, pause: float = 0.0
    ) -> None:
        self.client, self.store = client, ArtifactStore(artifacts)
        self.ledger = Ledger(client)
        self.random = random.Random(seed)
        self.duplicates, self.pause = duplicates, pause
        self.executed: Counter[str] = Counter()
        self.versions: dict[str, tuple[int, int]] = {}
        self.split, self.stopping = "posttrain", False
        self._scenes: dict[bytes, tuple[str, int, int]] = {}  # first frame -> task, index, chunks
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._rollouts, self._imagines)]

    def __enter__(self) -> Recorded:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _rollouts(self) -> None:
        consumer = Consumer(self.client, ROLLOUT_REQUESTS, "rollout", "fake", RolloutRequest)
        while not self._stop.is_set():
            batch = consumer.fetch(count=8, block_ms=30)
            self.random.shuffle(batch)
            for entry, request in batch:
                result, imagine = self._execute(request)
                self.ledger.finish(result, imagine)
                if self.duplicates:  # at-least-once delivery: the same result twice on the stream
                    publish(self.client, trajectories(request.job), result)
                consumer.ack(entry)

    def _execute(self, request: RolloutRequest) -> tuple[RolloutResult, ImagineRequest | None]:
        time.sleep(self.pause)
        started = time.time()
        self.executed[request.id] += 1
        self.versions[request.id] = (request.round, request.version)
        self.stopping |= request.stop_at_success
        trajectory = recorded_trajectory(request.task, request.index, request.id, self.split, request.version)
        arrays = {name: getattr(trajectory, name) for name in ("frames", "states", "base", "executed")}
        metadata = {
            "task": trajectory.task,
            "split": trajectory.split,
            "index": str(trajectory.index),
            "version": str(trajectory.version),
            "prompts": json.dumps(trajectory.prompts),
            "instruction": trajectory.instruction,
            "key": request.id,
        }
        name = self.store.put_tensors(arrays, metadata)
        self._scenes[trajectory.frames[0].tobytes()] = (request.task, request.index, len(trajectory.frames))
        starts, prompts = closed_loop_starts(self.store, name, list(trajectory.frames), trajectory.prompts, request.horizon)
        imagine = closed_loop(request.job, starts, prompts, request.horizon) if request.imagine else None
        result = RolloutResult(
            id=request.id,
            job=request.job,
            task=request.task,
            split=self.split,
            index=request.index,
            round=request.round,
            version=request.version,
            trajectory=name,
            imagine_id=imagine.id if imagine else "",
            chunks=len(trajectory.frames),
            started=started,
            finished=time.time(),
        )
        return result, imagine

    def _imagines(self) -> None:
        consumer = Consumer(self.client, IMAGINE_REQUESTS, "worldmodel", "fake", ImagineRequest)
        while not self._stop.is_set():
            batch = consumer.fetch(count=4, block_ms=30)
            self.random.shuffle(batch)
            for entry, request in batch:
                self._imagine(request)
                consumer.ack(entry)

    def _imagine(self, request: ImagineRequest) -> None:
        started = time.time()
        frames = self.store.get_tensors(request.starts)["frames"]
        assert len(frames) == len(request.skills)
        task, index, n = self._scenes[frames[0].tobytes()]
        rows, chunks = len(request.skills), max(sum(skill.chunks for skill in row) for row in request.skills)
        targets = recorded_targets(task, index, n)
        assert targets.visual is not None
        embeddings = torch.full((rows * chunks, D), 1e6)  # what reaches beyond the episode must not be read
        embeddings[:n] = targets.embeddings
        arrays = {
            "embeddings": embeddings.view(rows, chunks, D).numpy(),
            "mask": np.ones((rows, chunks), bool),
        }
        if request.latents:
            arrays["latents"] = torch.stack([targets.visual, targets.visual], dim=1).numpy()
        answer = ImagineResult(
            id=request.id, reply=request.reply, artifact=self.store.put_tensors(arrays), started=started, finished=time.time()
        )
        for _ in range(2 if self.duplicates else 1):
            publish(self.client, imagined(request.reply), answer)


# --- gRPC doors -----------------------------------------------------------------------------------------------------------


class FakeSimulator(SimulatorServicer):
    """Two cameras of 8x8 pixels; the state counts the actions; success after `solves` chunks."""

    def __init__(self, solves: int = 4) -> None:
        self.solves = solves
        self.open: dict[str, int] = {}
        self.resets = 0

    @guarded
    def Describe(self, request: simulator_pb2.DescribeRequest, context: grpc.ServicerContext) -> simulator_pb2.DescribeReply:
        return simulator_pb2.DescribeReply(
            simulator="metaworld",
            cameras=[simulator_pb2.Camera(name=n, height=8, width=8, cell=c) for n, c in (("primary", 0), ("wrist", 1))],
            state=[simulator_pb2.Axis(name=f"s{i}", low=-9, high=9) for i in range(4)],
            action=[simulator_pb2.Axis(name=n, low=-1, high=1) for n in ("dx", "dy", "dz", "gripper")],
            chunk=M,
            control_hz=40,
            gripper_open_width=0.1,
            gripper_width_index=3,
            tasks=[simulator_pb2.Task(name=t, instruction=f"do {t}", max_chunks=6) for t in TASKS],
            environments=2,
        )

    def _images(self, value: int, f: int = 0) -> dict[str, simulator_pb2.DescribeReply]:
        shape = (f, 8, 8, 3) if f else (8, 8, 3)
        return {n: to_tensor(np.full(shape, value + i, np.uint8)) for i, n in enumerate(("primary", "wrist"))}

    @guarded
    def Reset(self, request: simulator_pb2.ResetRequest, context: grpc.ServicerContext) -> simulator_pb2.ResetReply:
        if request.task not in TASKS:
            raise ValueError(f"task: {request.task!r} is unknown")
        self.resets += 1
        env = f"env-{self.resets}"
        self.open[env] = 0
        state = np.array([request.index, 0, 0, 0.1], np.float32)
        return simulator_pb2.ResetReply(
            env_id=env, images=self._images(10), state=to_tensor(state), instruction="pick up the puck and place it at the goal"
        )

    @guarded
    def Step(self, request: simulator_pb2.StepRequest, context: grpc.ServicerContext) -> simulator_pb2.StepReply:
        chunk = request.chunks[0]
        if chunk.env_id not in self.open:
            raise RpcError(grpc.StatusCode.NOT_FOUND, "env_id: unknown or expired")
        actions = from_tensor(chunk.actions, "actions")
        self.open[chunk.env_id] += 1
        step = self.open[chunk.env_id]
        f = len(actions) if request.frames == simulator_pb2.FRAMES_ALL else 1
        states = np.zeros((len(actions), 4), np.float32)
        states[:, 3] = 0.04 if step >= 3 else 0.1  # the gripper closes in the third chunk
        result = simulator_pb2.ChunkResult(
            env_id=chunk.env_id,
            images=self._images(10 * (step + 1), f),
            states=to_tensor(states),
            success=step >= self.solves,
            done=step >= 6,
        )
        return simulator_pb2.StepReply(results=[result])

    @guarded
    def Close(self, request: simulator_pb2.CloseRequest, context: grpc.ServicerContext) -> simulator_pb2.CloseReply:
        for env in request.env_ids:
            self.open.pop(env, None)
        return simulator_pb2.CloseReply()


class FakePolicy(PolicyServicer):
    """base 0.1 everywhere, residual 0.01 * version; a version must be loaded before it acts. `refuses`: what it says to Load.
    `unseen`: instructions that no version was trained on."""

    refuses = ""
    unseen: Collection[str] = ()

    def __init__(self, adapters_hash: str = "") -> None:
        self.adapters_hash, self.worldmodel_hash = adapters_hash, WORLDMODEL_HASH
        self.loaded: dict[tuple[str, int], str] = {}
        self.acted: list[tuple[str, int]] = []

    @guarded
    def Describe(
        self, request: policy_pb2.PolicyDescribeRequest, context: grpc.ServicerContext
    ) -> policy_pb2.PolicyDescribeReply:
        return policy_pb2.PolicyDescribeReply(
            policy="fake",
            base_hash=BASE_HASH,
            worldmodel_hash=self.worldmodel_hash,
            adapters_hash=self.adapters_hash,
            state_size=4,
            action_size=4,
            chunk=M,
        )

    @guarded
    def Act(self, request: policy_pb2.ActRequest, context: grpc.ServicerContext) -> policy_pb2.ActReply:
        version = request.version
        if version == -1:
            version = max((v for n, v in self.loaded if n == request.namespace), default=0)
        if version and (request.namespace, version) not in self.loaded:
            raise RpcError(grpc.StatusCode.FAILED_PRECONDITION, f"version {version} is not loaded")
        self.acted.append((request.namespace, version))
        base = np.full((1, M, 4), 0.1, np.float32)
        residual = np.full((1, M, 4), 0.01 * version, np.float32)
        return policy_pb2.ActReply(
            base=to_tensor(base),
            residual=to_tensor(residual),
            combined=to_tensor(base + residual),
            version=version,
            unseen=[request.observations[0].instruction in self.unseen] if version else [],
        )

    @guarded
    def Load(self, request: policy_pb2.LoadRequest, context: grpc.ServicerContext) -> policy_pb2.LoadReply:
        if self.refuses:
            raise RpcError(grpc.StatusCode.FAILED_PRECONDITION, self.refuses)
        self.loaded[request.namespace, request.version] = request.uri
        return policy_pb2.LoadReply(versions=[request.version])


@contextmanager
def serving(simulator: FakeSimulator, policy: FakePolicy) -> Iterator[tuple[str, str]]:
    """Both doors on free ports: (simulator address, policy address)."""
    sim, _, sim_port = start_server(lambda s: add_SimulatorServicer_to_server(simulator, s), "127.0.0.1:0")
    vla, _, vla_port = start_server(lambda s: add_PolicyServicer_to_server(policy, s), "127.0.0.1:0")
    try:
        yield f"127.0.0.1:{sim_port}", f"127.0.0.1:{vla_port}"
    finally:
        sim.stop(0).wait()
        vla.stop(0).wait()
