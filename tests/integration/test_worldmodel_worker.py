"""The imagination worker as a process, on a real Valkey and a real Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import redis
import torch

from services.runtime.artifacts import ArtifactStore
from services.runtime.messages import DEAD, IMAGINE_REQUESTS, DeadLetter, ImagineRequest, ImagineResult, SkillPrompt, imagined
from services.runtime.streams import backlog, connect, publish, read_all
from services.runtime.telemetry import heartbeats
from services.worldmodel.imagination import row_seed
from services.worldmodel.worker import GROUP
from tests.integration.triton_process import ROOT, TritonProcess, running_triton
from tests.processes import ValkeyProcess, free_port, running_valkey, wait_for
from world2act.data.video import decode_mp4
from world2act.models.adapters import Adapters
from world2act.models.worldmodel import WorldModel

pytestmark = pytest.mark.integration
Skills = Sequence[tuple[str, int]]


class Worker:
    """`python -m services.worldmodel`, and what its clients do: ask and read."""

    def __init__(self, client: redis.Redis, redis_url: str, triton: str, folder: Path) -> None:
        self.client, self.folder = client, folder
        self.store = ArtifactStore(f"file://{folder}/artifacts")
        self.metrics = free_port()
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "W2A_REDIS_URL": redis_url,
            "W2A_ARTIFACTS_URL": f"file://{folder}/artifacts",
            "W2A_TRITON_ADDRESS": triton,
            "W2A_METRICS_PORT": str(self.metrics),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "services.worldmodel"]
        with (self.folder / "worker.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/{path}", timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, name: str, frames: np.ndarray, rows: Sequence[Skills], **fields: Any) -> None:
        skills = [[SkillPrompt(prompt=p, chunks=n) for p, n in row] for row in rows]
        starts = self.store.put_tensors({"frames": frames})
        publish(self.client, IMAGINE_REQUESTS, ImagineRequest(id=name, reply="test", starts=starts, skills=skills, **fields))

    def results(self) -> list[ImagineResult]:
        return [m for _, m in read_all(self.client, imagined("test"), ImagineResult)]

    def result(self, name: str, seconds: float = 120.0) -> ImagineResult:
        wait_for(lambda: name in {r.id for r in self.results()}, seconds, f"result {name}")
        return next(r for r in self.results() if r.id == name)


@contextmanager
def running_worker(client: redis.Redis, redis_url: str, triton: str, folder: Path) -> Iterator[Worker]:
    worker = Worker(client, redis_url, triton, folder)
    worker.start()
    try:
        wait_for(lambda: worker.get("healthz")[0] == 200, 60, "worker lives")
        yield worker
    finally:
        assert worker.process is not None
        worker.process.terminate()
        try:
            assert worker.process.wait(20) == 0, (folder / "worker.log").read_text()[-2000:]
        finally:
            worker.process.kill()


@pytest.fixture
def worker(valkey: redis.Redis, valkey_server: ValkeyProcess, triton_server: TritonProcess, tmp_path: Path) -> Iterator[Worker]:
    with running_worker(valkey, valkey_server.url, triton_server.address, tmp_path) as worker:
        yield worker


def grids(rows: int, seed: int = 0) -> np.ndarray:
    frames = np.random.default_rng(seed).integers(0, 256, (rows, 128, 128, 3), np.uint8)
    frames[:, 64:] = 0
    return frames


def chain(zoo: Path, frame: np.ndarray, row: int, skills: Skills, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row's skills one after the other with the library alone -> embeddings, latents, frames."""
    model, adapters = WorldModel.load(zoo / "worldmodel.safetensors"), Adapters.load(zoo / "adapters.safetensors")
    start = torch.tensor(frame)[None]
    embeddings, latents, frames = [], [], []
    for i, (prompt, chunks) in enumerate(skills):
        clip = model.imagine(start, [prompt], chunks, [row_seed(seed, row, i)])
        decoded = model.decode(clip)
        embeddings.append(adapters.video(clip[:, 1:])[0])
        latents.append(clip[0, min(i, 1) :])
        frames.append(decoded[0, min(i, 1) :, :64])
        start = decoded[:, -1]
    return torch.cat(embeddings), torch.cat(latents), torch.cat(frames)


def test_skills_are_chained_as_the_library_does(worker: Worker, triton_server: TritonProcess) -> None:
    rows: list[Skills] = [[("reach the handle", 2), ("open the drawer", 1)], [("push the button", 1)]]
    frames = grids(2)
    worker.ask("chain", frames, rows, seed=3, latents=True, video=True)
    result = worker.result("chain")
    assert result.error == "" and not result.cache_hit and len(result.videos) == 2
    assert result.worldmodel_hash == WorldModel.load(triton_server.zoo / "worldmodel.safetensors").hash
    tensors = worker.store.get_tensors(result.artifact)
    assert tensors["embeddings"].shape == (2, 3, 32) and tensors["latents"].shape == (2, 4, 16, 8, 16)
    assert tensors["mask"].tolist() == [[True] * 3, [True, False, False]]
    assert worker.store.get_metadata(result.artifact)["adapters_hash"] == result.adapters_hash
    for row, skills in enumerate(rows):
        embeddings, latents, decoded = chain(triton_server.zoo, frames[row], row, skills, 3)
        # A start frame that differs in one rounded level moves the second clip a little.
        np.testing.assert_allclose(tensors["embeddings"][row, : len(embeddings)], embeddings.numpy(), atol=0.02)
        np.testing.assert_allclose(tensors["latents"][row, : len(latents)], latents.numpy(), atol=0.02)
        video = decode_mp4(worker.store.get(result.videos[row]))
        assert video.shape == decoded.shape
        assert np.abs(video.astype(int) - decoded.numpy()).mean() < 25, "the video shows these frames (noise compresses badly)"


def test_many_rows_cache_health_and_metrics(worker: Worker) -> None:
    frames = grids(70)
    rows: list[Skills] = [[("reach", 1 + i % 2)] for i in range(70)]
    worker.ask("first", frames, rows)
    first = worker.result("first")
    worker.ask("again", frames, rows)
    worker.ask("other seed", frames, rows, seed=1)
    again, other = worker.result("again"), worker.result("other seed")
    assert not first.cache_hit and again.cache_hit and not other.cache_hit
    assert again.artifact == first.artifact != other.artifact
    tensors = worker.store.get_tensors(first.artifact)
    assert tensors["mask"].sum(1).tolist() == [1 + i % 2 for i in range(70)]
    assert not np.allclose(tensors["embeddings"], worker.store.get_tensors(other.artifact)["embeddings"], atol=1e-2)
    assert worker.get("readyz")[0] == 200
    metrics = worker.get("metrics")[1]
    assert "w2a_imagine_rows_total 140.0" in metrics and "w2a_imagine_cache_hits_total 1.0" in metrics
    assert heartbeats(worker.client)["worldmodel:0"] < 10


def test_poison_and_bad_requests_do_not_stop_the_queue(worker: Worker) -> None:
    worker.client.xadd(IMAGINE_REQUESTS, {"json": '{"id": 1}'})
    worker.ask("small", grids(1)[:, :64], [[("reach", 1)]])
    worker.ask("float", grids(1).astype(np.float32), [[("reach", 1)]])
    worker.ask("two", grids(2), [[("reach", 1)]])
    worker.ask("long", grids(1), [[("reach", 32)]])
    worker.ask("good", grids(1), [[("reach", 1)]])
    assert worker.result("good").artifact
    errors = {r.id: r.error for r in worker.results() if r.error}
    assert set(errors) == {"small", "float", "two", "long"}
    assert all(errors[name].startswith("starts: frames must be uint8") for name in ("small", "float", "two"))
    assert errors["long"].startswith("skills[0]: chunks 32 is more than")
    letters = [m for _, m in read_all(worker.client, DEAD, DeadLetter)]
    assert [letter.stream for letter in letters] == [IMAGINE_REQUESTS]
    wait_for(lambda: backlog(worker.client, IMAGINE_REQUESTS, GROUP) == 0, 10, "nothing pending")


def test_the_worker_outlives_redis(triton_server: TritonProcess, tmp_path: Path) -> None:
    with running_valkey(tmp_path / "valkey") as server:
        client = connect(server.url)
        with running_worker(client, server.url, triton_server.address, tmp_path) as worker:
            worker.ask("before", grids(1), [[("reach", 1)]])
            assert worker.result("before").artifact
            server.kill()
            wait_for(lambda: "redis" in json.loads(worker.get("readyz")[1])["failed"], 20, "not ready")
            server.start()
            worker.ask("after", grids(1, 1), [[("reach", 1)]])
            assert worker.result("after").artifact
            wait_for(lambda: worker.get("readyz")[0] == 200, 20, "ready again")


def test_killed_triton_loses_and_doubles_nothing(
    valkey: redis.Redis, valkey_server: ValkeyProcess, triton_server: TritonProcess, tmp_path: Path
) -> None:
    with (
        running_triton(triton_server.zoo, tmp_path / "run") as triton,
        running_worker(valkey, valkey_server.url, triton.address, tmp_path) as worker,
    ):
        assert triton.process is not None
        backends = [p for p in psutil.Process(triton.process.pid).children(recursive=True) if "stub" in p.name()]
        for backend in backends:
            backend.suspend()  # so that the request is surely in the middle of its computation
        worker.ask("long", grids(2), [[("reach", 2)]] * 2)
        wait_for(lambda: valkey.xpending(IMAGINE_REQUESTS, GROUP)["pending"] == 1, 60, "request taken")
        time.sleep(0.5)
        triton.kill()
        for backend in backends:
            backend.kill()
        assert worker.results() == []
        worker.ask("short", grids(2), [[("reach", 1)]] * 2)
        wait_for(lambda: worker.get("readyz")[0] == 503, 20, "not ready")
        failed = json.loads(worker.get("readyz")[1])["failed"]
        assert list(failed) == ["triton"] and triton.address in failed["triton"]
        triton.start()
        assert worker.result("long", 240).artifact and worker.result("short").artifact
        wait_for(lambda: backlog(valkey, IMAGINE_REQUESTS, GROUP) == 0, 10, "nothing pending")
        assert sorted(r.id for r in worker.results()) == ["long", "short"]
        assert worker.get("readyz")[0] == 200


@pytest.mark.skipif(not (ROOT / "zoo" / "adapters.safetensors").exists(), reason="zoo/ holds no weights yet")
def test_shipped_weights(valkey: redis.Redis, valkey_server: ValkeyProcess, tmp_path: Path) -> None:
    zoo = ROOT / "zoo"
    with (
        running_triton(zoo, tmp_path / "run") as triton,
        running_worker(valkey, valkey_server.url, triton.address, tmp_path) as worker,
    ):
        frames, skills = grids(1), [("open the drawer", 2)]
        worker.ask("shipped", frames, [skills])
        found = worker.store.get_tensors(worker.result("shipped").artifact)["embeddings"][0]
        np.testing.assert_allclose(found, chain(zoo, frames[0], 0, skills, 0)[0].numpy(), atol=0.02)
