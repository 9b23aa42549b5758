"""Policy servers as others run them, small: the documented protocol around a made-up policy, with faults on demand.

Nothing of services/vla/wire.py is used here. openpi's messages go through openpi-client's own codec, HTTP's through json_numpy
itself, GR00T's through msgpack and numpy.save, as in its server_client.py.
"""

from __future__ import annotations

import hashlib
import http.server
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import json_numpy
import msgpack
import numpy as np
import zmq
from openpi_client import msgpack_numpy
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from services.vla.policies import layouts

TOKEN = "let-me-in"
SILENCE = 30.0
TOO_LONG = 64 * 1024 * 1024 + 1


class Brain:
    """A made-up policy: actions between -1 and 1 (grippers of the 0 to 1 kind as well) that depend on every bit it is shown.

    `fault`: "" or what goes wrong from now on; `seen`: what was asked, newest last.
    """

    def __init__(self, policy: str, robot: str) -> None:
        self.layout = layouts.load(robot, policy)
        self.horizon = self.layout.policy.horizon
        self.fault = ""
        self.seen: list[dict[str, Any]] = []
        self.token = ""
        self.gone = threading.Event()

    def actions(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        """Flat observation -> action vectors float32 (H, n). Raises KeyError for a key that is not there."""
        self.seen.append(observation)
        total = hashlib.sha256()
        for name, camera in self.layout.policy.cameras.items():
            image = observation[name]
            assert image.dtype == np.uint8 and image.shape == (camera.height, camera.width, 3), (name, image.shape)
            total.update(image.tobytes())
        for name, size in self.layout.state_sizes.items():
            assert observation[name].dtype == np.float32 and observation[name].shape == (size,), name
            total.update(observation[name].tobytes())
        assert isinstance(observation[self.layout.policy.instruction], str)
        total.update(observation[self.layout.policy.instruction].encode())
        rng = np.random.default_rng(np.frombuffer(total.digest(), np.uint32))
        horizon = 3 if self.fault == "short" else self.horizon
        extra = 1 if self.fault == "size" else 0
        made = {}
        for name, size in self.layout.action_sizes.items():
            made[name] = rng.uniform(-1, 1, (horizon, size + extra)).astype(np.float32)
            if self.fault == "nan":
                made[name][0, 0] = np.nan
        return made


@contextmanager
def openpi_server(brain: Brain) -> Iterator[str]:
    """src/openpi/serving/websocket_policy_server.py, as documented: metadata first, text frames for errors, /healthz."""

    def handle(connection: ServerConnection) -> None:
        pack = msgpack_numpy.packb
        connection.send(pack({"policy": "made up"}))
        while True:
            try:
                frame = connection.recv()
            except ConnectionClosed:
                return
            try:
                if brain.fault == "silent":
                    brain.gone.wait(SILENCE)
                if brain.fault == "drop":
                    brain.fault = ""
                    return
                if brain.fault == "long":
                    connection.send(b"\0" * TOO_LONG)
                    continue
                answer: dict[str, Any] = dict(brain.actions(msgpack_numpy.unpackb(frame)))
                if brain.fault == "garbage":
                    connection.send(b"\xc1")
                    continue
                if brain.fault == "object":
                    answer["actions"] = {b"__ndarray__": True, b"data": b"12345678", b"dtype": "|O", b"shape": [1, 1]}
                answer["server_timing"] = {"infer_ms": np.float64(1.0)}
                connection.send(pack(answer))
            except Exception as error:
                connection.send(f"Traceback (most recent call last):\n  File ...\n{type(error).__name__}: {error}")
                connection.close(1011)
                return

    def door(connection: ServerConnection, request: Any) -> Any:
        if request.path == "/healthz":
            return connection.respond(200, "OK\n")
        if brain.token and request.headers.get("Authorization") != f"Api-Key {brain.token}":
            return connection.respond(401, "who are you?\n")
        return None

    with serve(handle, "127.0.0.1", 0, compression=None, max_size=None, process_request=door) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.socket.getsockname()[1]}"
        brain.gone.set()
        server.shutdown()


def npy(value: Any) -> Any:
    """GR00T's MsgSerializer, written out."""
    if isinstance(value, np.ndarray):
        stream = io.BytesIO()
        np.save(stream, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": stream.getvalue()}
    raise TypeError(type(value))


def from_npy(value: dict[str, Any]) -> Any:
    return np.load(io.BytesIO(value["as_npy"]), allow_pickle=False) if "__ndarray_class__" in value else value


def modality_config(brain: Brain) -> dict[str, Any]:
    """What get_modality_config answers: a ModalityConfig a kind, as JSON."""
    table = brain.layout.policy
    found = {}
    for kind, keys, deltas in (
        ("video", list(table.cameras), [0]),
        ("state", list(table.state), [0]),
        ("action", list(table.actions), list(range(brain.horizon))),
        ("language", [table.instruction], [0]),
    ):
        entry = {"delta_indices": deltas, "modality_keys": keys, "sin_cos_embedding_keys": None, "mean_std_embedding_keys": None}
        found[kind] = {"__ModalityConfig_class__": True, "as_json": {**entry, "action_configs": None}}
    if brain.fault == "camera":
        found["video"]["as_json"]["modality_keys"] = ["image", "side_image"]
    if brain.fault == "history":
        found["video"]["as_json"]["delta_indices"] = [-1, 0]
    return found


def gr00t_actions(brain: Brain, observation: dict[str, Any]) -> list[Any]:
    """get_action of the native policy, or of the simulation wrapper when keys are flat. Batched (B, T, ...)."""
    flat = "video" not in observation
    table = brain.layout.policy
    if flat:
        video = {name: observation[f"video.{name}"] for name in table.cameras}
        state = {name: observation[f"state.{name}"] for name in table.state}
        texts = observation[table.instruction]
    else:
        video, state = observation["video"], observation["state"]
        texts = [text for (text,) in observation["language"][table.instruction]]
    rows = []
    for i, text in enumerate(texts):
        assert all(v.ndim == 5 and v.shape[1] == 1 for v in video.values()) and all(s.ndim == 3 for s in state.values())
        one = {name: v[i, 0] for name, v in video.items()} | {name: s[i, 0] for name, s in state.items()}
        rows.append(brain.actions(one | {table.instruction: text}))
    prefix = "action." if flat else ""
    return [{prefix + name: np.stack([row[name] for row in rows]) for name in rows[0]}, {}]


@contextmanager
def gr00t_server(brain: Brain) -> Iterator[str]:
    """gr00t/policy/server_client.py's PolicyServer: REP, one request at a time."""
    context = zmq.Context()
    socket = context.socket(zmq.REP)
    port = socket.bind_to_random_port("tcp://127.0.0.1")

    def answer(message: bytes) -> bytes:
        try:
            request = msgpack.unpackb(message, object_hook=from_npy)
            if brain.token and request.get("api_token") != brain.token:
                return msgpack.packb({"error": "Unauthorized: Invalid API token"})
            if request["endpoint"] == "get_modality_config":
                return msgpack.packb(modality_config(brain))
            if brain.fault == "long":
                return b"\0" * TOO_LONG
            return msgpack.packb(gr00t_actions(brain, **{"observation": request["data"]["observation"]}), default=npy)
        except Exception as error:
            return msgpack.packb({"error": str(error)})

    def run() -> None:
        while True:
            try:
                if not socket.poll(50):
                    if brain.gone.is_set():
                        return
                    continue
                message = socket.recv()
                if brain.fault == "silent" and b"get_modality_config" not in message:
                    brain.gone.wait(SILENCE)
                socket.send(answer(message))
            except zmq.ZMQError:
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield f"127.0.0.1:{port}"
    brain.gone.set()
    thread.join(5)
    socket.close(linger=0)
    context.term()


@contextmanager
def http_server(brain: Brain, whole: bool) -> Iterator[str]:
    """deploy.py of OpenVLA-OFT (`whole`: the answer is the list of actions) and Cosmos Policy (a map); 200 "error" for errors."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # as uvicorn: else head and body of an answer come 40 ms apart

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path != "/act":
                self.reply(b'{"detail":"Not Found"}', 404)
                return
            if brain.fault == "silent":
                brain.gone.wait(SILENCE)
            if brain.fault == "drop":
                brain.fault = ""
                self.close_connection = True
                return
            if brain.fault == "long":
                self.send_response(200)
                self.send_header("content-length", str(TOO_LONG))
                self.end_headers()
                self.wfile.write(b" " * TOO_LONG)
                return
            try:
                rows = list(brain.actions(json_numpy.loads(body))[next(iter(brain.layout.action_sizes))])
                content: Any = rows if whole else {"actions": rows, "future_image_predictions": {}, "value_prediction": 0.5}
                self.reply(json_numpy.dumps(content).encode())
            except Exception:
                self.reply(b'"error"')

        def reply(self, content: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    brain.gone.set()
    server.shutdown()
    server.server_close()


SERVERS: dict[str, Callable[[Brain], Any]] = {
    "gr00t": gr00t_server,
    "openpi": openpi_server,
    "cosmos_policy": lambda brain: http_server(brain, whole=False),
    "openvla_oft": lambda brain: http_server(brain, whole=True),
}
"""Policy -> its server around a brain."""
