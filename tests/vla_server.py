"""A real policy server process on small random weights, and bundles for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import torch

from services.runtime.artifacts import ArtifactStore
from services.runtime.generated import policy_pb2, policy_pb2_grpc
from services.runtime.generated.policy_pb2_grpc import PolicyStub
from services.runtime.rpc import connect_channel, healthy, start_server
from services.runtime.tensors import from_tensor, to_tensor
from services.vla.__main__ import load_engine
from services.vla.batcher import Batcher
from services.vla.engine import ActJob, Chunks
from services.vla.service import PolicyServicer
from services.vla.settings import VlaSettings
from services.vla.versions import Versions
from tests.processes import free_port, wait_for
from world2act.bundle import ActionLayout, Bundle, Origin
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.models.residual import ResidualPolicy, ResidualSettings
from world2act.models.tiny_policy import TinyPolicy
from world2act.models.worldmodel import WorldModel
from world2act.normalisation import Statistics
from world2act.types import D, FloatArray


def make_zoo(folder: Path) -> Origin:
    """Random base policy, world model and adapters that belong together; returns their hashes."""
    torch.manual_seed(0)
    worldmodel, policy = WorldModel(), TinyPolicy()
    worldmodel.save(folder / "worldmodel.safetensors", {})
    policy.action_std.fill_(0.3)
    policy.save(folder / "base.safetensors", {})
    adapters = Adapters(AdapterSettings(), Statistics(torch.zeros(4), torch.full((4,), 0.5)), worldmodel.hash)
    return Origin(policy.hash, worldmodel.hash, adapters.save(folder / "adapters.safetensors"))


def make_bundle(origin: Origin, version: int, vision: str = "latent", layout: ActionLayout | None = None) -> Bundle:
    """A residual with random weights, different for each version and clearly not zero."""
    torch.manual_seed(100 + version)
    adapters = Adapters(AdapterSettings(), Statistics(torch.zeros(4), torch.full((4,), 0.5)), origin.worldmodel)
    residual = ResidualPolicy.from_adapters(ResidualSettings(vision=vision), adapters)  # type: ignore[arg-type]
    torch.nn.init.normal_(residual.head[-1].weight, std=1.0 / D**0.5)
    torch.nn.init.normal_(residual.head[-1].bias)
    residual.eval().requires_grad_(False)
    return Bundle(residual, adapters.settings, adapters.actions, layout or ActionLayout(), origin, version)


def observation(seed: int, instruction: str = "open the drawer") -> policy_pb2.Observation:
    """Noise images and a small state, from `seed`."""
    rng = np.random.default_rng(seed)
    images = {name: to_tensor(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for name in ("primary", "wrist")}
    state = to_tensor(rng.uniform(-0.5, 0.5, 4).astype(np.float32))
    return policy_pb2.Observation(images=images, state=state, instruction=instruction)


class VlaProcess:
    """`python -m services.vla` that can be killed and started again on the same port."""

    def __init__(self, folder: Path, redis_url: str = "redis://127.0.0.1:1/0", **settings: object) -> None:
        self.folder, self.port, self.metrics_port = folder, free_port(), free_port()
        self.zoo = folder / "zoo"
        self.origin = make_zoo(self.zoo)
        self.artifacts = ArtifactStore(f"file://{folder / 'artifacts'}")
        self.settings = {
            "zoo": self.zoo,
            "artifacts_url": f"file://{folder / 'artifacts'}",
            "redis_url": redis_url,
            "vla_port": self.port,
            "metrics_port": self.metrics_port,
            **settings,
        }
        self.log = folder / "vla.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.channel = connect_channel(f"127.0.0.1:{self.port}")
        self.stub = PolicyStub(self.channel)

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start without waiting."""
        environment = {**os.environ, **{f"W2A_{k.upper()}": str(v) for k, v in self.settings.items()}}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "services.vla"], env=environment, stdout=log, stderr=log)
        return self.process

    def start(self) -> VlaProcess:
        process = self.spawn()

        def up() -> bool:
            assert process.poll() is None, self.log.read_text()[-2000:]
            return healthy(f"127.0.0.1:{self.port}", 1.0)

        wait_for(up, 60, "policy server answers")
        return self

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Signal and reap; the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(20)

    def close(self) -> None:
        self.channel.close()
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def act(
        self, seeds: list[int], version: int = 0, namespace: str = "", stub: PolicyStub | None = None
    ) -> tuple[FloatArray, FloatArray, FloatArray, int]:
        """Base, residual, combined (B, M, A) and the version that acted."""
        request = policy_pb2.ActRequest(observations=[observation(s) for s in seeds], namespace=namespace, version=version)
        reply = (stub or self.stub).Act(request, timeout=30)
        base, residual, combined = (from_tensor(t) for t in (reply.base, reply.residual, reply.combined))
        return base, residual, combined, reply.version

    def publish(self, version: int, **changes: object) -> str:
        """Store a bundle; its artifact name."""
        return self.artifacts.put(make_bundle(self.origin, version, **changes).to_bytes(), "safetensors")  # type: ignore[arg-type]

    def load(self, version: int, uri: str | None = None, namespace: str = "") -> list[int]:
        """Load a version (a random bundle if no artifact is named); the namespace's versions."""
        request = policy_pb2.LoadRequest(namespace=namespace, version=version, uri=uri or self.publish(version))
        return list(self.stub.Load(request, timeout=30).versions)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as reply:
            lines = reply.read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line and not line.startswith("#")}


def failure(call: object) -> tuple[grpc.StatusCode, str]:
    """Status and sentence of the gRPC error that `call()` raises."""
    try:
        call()  # type: ignore[operator]
    except grpc.RpcError as error:
        return error.code(), error.details()
    raise AssertionError("no error was raised")


@contextmanager
def serving_tiny(folder: Path) -> Iterator[str]:
    """A policy server in this process, on random weights; its address."""
    make_zoo(folder)
    settings = VlaSettings(zoo=folder)
    engine = load_engine(settings)
    batcher: Batcher[ActJob, Chunks] = Batcher(engine.compute, settings.vla_max_batch, 0.0)
    servicer = PolicyServicer(engine, batcher, Versions(8, 8), ArtifactStore(f"file://{folder / 'artifacts'}"), 4)
    server, _, port = start_server(lambda s: policy_pb2_grpc.add_PolicyServicer_to_server(servicer, s), "127.0.0.1:0")
    yield f"127.0.0.1:{port}"
    server.stop(1.0).wait()
    batcher.close()
