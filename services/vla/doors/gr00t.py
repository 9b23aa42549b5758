"""Isaac GR00T N1.6's server side (gr00t/policy/server_client.py), for clients such as its PolicyClient.

Endpoints ping, reset, get_modality_config, get_action; `kill` is not offered. Observations may be native (nested maps) or those
of the simulation wrapper (flat keys); the answer has the form of the question. Errors are {"error": one sentence}. The token is
"api_token". Behind one ROUTER several threads answer, so that requests of several clients share a batch; each client sees the
REQ/REP that it knows. A message longer than the limit ends its client's connection.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import structlog
import zmq

from services.runtime.rpc import RpcError
from services.vla.doors.acting import ANSWERS, Acting, Seen, same, sentence
from services.vla.wire import MAX_BYTES, pack_gr00t, unpack_gr00t

log = structlog.get_logger()
POLL_MS = 100


class Gr00tDoor:
    """Serves until `close`, `threads` requests at a time."""

    def __init__(self, acting: Acting, host: str, port: int, token: str, threads: int) -> None:
        """Raises OSError when the port is taken."""
        self._acting, self._token = acting, token
        self._context, self._stop = zmq.Context(), threading.Event()
        front, back = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        front.maxmsgsize = MAX_BYTES
        try:
            front.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(f"cannot bind the gr00t door to {host}:{port}: {error}") from None
        back.bind("inproc://answers")
        self._threads = [threading.Thread(target=self._pass_on, args=(front, back), name="gr00t", daemon=True)]
        self._threads += [threading.Thread(target=self._work, name="gr00t", daemon=True) for _ in range(min(threads, 16))]
        for thread in self._threads:
            thread.start()
        log.info("gr00t door", host=host, port=port, token=bool(token))

    def close(self) -> None:
        """Answer what has begun, then stop."""
        self._stop.set()
        for thread in self._threads:
            thread.join(5.0)
        self._context.destroy(linger=0)

    def _pass_on(self, front: zmq.Socket[bytes], back: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(front, zmq.POLLIN)
        poller.register(back, zmq.POLLIN)
        while not self._stop.is_set():
            for source, _ in poller.poll(POLL_MS):
                (back if source is front else front).send_multipart(source.recv_multipart())
        front.close(linger=0)
        back.close(linger=0)

    def _work(self) -> None:
        socket = self._context.socket(zmq.REP)
        socket.connect("inproc://answers")
        while not self._stop.is_set():
            if socket.poll(POLL_MS):
                socket.send(self._reply(socket.recv()))
        socket.close(linger=0)

    def _reply(self, message: bytes) -> bytes:
        try:
            request = unpack_gr00t(message)
            if not isinstance(request, dict):
                raise ValueError(f"request: must be a map, got {type(request).__name__}")
            if not same(self._token, request.get("api_token")):
                ANSWERS.labels("gr00t", "unauthorized").inc()
                return pack_gr00t({"error": "Unauthorized: Invalid API token"})
            reply = pack_gr00t(self._answer(request))
        except Exception as error:
            if not isinstance(error, ValueError | RpcError):
                log.exception("request failed", door="gr00t")
            ANSWERS.labels("gr00t", "error").inc()
            return pack_gr00t({"error": sentence(error)})
        ANSWERS.labels("gr00t", "ok").inc()
        return reply

    def _answer(self, request: dict[Any, Any]) -> Any:
        endpoint = request.get("endpoint", "get_action")
        if endpoint == "ping":
            return {"status": "ok", "message": "Server is running"}
        if endpoint == "reset":
            return {}  # nothing is kept between requests
        if endpoint == "get_modality_config":
            return self._modality_config()
        if endpoint != "get_action":
            raise ValueError(f"Unknown endpoint: {str(endpoint)[:80]}")
        data = request.get("data")
        observation = data.get("observation") if isinstance(data, dict) else None
        if not isinstance(observation, dict):
            raise ValueError("data.observation: must be a map")
        flat = "video" not in observation
        actions, version = self._acting.act(self._rows(flatten(observation) if not flat else observation))
        prefix = "action." if flat else ""
        stacked = {f"{prefix}{name}": np.stack([row[name] for row in actions]) for name in actions[0]}
        return [stacked, {"policy_version": version}]

    def _modality_config(self) -> dict[str, Any]:
        table = self._acting.layout.policy
        kinds = {
            "video": ([0], list(table.cameras)),
            "state": ([0], list(table.state)),
            "action": (list(range(self._acting.horizon)), list(table.actions)),
            "language": ([0], [table.instruction]),
        }
        return {
            kind: {"__ModalityConfig_class__": True, "as_json": {"delta_indices": deltas, "modality_keys": keys}}
            for kind, (deltas, keys) in kinds.items()
        }

    def _rows(self, observation: dict[Any, Any]) -> list[Seen]:
        """Flat keys, batched (B, T = 1, ...) -> B observations. Raises ValueError naming the key."""
        table = self._acting.layout.policy
        texts = instructions(observation, table.instruction)
        columns: dict[str, dict[str, Any]] = {"video": {}, "state": {}}
        for kind, names, axes in (("video", list(table.cameras), 5), ("state", list(table.state), 3)):
            for name in names:
                value = observation.get(f"{kind}.{name}")
                if value is None:
                    raise ValueError(f"{kind}.{name} is missing; needed are {', '.join(names)}")
                if not isinstance(value, np.ndarray) or value.ndim != axes or value.shape[:2] != (len(texts), 1):
                    shape = value.shape if isinstance(value, np.ndarray) else type(value).__name__
                    raise ValueError(f"{kind}.{name}: must have {axes} axes and begin with ({len(texts)}, 1), got {shape}")
                columns[kind][name] = value[:, 0]
        return [
            Seen({n: v[i] for n, v in columns["video"].items()}, {n: v[i] for n, v in columns["state"].items()}, text)
            for i, text in enumerate(texts)
        ]


def flatten(observation: dict[Any, Any]) -> dict[str, Any]:
    """The native form -> the wrapper's. Raises ValueError."""
    flat: dict[str, Any] = {}
    for kind in ("video", "state", "language"):
        part = observation.get(kind)
        if not isinstance(part, dict):
            raise ValueError(f"observation.{kind}: must be a map")
        flat |= {f"{kind}.{name}" if kind != "language" else str(name): value for name, value in part.items()}
    return flat


def instructions(observation: dict[Any, Any], name: str) -> list[Any]:
    """One text a row, whatever the instruction is called: ["..."] of the wrapper, [["..."]] natively. Raises ValueError."""
    names = [key for key in observation if isinstance(key, str) and (key == "task" or key.startswith("annotation."))]
    found = observation.get(name, observation[names[0]] if names else None)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name}: must be a list of texts, one a row")
    return [item[0] if isinstance(item, list) and len(item) == 1 else item for item in found]
