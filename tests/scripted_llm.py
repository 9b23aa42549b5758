"""An OpenAI-compatible server that says and does what a test scripts, one turn per request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Turn = Callable[[BaseHTTPRequestHandler], None]


def said(content: Any, *, usage: Any = ..., reason: str = "stop") -> Turn:
    """A chat completion; `content` as JSON unless it is text."""
    text = content if isinstance(content, str | None) else json.dumps(content)
    counted = {"prompt_tokens": 100, "completion_tokens": 20} if usage is ... else usage
    reply = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}], "usage": counted}
    return raw(200, json.dumps(reply).encode())


def raw(status: int, body: bytes = b"", **headers: str) -> Turn:
    """Any reply."""

    def turn(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return turn


def refused(status: int, message: str, **headers: str) -> Turn:
    return raw(status, json.dumps({"error": {"message": message}}).encode(), **headers)


def silent(seconds: float) -> Turn:
    """No reply for a while."""
    return lambda handler: time.sleep(seconds)


def dripping(handler: BaseHTTPRequestHandler) -> None:
    """One blank every 50 ms, for ever: no single read times out."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def cut_off(handler: BaseHTTPRequestHandler) -> None:
    """Promises more bytes than it sends, then hangs up."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


class Server:
    """Plays one turn per request; keeps paths, headers and bodies."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.requests: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
                with suppress(OSError):  # the client may hang up first, as it should
                    (outer.turns.pop(0) if outer.turns else refused(500, "the script has ended"))(self)

            def log_message(self, *_: Any) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
