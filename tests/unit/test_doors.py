"""Our policy behind openpi's and GR00T's protocols: their clients get base + residual, and nothing else gets anything.

openpi's client is openpi-client itself. GR00T's is written out here after its PolicyClient (gr00t/policy/server_client.py).
"""

from __future__ import annotations

import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import websockets.exceptions
import zmq
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.sync.client import connect

from services.vla.__main__ import load_engine, load_residual
from services.vla.batcher import Batcher
from services.vla.doors import loopback, open_doors
from services.vla.engine import ActJob, Chunks, Engine
from services.vla.observations import Observations
from services.vla.policies.base import BasePolicy, PolicySpec
from services.vla.settings import VlaSettings
from services.vla.versions import Versions
from tests.policy_servers import TOKEN, from_npy, npy
from tests.processes import free_port
from tests.vla_server import make_bundle, make_zoo
from world2act.bundle import Bundle
from world2act.data.grid import stitch
from world2act.models.store import WeightsError
from world2act.types import FloatArray, ImageArray


class Far(BasePolicy):
    """The tiny policy, which also plans eight actions more, all a quarter."""

    def __init__(self, tiny: BasePolicy) -> None:
        self._tiny = tiny

    @property
    def spec(self) -> PolicySpec:
        spec = self._tiny.spec
        return PolicySpec(**{**vars(spec), "horizon": 12})

    def _act(self, grids: ImageArray, states: FloatArray, instructions: Sequence[str]) -> FloatArray:
        chunk = self._tiny.act(grids, states, instructions)
        return np.concatenate([chunk, np.full((len(chunk), 8, 4), 0.25, np.float32)], axis=1)


class World:
    """A policy server's inside, with a residual, and the doors on free ports."""

    def __init__(self, folder: Path) -> None:
        self.origin = make_zoo(folder)
        self.file = folder / "residual.safetensors"
        make_bundle(self.origin, 3).save(self.file)
        self.settings = VlaSettings(
            zoo=folder,
            vla_bundle=self.file,
            vla_openpi_port=free_port(),
            vla_gr00t_port=free_port(),
            vla_door_token=TOKEN,
            vla_door_layout="metaworld",
            vla_max_batch=4,
        )
        tiny = load_engine(self.settings)
        self.engine = Engine(Far(tiny.policy), tiny.vision, tiny.adapters_hash, self.settings.vla_block)
        self.versions = Versions(8, 8)
        load_residual(self.settings, self.engine, self.versions)
        self.batcher: Batcher[ActJob, Chunks] = Batcher(self.engine.compute, 32, 0.005)

    def open(self, **changes: object) -> list[Callable[[], None]]:
        """The doors with some settings changed."""
        settings = self.settings.model_copy(update=changes)
        return open_doors(settings, self.engine, self.batcher, self.versions)

    def expected(self, images: dict[str, ImageArray], state: FloatArray, text: str) -> FloatArray:
        """What base + residual is, and the plan's rest."""
        grid = stitch({name: image[None] for name, image in images.items()}, self.engine.policy.spec.cameras)
        (chunks,) = self.engine.compute([ActJob(Observations(grid, state[None], (text,)), self.versions.resolve("default", -1))])
        assert isinstance(chunks, Chunks) and chunks.version == 3 and np.abs(chunks.residual).max() > 0.01
        return np.concatenate([chunks.combined[0], np.full((8, 4), 0.25, np.float32)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("doors"))
    closers = world.open()
    yield world
    for close in closers:
        close()
    world.batcher.close()


def seen(seed: int) -> tuple[dict[str, ImageArray], FloatArray, str]:
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in ("primary", "wrist")}
    return images, rng.uniform(-0.5, 0.5, 4).astype(np.float32), f"open drawer {seed}"


def element(seed: int) -> dict[str, Any]:
    """What an openpi client sends; its state is float64, as concatenated simulator readings are."""
    images, state, text = seen(seed)
    return {
        "observation/image": images["primary"],
        "observation/wrist_image": images["wrist"],
        "observation/state": state.astype(np.float64),
        "prompt": text,
    }


@pytest.fixture
def client(world: World) -> Iterator[WebsocketClientPolicy]:
    client = WebsocketClientPolicy("127.0.0.1", world.settings.vla_openpi_port, TOKEN)
    yield client
    client._ws.close()


def test_openpis_own_client_gets_base_plus_residual(world: World, client: WebsocketClientPolicy) -> None:
    metadata = client.get_server_metadata()
    assert (metadata["policy"], metadata["chunk"], metadata["action_horizon"]) == ("world2act tiny", 4, 12)
    for seed in range(3):
        answer = client.infer(element(seed))
        assert answer["policy_version"] == 3 and answer["server_timing"]["infer_ms"] > 0
        assert answer["actions"].dtype == np.float32
        assert np.array_equal(answer["actions"], world.expected(*seen(seed)))
    assert answer["server_timing"]["prev_total_ms"] > 0
    broker = ActionChunkBroker(client, action_horizon=4)  # their helper: one action at a time out of a chunk
    steps = [broker.infer(element(5))["actions"] for _ in range(4)]
    assert np.array_equal(np.stack(steps), world.expected(*seen(5))[:4])


def test_clients_share_batches_and_get_their_own(world: World) -> None:
    def one(seed: int) -> np.ndarray:
        client = WebsocketClientPolicy("127.0.0.1", world.settings.vla_openpi_port, TOKEN)
        try:
            return np.asarray(client.infer(element(seed))["actions"])
        finally:
            client._ws.close()

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(one, range(6)))
    for seed, actions in enumerate(together):
        assert np.array_equal(actions, world.expected(*seen(seed)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"observation/wrist_image": None}, "camera 'observation/wrist_image' is missing; needed are observation/image"),
        ({"observation/image": np.zeros((64, 64), np.uint8)}, "camera 'observation/image': must be uint8 (height, width, 3)"),
        ({"observation/state": np.zeros(8)}, "state 'observation/state': must be 4 numbers, got float64 (8,)"),
        ({"observation/state": np.array([0, np.nan, 0, 0])}, "state: must be finite"),
        ({"prompt": None}, "'prompt' is missing"),
        ({"prompt": ""}, "instruction: must not be empty"),
        ({"prompt": 3}, "instruction: must be text, got int"),
        ({"prompt": "x" * 501}, "instruction: must have at most 500 characters"),
    ],
)
def test_openpi_mistakes_are_a_text_frame_with_one_sentence(
    client: WebsocketClientPolicy, change: dict[str, Any], words: str
) -> None:
    message = {**element(0), **change}
    with pytest.raises(RuntimeError, match="Error in inference server") as caught:
        client.infer({key: value for key, value in message.items() if value is not None})
    assert words in str(caught.value) and "Traceback" not in str(caught.value)
    with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
        client._ws.recv(5)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011


def test_openpi_health_tokens_and_raw_nonsense(world: World) -> None:
    port = world.settings.vla_openpi_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
        assert answer.status == 200
    for token in (None, "wrong", TOKEN + "x"):
        with pytest.raises(websockets.exceptions.InvalidStatus) as caught:
            WebsocketClientPolicy("127.0.0.1", port, token)
        assert caught.value.response.status_code == 401
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
    for frame, words in ((b"\xc1", "not msgpack"), ("text", "must be a binary frame"), (msgpack.packb([1]), "must be a map")):
        raw = connect(f"ws://127.0.0.1:{port}", additional_headers={"Authorization": f"Api-Key {TOKEN}"}, compression=None)
        raw.recv(5)
        raw.send(frame)
        assert words in str(raw.recv(5))
        raw.close()


def test_openpi_frames_beyond_the_limit_end_the_connection(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.vla.doors.openpi.MAX_BYTES", 100_000)
    port = free_port()
    (close,) = world.open(vla_openpi_port=port, vla_gr00t_port=0)
    raw = connect(f"ws://127.0.0.1:{port}", additional_headers={"Authorization": f"Api-Key {TOKEN}"})
    raw.recv(5)
    raw.send(b"\0" * 200_000)
    with pytest.raises(websockets.exceptions.ConnectionClosed) as caught:
        raw.recv(5)
    assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
    close()


class Gr00tClient:
    """PolicyClient of gr00t/policy/server_client.py, with a time-out."""

    def __init__(self, port: int, token: str | None = TOKEN) -> None:
        self.context, self.token = zmq.Context(), token
        self.socket = self.context.socket(zmq.REQ)
        self.socket.rcvtimeo, self.socket.linger = 20_000, 0
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def raw(self, message: bytes) -> Any:
        self.socket.send(message)
        return msgpack.unpackb(self.socket.recv(), object_hook=from_npy)

    def call(self, endpoint: str | None, data: dict[str, Any] | None = None) -> Any:
        request: dict[str, Any] = {} if endpoint is None else {"endpoint": endpoint}
        if data is not None:
            request["data"] = data
        if self.token:
            request["api_token"] = self.token
        return self.raw(msgpack.packb(request, default=npy))

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture
def gr00t(world: World) -> Iterator[Gr00tClient]:
    client = Gr00tClient(world.settings.vla_gr00t_port)
    yield client
    client.close()


def native(*seeds: int) -> dict[str, Any]:
    rows = [seen(seed) for seed in seeds]
    return {
        "video": {
            "image": np.stack([images["primary"] for images, _, _ in rows])[:, None],
            "wrist_image": np.stack([images["wrist"] for images, _, _ in rows])[:, None],
        },
        "state": {"proprio": np.stack([state for _, state, _ in rows])[:, None]},
        "language": {"annotation.human.action.task_description": [[text] for _, _, text in rows]},
    }


def test_gr00ts_client_gets_base_plus_residual_natively_and_flat(world: World, gr00t: Gr00tClient) -> None:
    assert gr00t.call("ping") == {"status": "ok", "message": "Server is running"}
    assert gr00t.call("reset", {"options": None}) == {}
    config = gr00t.call("get_modality_config")
    assert all(entry["__ModalityConfig_class__"] is True for entry in config.values())
    keys = {kind: entry["as_json"]["modality_keys"] for kind, entry in config.items()}
    assert keys == {
        "video": ["image", "wrist_image"],
        "state": ["proprio"],
        "action": ["action"],
        "language": ["annotation.human.action.task_description"],
    }
    assert config["action"]["as_json"]["delta_indices"] == list(range(12))
    expected = np.stack([world.expected(*seen(seed)) for seed in (1, 2)])
    action, info = gr00t.call("get_action", {"observation": native(1, 2), "options": None})
    assert info == {"policy_version": 3} and list(action) == ["action"] and action["action"].dtype == np.float32
    assert np.array_equal(action["action"], expected)
    observation = native(1, 2)
    flat = {f"video.{name}": value for name, value in observation["video"].items()}
    flat |= {"state.proprio": observation["state"]["proprio"], "annotation.human.coarse_action": [seen(1)[2], seen(2)[2]]}
    action, _ = gr00t.call(None, {"observation": flat})  # get_action is what a request without an endpoint means
    assert list(action) == ["action.action"] and np.array_equal(action["action.action"], expected)


def test_gr00t_mistakes_are_sentences_and_the_client_goes_on(world: World, gr00t: Gr00tClient) -> None:
    def error(observation: Any) -> str:
        return str(gr00t.call("get_action", {"observation": observation, "options": None})["error"])

    bad = native(1)
    del bad["video"]["wrist_image"]
    assert error(bad) == "video.wrist_image is missing; needed are image, wrist_image"
    bad = native(1)
    bad["video"]["image"] = bad["video"]["image"][:, 0]
    assert "video.image: must have 5 axes and begin with (1, 1)" in error(bad)
    bad = native(1)
    bad["state"]["proprio"] = np.zeros((1, 1, 9), np.float32)
    assert "state 'proprio': must be 4 numbers" in error(bad)
    bad = native(1)
    bad["language"] = {"annotation.human.action.task_description": []}
    assert "must be a list of texts" in error(bad)
    bad = native(1)
    del bad["language"]
    assert error(bad) == "observation.language: must be a map"
    assert "observations: must be 1 to 4 in one request, got 5" in error(native(*range(5)))
    assert "must be a map" in error("nothing")
    assert gr00t.call("kill") == {"error": "Unknown endpoint: kill"} and gr00t.call("ping")["status"] == "ok"
    assert "not msgpack" in gr00t.raw(b"\xc1")["error"] and "must be a map" in gr00t.raw(msgpack.packb([1]))["error"]
    stranger = Gr00tClient(world.settings.vla_gr00t_port, "wrong")
    assert stranger.call("ping") == {"error": "Unauthorized: Invalid API token"}
    assert stranger.call("get_action", {"observation": native(1)}) == {"error": "Unauthorized: Invalid API token"}
    stranger.token = None
    assert stranger.call("ping") == {"error": "Unauthorized: Invalid API token"}
    stranger.close()


def test_gr00t_messages_beyond_the_limit_are_not_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.vla.doors.gr00t.MAX_BYTES", 100_000)
    port = free_port()
    (close,) = world.open(vla_gr00t_port=port, vla_openpi_port=0)
    client = Gr00tClient(port)
    assert client.call("ping")["status"] == "ok"
    client.socket.rcvtimeo = 500
    with pytest.raises(zmq.Again):
        client.raw(b"\0" * 200_000)
    client.close()
    other = Gr00tClient(port)
    assert other.call("ping")["status"] == "ok"
    other.close()
    close()


def test_a_residual_that_is_not_loaded_is_an_error_not_the_base(world: World) -> None:
    port = free_port()
    world.versions.add("gone", world.engine.check(world.file.read_bytes(), 7, "uri"))
    (close,) = world.open(vla_gr00t_port=port, vla_openpi_port=0, vla_door_version=7, vla_door_namespace="gone")
    world.versions.add("gone", world.engine.check(world.file.read_bytes(), 8, "uri"))
    for version in range(9, 18):  # eight are kept
        world.versions.add("gone", world.engine.check(world.file.read_bytes(), version, "uri"))
    client = Gr00tClient(port)
    assert "version: 7 is not loaded" in client.call("get_action", {"observation": native(1)})["error"]
    client.close()
    close()


def test_doors_are_off_loopback_and_public_only_with_a_token(world: World, tmp_path: Path) -> None:
    before = threading.active_count()
    inside = (world.engine, world.batcher, world.versions)
    assert open_doors(VlaSettings(), *inside) == [] and threading.active_count() == before
    assert VlaSettings().vla_door_host == "127.0.0.1"
    assert [loopback(h) for h in ("127.0.0.1", "::1", "localhost", "10.0.0.1", "::", "robot.lab")] == [True] * 3 + [False] * 3
    public = VlaSettings(vla_openpi_port=free_port(), vla_door_host="::")
    with pytest.raises(ValueError, match="vla_door_token: must be set where a door binds more than loopback, here ::"):
        open_doors(public, *inside)
    for name, words in (("vla_openpi_port", "cannot bind the openpi door"), ("vla_gr00t_port", "cannot bind the gr00t door")):
        taken = VlaSettings(**{name: getattr(world.settings, name)})
        with pytest.raises(OSError, match=words):
            open_doors(taken, *inside)
    with pytest.raises(ValueError, match="vla_door_layout: it is for cameras, state, action"):
        world.open(vla_door_layout="libero", vla_openpi_port=free_port(), vla_gr00t_port=0)
    with pytest.raises(ValueError, match="layout: 'kitchen' is unknown for gr00t"):
        world.open(vla_door_layout="kitchen", vla_openpi_port=0, vla_gr00t_port=free_port())


def test_a_residual_of_other_weights_is_refused_at_start(world: World, tmp_path: Path) -> None:
    bundle = make_bundle(world.origin, 1)
    other = Bundle(**{**vars(bundle), "origin": type(world.origin)("f" * 64, world.origin.worldmodel, world.origin.adapters)})
    other.save(tmp_path / "other.safetensors")
    settings = world.settings.model_copy(update={"vla_bundle": tmp_path / "other.safetensors"})
    with pytest.raises(WeightsError, match="trained beside base policy ffffffffffff"):
        load_residual(settings, world.engine, world.versions)
    with pytest.raises(FileNotFoundError):
        load_residual(world.settings.model_copy(update={"vla_bundle": tmp_path / "nowhere"}), world.engine, world.versions)


def test_without_doors_and_with_the_tiny_policy_none_of_the_extra_is_imported() -> None:
    code = "import services.vla.__main__, services.vla.policies.tiny, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"msgpack", "zmq", "websockets", "httpx", "PIL"}
