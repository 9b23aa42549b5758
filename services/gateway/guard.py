"""What every request passes before a route sees it: size limit, token, same origin; and what is measured of it."""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from typing import Any
from urllib.parse import urlsplit

import anyio
import prometheus_client
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.problems import MEDIA_TYPE, ProblemError, raw
from services.gateway.settings import GatewaySettings

REQUESTS = prometheus_client.Counter("w2a_gateway_requests", "Requests answered", ["method", "route", "status"])
SECONDS = prometheus_client.Histogram(
    "w2a_gateway_request_seconds", "Time to answer", ["method", "route"], buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 20, 60)
)
OPEN = ("/healthz", "/readyz")
MULTIPART_OVERHEAD = 64 * 1024
DRAIN_BYTES, DRAIN_SECONDS = 64 * 1024 * 1024, 5.0


class Guard:
    """Pure ASGI middleware, so that streams pass untouched."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self.app, self.settings, self.token = app, settings, settings.token()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        try:
            problem = self._refusal(scope, headers)
            if problem is not None:
                await _answer(watched, problem, scope["path"], receive)
            else:
                await self.app(scope, self._limited(headers, receive), watched)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            REQUESTS.labels(scope["method"], route, str(status)).inc()
            SECONDS.labels(scope["method"], route).observe(time.monotonic() - started)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> ProblemError | None:
        if self.token and scope["path"] not in OPEN and not self._known(headers.get("authorization", "")):
            wanted = "Authorization: Bearer <W2A_GATEWAY_TOKEN>, or in a browser any user name with the token as password"
            return ProblemError(401, f"this gateway wants its token: {wanted}")
        origin = headers.get("origin")  # a web page of another site must not post to a door on loopback
        if origin and scope["method"] not in ("GET", "HEAD") and urlsplit(origin).netloc != headers.get("host"):
            return ProblemError(403, f"requests from pages of {origin[:100]} are not accepted")
        length = headers.get("content-length", "0")
        limit, sentence = self._limit(headers)
        if not length.isdecimal() or len(length) > 18:
            return ProblemError(400, "Content-Length must be a number of bytes")
        return ProblemError(413, sentence) if int(length) > limit else None

    def _known(self, authorization: str) -> bool:
        """Bearer for programs; Basic with the token as password, so that a browser can ask for it once for the viewer page."""
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(value.strip().encode(), self.token.encode())

    def _limit(self, headers: dict[str, str]) -> tuple[int, str]:
        """Bytes accepted, and the sentence for more."""
        if headers.get("content-type", "").lower().startswith("multipart/form-data"):
            limit, name, spare = self.settings.upload_limit_bytes, "W2A_UPLOAD_LIMIT_BYTES", MULTIPART_OVERHEAD
        else:
            limit, name, spare = self.settings.json_limit_bytes, "W2A_JSON_LIMIT_BYTES", 0
        return limit + spare, f"the body is larger than the limit of {limit} bytes ({name})"

    def _limited(self, headers: dict[str, str], receive: Receive) -> Receive:
        """Counts what really arrives: a chunked body has no Content-Length."""
        (limit, sentence), seen = self._limit(headers), 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                if message.get("more_body"):
                    await _drain(receive)
                raise HTTPException(413, sentence)
            return message

        return counted


async def _drain(receive: Receive) -> None:
    """Read on and forget, for a while: a client that still sends when the connection closes never sees the answer."""
    left = DRAIN_BYTES
    with anyio.move_on_after(DRAIN_SECONDS):
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body"):
                return


async def _answer(send: Any, problem: ProblemError, path: str, receive: Receive) -> None:
    data = raw(problem, path)
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(data)).encode()), (b"connection", b"close")]
    if problem.status == 401:
        headers += [(b"www-authenticate", b"Bearer"), (b"www-authenticate", b'Basic realm="world2act"')]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": data, "more_body": True})
    await _drain(receive)
    await send({"type": "http.response.body", "body": b""})
