"""Triton's models against the library in one process; the launcher's refusals."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from services.worldmodel.client import ImagineClient, TritonRefusedError
from tests.integration.triton_process import ROOT, TritonProcess, make_zoo, running_triton
from tests.processes import wait_for
from world2act.models.adapters import Adapters
from world2act.models.worldmodel import WorldModel

pytestmark = pytest.mark.integration


def starts(rows: int, seed: int = 0) -> np.ndarray:
    frames = np.random.default_rng(seed).integers(0, 256, (rows, 128, 128, 3), np.uint8)
    frames[:, 64:] = 0
    return frames


@pytest.fixture
def client(triton_server: TritonProcess) -> Iterator[ImagineClient]:
    client = ImagineClient(triton_server.address)
    yield client
    client.close()


def library(zoo: Path, frames: np.ndarray, prompts: list[str], seeds: list[int], horizon: int, **options: float) -> dict:
    """The same rows computed in this process."""
    model = WorldModel.load(zoo / "worldmodel.safetensors")
    adapters = Adapters.load(zoo / "adapters.safetensors")
    latents = model.imagine(torch.tensor(frames), prompts, horizon, seeds, **options)
    decoded = model.decode(latents)
    with torch.no_grad():
        e_v = adapters.video(latents[:, 1:])
    return {"latents": latents, "e_v": e_v, "frames": decoded, "last_frame": decoded[:, -1]}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, torch.Tensor]) -> None:
    for name, array in found.items():
        other = expected[name].numpy()
        assert array.shape == other.shape and array.dtype == other.dtype, name
        if array.dtype == np.uint8:  # a float's last bit may round to the next level
            assert np.abs(array.astype(int) - other).max() <= 1 and (array != other).mean() < 1e-3, name
        else:
            np.testing.assert_allclose(array, other, atol=1e-4, err_msg=name)


def test_ensemble_equals_the_library(client: ImagineClient, triton_server: TritonProcess) -> None:
    frames, prompts, seeds = starts(3), ["reach the goal", "open the drawer", "close"], [5, 2**62, 0]
    wants = ("e_v", "last_frame", "latents", "frames")
    found, worldmodel_hash, adapters_hash = client.imagine(frames, prompts, seeds, 3, 2, 1.5, wants)
    assert set(found) == set(wants)
    assert_same(found, library(triton_server.zoo, frames, prompts, seeds, 3, steps=2, guidance=1.5))
    served = client.served()
    assert (served.worldmodel.hash, served.adapters_hash) == (worldmodel_hash, adapters_hash)
    assert worldmodel_hash == WorldModel.load(triton_server.zoo / "worldmodel.safetensors").hash
    assert adapters_hash == Adapters.load(triton_server.zoo / "adapters.safetensors").hash
    assert served.worldmodel.frame_shape == (128, 128, 3) and served.worldmodel.temporal_compression == 4


def test_nothing_but_what_was_asked_for_crosses_the_wire(client: ImagineClient) -> None:
    found, _, _ = client.imagine(starts(2), ["reach"] * 2, [0, 1], 2)
    assert set(found) == {"e_v"} and found["e_v"].nbytes == 2 * 2 * 32 * 4


def test_concurrent_clients_with_different_horizons(triton_server: TritonProcess) -> None:
    """What the dynamic batcher puts together does not mix: every client gets its own rows and horizon."""
    found: dict[int, dict[str, np.ndarray]] = {}

    def ask(i: int) -> None:
        client = ImagineClient(triton_server.address)
        found[i] = client.imagine(starts(2, i), [f"skill {i}", "push"], [i, i + 1], 1 + i % 2)[0]
        client.close()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        assert_same(found[i], library(triton_server.zoo, starts(2, i), [f"skill {i}", "push"], [i, i + 1], 1 + i % 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": starts(1)[:, :64]}, "frames: shape must be"),
        ({"start": starts(1).astype(np.float32)}, "start_frame"),
        ({"start": starts(65), "prompts": ["a"] * 65, "seeds": [0] * 65}, "1 to 64 rows"),
        ({"horizon": 25}, "horizon: 25 is outside"),
        ({"horizon": 0}, "horizon: 0 is outside"),
        ({"steps": -1}, "steps: -1 is outside"),
        ({"guidance": float("nan")}, "guidance: nan is outside"),
    ],
)
def test_bad_calls_name_the_field(client: ImagineClient, change: dict, message: str) -> None:
    call = {"start": starts(1), "prompts": ["reach"], "seeds": [0], "horizon": 1}
    with pytest.raises(TritonRefusedError, match=message):
        client.imagine(**{**call, **change})
    assert client.missing() is None


def launch_and_wait(server: TritonProcess, seconds: float = 240.0) -> tuple[int, str]:
    """(exit status, log) of a Triton that must not start."""
    process = server.launch()
    try:
        return process.wait(seconds), server.log.read_text()
    finally:
        server.kill()


def test_adapters_of_another_world_model_are_refused(tmp_path: Path) -> None:
    zoo, other = make_zoo(tmp_path / "zoo"), make_zoo(tmp_path / "other", seed=1)
    shutil.copy(other / "adapters.safetensors", zoo / "adapters.safetensors")
    status, log = launch_and_wait(TritonProcess(zoo, tmp_path / "run"))
    assert status != 0
    assert "adapters: trained on world model" in log and "train Stage 1 again" in log


def test_a_busy_port_is_named(triton_server: TritonProcess, tmp_path: Path) -> None:
    server = TritonProcess(triton_server.zoo, tmp_path / "run")
    with socket.socket() as s:
        s.bind(("127.0.0.1", server.grpc))
        s.listen()
        status, log = launch_and_wait(server)
    assert status == 1 and log.startswith("triton: cannot bind 127.0.0.1:") and "W2A_TRITON_GRPC_PORT" in log


def test_missing_weights_are_named(tmp_path: Path) -> None:
    status, log = launch_and_wait(TritonProcess(tmp_path, tmp_path / "run"))
    assert status == 1 and "worldmodel.safetensors is missing" in log and len(log.splitlines()) == 1


def test_unknown_command() -> None:
    done = subprocess.run([sys.executable, "-m", "services.worldmodel", "serve"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("usage:")


def test_a_dead_backend_ends_the_server_and_a_new_start_cleans_up(triton_server: TritonProcess, tmp_path: Path) -> None:
    """tritonserver itself would call itself ready for ever, and fail every request."""
    with running_triton(triton_server.zoo, tmp_path / "run") as server:
        assert server.process is not None
        children = psutil.Process(server.process.pid).children(recursive=True)
        stubs = [p for p in children if "stub" in p.name()]
        assert len(stubs) == 2
        stubs[0].kill()
        assert server.process.wait(30) == 1
        assert "Python backend process" in server.log.read_text()
        wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in children), 30, "no orphan")
        dead = server.regions()
        assert dead, "a killed server leaves its shared memory: else this test shows nothing"
        server.launch()
        wait_for(lambda: not dead & server.regions(), 60, "dead regions are removed")
