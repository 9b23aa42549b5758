"""NVIDIA Isaac GR00T N1.6's policy server (gr00t/policy/server_client.py): ZeroMQ REQ/REP, one msgpack map each way.

The server's get_modality_config is read at every connect and held against the table: cameras, state and action keys, one frame of
history, horizon, and the name of the instruction. A server that runs with its simulation wrapper (--use-sim-policy-wrapper) wants
flat keys: W2A_VLA_GR00T_WRAPPER. Its `reset` is not called: these policies keep no state, and other clients may share the server.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import zmq

from services.vla.policies.elsewhere import AnswerError, Elsewhere, RefusedError, Row, last_line
from services.vla.settings import VlaSettings
from services.vla.wire import MAX_BYTES, Array, pack_gr00t, unpack_gr00t


class Gr00t(Elsewhere):
    """See the module's docstring."""

    def __init__(self, settings: VlaSettings) -> None:
        super().__init__("gr00t", settings, "127.0.0.1:5555")
        self._flat = settings.vla_gr00t_wrapper
        self._uri = self.address if "://" in self.address else f"tcp://{self.address}"
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._instruction = self.layout.policy.instruction

    def _open(self) -> None:
        self._socket = self._context.socket(zmq.REQ)
        self._socket.linger = 0
        self._socket.maxmsgsize = MAX_BYTES  # a longer answer ends the connection, which then looks silent
        try:
            self._socket.connect(self._uri)
        except zmq.ZMQError as error:
            raise OSError(f"{self._uri}: {error}") from None
        config = self._call("get_modality_config")
        if not isinstance(config, dict):
            raise ValueError(f"get_modality_config: must be a map, got {type(config).__name__}")
        if config:  # a policy that is no model (a replay) says nothing
            self._check(config)

    def _check(self, config: dict[Any, Any]) -> None:
        table = self.layout.policy
        for kind, ours in (("video", table.cameras), ("state", table.state), ("action", table.actions)):
            keys, deltas = modality(config, kind)
            if set(keys) != set(ours):
                raise ValueError(f"get_modality_config: {kind} keys are {', '.join(keys)}; the layout's are {', '.join(ours)}")
            if kind != "action" and len(deltas) != 1:
                raise ValueError(f"get_modality_config: the server wants {len(deltas)} {kind} steps of history; one is sent")
            if kind == "action" and len(deltas) < self.spec.horizon:
                raise ValueError(
                    f"get_modality_config: the server plans {len(deltas)} actions, the horizon is {self.spec.horizon}"
                )
        self._instruction = modality(config, "language")[0][0]

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    def _ask(self, rows: list[Row]) -> list[dict[str, Array]]:
        video = {name: np.stack([row.images[name] for row in rows])[:, None] for name in self.layout.policy.cameras}
        state = {name: np.stack([row.states[name] for row in rows])[:, None] for name in self.layout.policy.state}
        texts = [row.instruction for row in rows]
        observation: dict[str, Any]
        if self._flat:
            observation = {f"video.{name}": value for name, value in video.items()}
            observation |= {f"state.{name}": value for name, value in state.items()} | {self._instruction: texts}
        else:
            observation = {"video": video, "state": state, "language": {self._instruction: [[text] for text in texts]}}
        answer = self._call("get_action", {"observation": observation, "options": None})
        if not isinstance(answer, list) or len(answer) != 2 or not isinstance(answer[0], dict):
            raise ValueError("get_action: the answer must be a list of an action map and an info map")
        actions = {str(name).removeprefix("action."): values for name, values in answer[0].items()}
        for name in self.layout.policy.actions:
            values = actions.get(name)
            if values is not None and (not isinstance(values, np.ndarray) or values.ndim != 3 or len(values) != len(rows)):
                raise ValueError(f"action {name!r}: must be an array ({len(rows)}, horizon, size), got {np.shape(values)}")
        return [
            {name: values[i] for name, values in actions.items() if name in self.layout.policy.actions} for i in range(len(rows))
        ]

    def _call(self, endpoint: str, data: dict[str, Any] | None = None) -> Any:
        """One question and its answer. Raises TimeoutError, RefusedError, AnswerError, ValueError."""
        assert self._socket is not None
        request: dict[str, Any] = {"endpoint": endpoint}
        if data is not None:
            request["data"] = data
        if self.token:
            request["api_token"] = self.token
        deadline = time.monotonic() + self.timeout
        message = pack_gr00t(request)
        if not self._socket.poll(round(1000 * self.left(deadline)), zmq.POLLOUT):
            raise TimeoutError
        self._socket.send(message)
        if not self._socket.poll(round(1000 * self.left(deadline)), zmq.POLLIN):
            raise TimeoutError
        answer = self._socket.recv()
        if answer == b"ERROR":  # of servers before N1.6
            raise AnswerError("ERROR")
        value = unpack_gr00t(answer)
        if isinstance(value, dict) and "error" in value:
            text = last_line(str(value["error"]))
            raise RefusedError(text) if "unauthorized" in text.lower() else AnswerError(text)
        return value


def modality(config: dict[Any, Any], kind: str) -> tuple[list[str], list[int]]:
    """Keys and delta indices that a server declares for video, state, action or language. Raises ValueError."""
    entry = config.get(kind)
    entry = entry.get("as_json", entry) if isinstance(entry, dict) else None
    keys = entry.get("modality_keys") if isinstance(entry, dict) else None
    deltas = entry.get("delta_indices") if isinstance(entry, dict) else None
    if not isinstance(keys, list) or not keys or not isinstance(deltas, list) or not deltas:
        raise ValueError(f"get_modality_config: {kind} must have modality_keys and delta_indices")
    return [str(key) for key in keys], deltas


def build(settings: VlaSettings) -> Gr00t:
    """Connects on first use. Raises ValueError for a missing address or a wrong table."""
    return Gr00t(settings)
