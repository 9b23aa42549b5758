"""openpi's policy server (src/openpi/serving/websocket_policy_server.py; pi0, pi0.5): WebSocket, one msgpack map each way.

The server speaks first: a map of metadata. Then one binary frame a question and one an answer, {"actions": (H, A), ...}; a text
frame is the traceback of a server that gives up. Frames are not compressed. A first question may compile for minutes inside the
server, which answers no pings meanwhile: so none are sent, and W2A_VLA_REMOTE_TIMEOUT must be long enough for it.
"""

from __future__ import annotations

import time

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from services.vla.policies.elsewhere import AnswerError, Elsewhere, LostError, RefusedError, Row, last_line
from services.vla.settings import VlaSettings
from services.vla.wire import MAX_BYTES, Array, pack_openpi, unpack_openpi


class Openpi(Elsewhere):
    """See the module's docstring. The server takes one observation a question: rows are asked one after the other."""

    def __init__(self, settings: VlaSettings) -> None:
        super().__init__("openpi", settings, "127.0.0.1:8000")
        self._uri = self.address if "://" in self.address else f"ws://{self.address}"
        self._connection: ClientConnection | None = None

    def _open(self) -> None:
        headers = {"Authorization": f"Api-Key {self.token}"} if self.token else None
        try:
            self._connection = connect(
                self._uri,
                compression=None,
                max_size=MAX_BYTES,
                additional_headers=headers,
                open_timeout=self.timeout,
                close_timeout=1.0,
                ping_interval=None,
                proxy=None,
            )
        except InvalidStatus as error:
            status = error.response.status_code
            raise RefusedError(f"HTTP {status}") if status in (401, 403) else OSError(f"HTTP {status}") from None
        except InvalidURI as error:
            raise OSError(str(error)) from None
        except (InvalidHandshake, InvalidMessage, EOFError) as error:
            raise OSError(f"no WebSocket server ({last_line(str(error))})") from None
        self._map(self._receive(time.monotonic() + self.timeout), "metadata")

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close_socket()  # without the closing handshake, for which a silent server would be waited
            self._connection = None

    def _ask(self, rows: list[Row]) -> list[dict[str, Array]]:
        return [self._ask_one(row) for row in rows]

    def _ask_one(self, row: Row) -> dict[str, Array]:
        assert self._connection is not None
        deadline = time.monotonic() + self.timeout
        try:
            self._connection.send(pack_openpi(row.flat(self.layout.policy.instruction)))
        except ConnectionClosed as error:
            raise LostError(f"the connection ended ({error})") from None
        answer = self._map(self._receive(deadline), "answer")
        return {name: answer[name] for name in self.layout.policy.actions if isinstance(answer.get(name), np.ndarray)}

    def _receive(self, deadline: float) -> bytes:
        assert self._connection is not None
        try:
            frame = self._connection.recv(self.left(deadline))
        except ConnectionClosed as error:
            if error.sent is not None and error.sent.code == 1009 and not error.rcvd_then_sent:
                raise ValueError(f"answer: a frame of more than {MAX_BYTES} bytes") from None
            raise LostError(f"the connection ended ({error})") from None
        if isinstance(frame, str):
            raise AnswerError(last_line(frame))
        return frame

    def _map(self, frame: bytes, what: str) -> dict[str, Array]:
        value = unpack_openpi(frame)
        if not isinstance(value, dict):
            raise ValueError(f"{what}: must be a map, got {type(value).__name__}")
        return value


def build(settings: VlaSettings) -> Openpi:
    """Connects on first use. Raises ValueError for a missing address or a wrong table."""
    return Openpi(settings)
