"""openpi's server side (src/openpi/serving/websocket_policy_server.py), for clients such as openpi-client.

Metadata first; then an answer {"actions": (H, A), ...} a question. What goes wrong is a text frame, here one sentence, after
which the connection ends with code 1011, as theirs does. The token is the client's api_key: header `Authorization: Api-Key ...`,
else 401. GET /healthz answers 200 to anybody.
"""

from __future__ import annotations

import http
import threading
import time
from typing import Any

import structlog
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from services.runtime.rpc import RpcError
from services.vla.doors.acting import ANSWERS, Acting, Seen, arrays, same, sentence
from services.vla.wire import MAX_BYTES, pack_openpi, unpack_openpi

log = structlog.get_logger()


class OpenpiDoor:
    """Serves until `close`. At most `most` connections at a time; more are told 503."""

    def __init__(self, acting: Acting, host: str, port: int, token: str, most: int) -> None:
        """Raises OSError when the port is taken."""
        self._acting, self._token = acting, token
        self._free = threading.BoundedSemaphore(most)
        try:
            self._server = serve(
                self._handle,
                host,
                port,
                compression=None,
                max_size=MAX_BYTES,
                process_request=self._let_in,
                open_timeout=10,
                close_timeout=1,
            )
        except OSError as error:
            raise OSError(f"cannot bind the openpi door to {host}:{port}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="openpi", daemon=True)
        self._thread.start()
        log.info("openpi door", host=host, port=port, token=bool(token))

    def close(self) -> None:
        """Take no new connections, end the open ones."""
        self._server.shutdown()
        self._thread.join(5.0)

    def _let_in(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        shown = request.headers.get("Authorization", "")
        if not same(self._token, shown.removeprefix("Api-Key ") if shown.startswith("Api-Key ") else None):
            ANSWERS.labels("openpi", "unauthorized").inc()
            return answer(http.HTTPStatus.UNAUTHORIZED, "the token is missing or wrong (Authorization: Api-Key ...)\n")
        return None

    def _handle(self, connection: ServerConnection) -> None:
        if not self._free.acquire(blocking=False):
            connection.close(1013, "too many connections")
            return
        try:
            connection.send(pack_openpi(self._acting.describe()))
            last: float | None = None
            for frame in connection:
                started = time.monotonic()
                reply = self._reply(frame, last)
                connection.send(reply)
                if isinstance(reply, str):
                    connection.close(1011, "see the text frame before")
                    return
                last = time.monotonic() - started
        except ConnectionClosed:
            pass
        finally:
            self._free.release()

    def _reply(self, frame: bytes | str, last: float | None) -> bytes | str:
        """A packed answer, or a sentence. `last`: seconds that the last whole answer took."""
        started = time.monotonic()
        try:
            actions, version = self._act(frame)
        except Exception as error:
            if not isinstance(error, ValueError | RpcError):
                log.exception("request failed", door="openpi")
            ANSWERS.labels("openpi", "error").inc()
            return sentence(error)
        ANSWERS.labels("openpi", "ok").inc()
        timing = {"infer_ms": 1000.0 * (time.monotonic() - started)}
        if last is not None:
            timing["prev_total_ms"] = 1000.0 * last
        return pack_openpi({**actions, "policy_version": version, "server_timing": timing})

    def _act(self, frame: bytes | str) -> tuple[dict[str, Any], int]:
        if isinstance(frame, str):
            raise ValueError("message: must be a binary frame of msgpack, got text")
        observation = unpack_openpi(frame)
        if not isinstance(observation, dict):
            raise ValueError(f"message: must be a map, got {type(observation).__name__}")
        table = self._acting.layout.policy
        if table.instruction not in observation:
            raise ValueError(f"{table.instruction!r} is missing")
        seen = Seen(
            arrays(observation, list(table.cameras)), arrays(observation, list(table.state)), observation[table.instruction]
        )
        (actions,), version = self._acting.act([seen])
        return dict(actions), version


def answer(status: http.HTTPStatus, text: str) -> Response:
    """A plain HTTP answer in place of the handshake."""
    body = text.encode()
    headers = Headers({"Content-Length": str(len(body)), "Content-Type": "text/plain; charset=utf-8", "Connection": "close"})
    return Response(status.value, status.phrase, headers, body)
