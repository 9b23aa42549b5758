"""A real Triton on small random weights, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.processes import free_port, wait_for
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.models.vae import VAEConfig
from world2act.models.worldmodel import WorldModel, WorldModelConfig
from world2act.normalisation import Statistics

ROOT = Path(__file__).parents[2]
SMALL = WorldModelConfig(
    vae=VAEConfig(widths=(8, 8, 16)), heads=2, head_width=12, layers=1, text_width=8, adaln_width=8, noise_scale=0.5
)
"""A tiny world model; noise_scale > 0, so that seeds show."""


def make_zoo(folder: Path, seed: int = 0) -> Path:
    """Write worldmodel.safetensors and adapters.safetensors with small random weights that belong together."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = WorldModel(SMALL)
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)  # untrained it is zero: prompts would not show
    model.save(folder / "worldmodel.safetensors", {})
    adapters = Adapters(AdapterSettings(), Statistics(torch.zeros(4), torch.ones(4)), model.hash)
    adapters.save(folder / "adapters.safetensors", {})
    return folder


class TritonProcess:
    """`python -m services.worldmodel triton` on free ports; it can be killed and started again."""

    def __init__(self, zoo: Path, run_dir: Path, settings: dict[str, str] | None = None) -> None:
        self.zoo, self.run_dir, self.settings = zoo, run_dir, settings or {}
        self.http, self.grpc, self.metrics = free_port(), free_port(), free_port()
        self.address = f"127.0.0.1:{self.grpc}"
        self.log = run_dir / "triton.log"
        self.process: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "W2A_ZOO": str(self.zoo),
            "W2A_RUN_DIR": str(self.run_dir),
            "W2A_TRITON_HTTP_PORT": str(self.http),
            "W2A_TRITON_GRPC_PORT": str(self.grpc),
            "W2A_TRITON_METRICS_PORT": str(self.metrics),
            **self.settings,
        }

    def launch(self) -> subprocess.Popen[bytes]:
        """Start without waiting."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "services.worldmodel", "triton"]
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.environment(), stdout=log, stderr=log)
        return self.process

    def ready(self) -> bool:
        """Whether server and models are ready. A server that ended will never be: wait no longer."""
        if self.process is None or self.process.poll() is not None:
            pytest.fail(f"triton ended: {self.log.read_text()[-2000:]}")
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=2) as reply:
            return bool(reply.status == 200)

    def start(self, seconds: float = 240.0) -> None:
        self.launch()
        wait_for(self.ready, seconds, "triton is ready")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def regions(self) -> set[Path]:
        """Its files in shared memory."""
        return set(Path("/dev/shm").glob(f"w2a_triton_{self.grpc}_*"))

    def stop(self) -> int:
        """End it as the CLI does; returns the exit status."""
        assert self.process is not None
        self.process.terminate()
        status = self.process.wait(60)
        self.process = None
        return status


@contextmanager
def running_triton(zoo: Path, run_dir: Path, settings: dict[str, str] | None = None) -> Iterator[TritonProcess]:
    server = TritonProcess(zoo, run_dir, settings)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        for region in server.regions():
            region.unlink(missing_ok=True)
