"""Imagination: clips a second through stream, worker, Triton and artifact store, and what a cache hit costs.

A clip is one start frame imagined one chunk ahead (a closed-loop target). Peer: world model and video adapter of the same
weights, called in this process in the same batches of 64. Both sides take turns, so that a busy machine slows both. Start frames
are random pictures, new in every request; their content does not change the small world model's rate.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import redis
import torch

from services.runtime.artifacts import ArtifactStore
from services.runtime.embedded import valkey_command
from services.runtime.messages import IMAGINE_REQUESTS, ImagineRequest, ImagineResult, SkillPrompt, imagined
from services.runtime.settings import CommonSettings
from services.runtime.streams import connect, publish, read_all
from world2act.models.adapters import Adapters
from world2act.models.worldmodel import WorldModel

ROWS = 64
REQUESTS = 4
ROUNDS = 3
LATENCIES = 15
START_SECONDS = 240.0


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def processes(folder: Path) -> Iterator[tuple[redis.Redis, ArtifactStore]]:
    """Valkey, Triton and the worker on free ports, ready."""
    redis_port, http, grpc, triton_metrics, metrics = free_ports(5)
    environment = {
        **os.environ,
        "W2A_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
        "W2A_ARTIFACTS_URL": f"file://{folder}/artifacts",
        "W2A_RUN_DIR": str(folder),
        "W2A_TRITON_HTTP_PORT": str(http),
        "W2A_TRITON_GRPC_PORT": str(grpc),
        "W2A_TRITON_ADDRESS": f"127.0.0.1:{grpc}",
        "W2A_TRITON_METRICS_PORT": str(triton_metrics),
        "W2A_METRICS_PORT": str(metrics),
    }
    service = [sys.executable, "-m", "services.worldmodel"]
    commands = [valkey_command("127.0.0.1", redis_port, folder / "redis"), [*service, "triton"], [*service, "worker"]]
    log = folder / "log"
    with log.open("ab") as output:
        started = [subprocess.Popen(command, env=environment, stdout=output, stderr=output) for command in commands]
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready(metrics):
            if time.monotonic() > deadline or any(p.poll() is not None for p in started):
                raise RuntimeError(f"imagination services did not start: {log.read_text()[-1500:]}")
            time.sleep(0.2)
        yield connect(environment["W2A_REDIS_URL"]), ArtifactStore(environment["W2A_ARTIFACTS_URL"])
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            process.wait(30)


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class Asker:
    """Asks for imaginations and waits for their results."""

    def __init__(self, client: redis.Redis, store: ArtifactStore) -> None:
        self.client, self.store, self.asked, self.place = client, store, 0, "0"

    def ask(self, frames: np.ndarray) -> None:
        self.asked += 1
        skills = [[SkillPrompt(prompt="open the drawer", chunks=1)]] * len(frames)
        starts = self.store.put_tensors({"frames": frames})
        publish(self.client, IMAGINE_REQUESTS, ImagineRequest(id=str(self.asked), reply="bench", starts=starts, skills=skills))

    def wait(self, count: int) -> list[ImagineResult]:
        """The next `count` results."""
        found: list[ImagineResult] = []
        while len(found) < count:
            for entry, result in read_all(self.client, imagined("bench"), ImagineResult, self.place, block_ms=1000):
                self.place = entry
                found.append(result)
        if errors := [r.error for r in found if r.error]:
            raise RuntimeError(errors[0])
        return found

    def seconds(self, frames: np.ndarray, *, hit: bool) -> float:
        """From asking to having the embeddings of one request."""
        started = time.perf_counter()
        self.ask(frames)
        [result] = self.wait(1)
        self.store.get_tensors(result.artifact)
        if result.cache_hit != hit:
            raise RuntimeError(f"expected cache_hit={hit}, got {result.cache_hit}")
        return time.perf_counter() - started


def run() -> list[dict[str, object]]:
    """Rows {name, value, unit, ratio}."""
    zoo = CommonSettings().zoo
    model, adapters = WorldModel.load(zoo / "worldmodel.safetensors"), Adapters.load(zoo / "adapters.safetensors")
    torch.set_num_threads(CommonSettings().torch_threads)
    generator = np.random.default_rng(0)

    def pictures(rows: int) -> np.ndarray:
        return generator.integers(0, 256, (rows, model.config.vae.height, model.config.vae.width, 3), np.uint8)

    def library(frames: np.ndarray) -> None:
        with torch.no_grad():
            adapters.video(model.imagine(torch.tensor(frames), ["open the drawer"] * ROWS, 1, [0] * ROWS)[:, 1:])

    seconds = {"library": 0.0, "worker": 0.0}
    with tempfile.TemporaryDirectory() as folder, processes(Path(folder)) as (client, store):
        asker = Asker(client, store)
        asker.seconds(pictures(ROWS), hit=False)  # first calls are slow on both sides
        library(pictures(ROWS))
        for _ in range(ROUNDS):
            batches = [pictures(ROWS) for _ in range(REQUESTS)]
            started = time.perf_counter()
            for batch in batches:
                library(batch)
            seconds["library"] += time.perf_counter() - started
            started = time.perf_counter()
            for batch in batches:
                asker.ask(batch)
            asker.wait(REQUESTS)
            seconds["worker"] += time.perf_counter() - started
        frames = [pictures(1) for _ in range(LATENCIES)]
        miss = statistics.median(asker.seconds(frame, hit=False) for frame in frames)
        hit = statistics.median(asker.seconds(frame, hit=True) for frame in frames)
    clips = ROWS * REQUESTS * ROUNDS
    rates = {name: clips / value for name, value in seconds.items()}
    return [
        {"name": "clips through the worker", "value": rates["worker"], "unit": "clips/s", "ratio": ""},
        {
            "name": "clips by the library in process",
            "value": rates["library"],
            "unit": "clips/s",
            "ratio": f"worker {rates['worker'] / rates['library']:.2f}x",
        },
        {"name": "one clip, computed (median)", "value": 1000 * miss, "unit": "ms", "ratio": ""},
        {"name": "one clip, from the cache (median)", "value": 1000 * hit, "unit": "ms", "ratio": f"{miss / hit:.1f}x faster"},
    ]


if __name__ == "__main__":
    for row in run():
        print(f"{row['name']:<40} {row['value']:>10.1f} {row['unit']:<8} {row['ratio']}")
