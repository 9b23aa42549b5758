"""Errors as RFC 9457 problem details, always: application/problem+json with one clear sentence, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import kombu.exceptions
import redis
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

log = structlog.get_logger()
MEDIA_TYPE = "application/problem+json"
TITLES = {
    400: "Bad request",
    401: "Unauthorised",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    413: "Body too large",
    415: "Unsupported media type",
    416: "Range not satisfiable",
    422: "Invalid request",
    500: "Internal error",
    503: "Service unavailable",
}


class FieldError(BaseModel):
    """What is wrong with one field."""

    field: str
    message: str


class ProblemDetails(BaseModel):
    """RFC 9457. `errors` lists the fields of a 422; `service` names what is down in a 503."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str = ""
    service: str | None = None
    errors: list[FieldError] | None = None


class ProblemError(Exception):
    """Raised anywhere in a request; becomes the answer."""

    def __init__(self, status: int, detail: str, *, service: str | None = None, errors: Sequence[FieldError] = ()) -> None:
        super().__init__(detail)
        self.status, self.detail, self.service, self.errors = status, detail, service, list(errors)


def invalid(field: str, message: str) -> ProblemError:
    """422 about one field; `message` may start with the field's name, as the library's sentences do."""
    detail = message if message.startswith(field) else f"{field}: {message}"
    return ProblemError(422, detail, errors=[FieldError(field=field, message=message.removeprefix(f"{field}: "))])


def body(problem: ProblemError, instance: str) -> dict[str, Any]:
    """The problem as the JSON object that is sent."""
    details = ProblemDetails(
        title=TITLES.get(problem.status, "Error"),
        status=problem.status,
        detail=problem.detail[:2000],
        instance=instance,
        service=problem.service,
        errors=problem.errors or None,
    )
    return details.model_dump(exclude_none=True)


def raw(problem: ProblemError, instance: str) -> bytes:
    return json.dumps(body(problem, instance)).encode()


def response(request: Request, problem: ProblemError, headers: dict[str, str] | None = None) -> JSONResponse:
    headers = dict(headers or {})
    if problem.status == 503:
        headers.setdefault("Retry-After", "5")
    return JSONResponse(body(problem, request.url.path), problem.status, headers, media_type=MEDIA_TYPE)


def from_validation(errors: Sequence[Any]) -> ProblemError:
    """pydantic's errors -> 422; neither the input nor pydantic's links are repeated."""
    found: list[FieldError] = []
    for error in errors[:20]:
        place = [str(p) for p in error["loc"] if p not in ("body", "query", "path")]
        message = str(error["msg"]).removeprefix("Value error, ")
        if error.get("type") == "json_invalid":  # its place is a number of characters, which is no field
            place, message = [], f"is not JSON ({error.get('ctx', {}).get('error', message)})"
        named, _, rest = message.partition(": ")
        if not place and rest and named.isidentifier():  # a whole-model validator names the field in its text
            place, message = [named], rest
        found.append(FieldError(field=".".join(place) or "body", message=message))
    return ProblemError(422, "; ".join(f"{e.field}: {e.message}" for e in found[:5]), errors=found)


def redis_down(url: str) -> ProblemError:
    """503; names the address without a password that the URL may hold."""
    parts = urlsplit(url)
    return ProblemError(503, f"redis at {parts.hostname}:{parts.port or 6379} does not answer; try again", service="redis")


def install(app: FastAPI, redis_url: str) -> None:
    """Turn every exception that leaves a route into problem details."""

    async def on_problem(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ProblemError)
        return response(request, error)

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError | ValidationError)
        return response(request, from_validation(error.errors()))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return response(request, ProblemError(error.status_code, str(error.detail)), dict(error.headers or {}))

    async def on_redis(request: Request, error: Exception) -> JSONResponse:
        log.warning("redis is down", error=str(error)[:200])
        return response(request, redis_down(redis_url))

    async def on_anything(request: Request, error: Exception) -> JSONResponse:
        log.error("request failed", path=request.url.path, exc_info=error)
        return response(request, ProblemError(500, "the request failed; the gateway's log has the reason"))

    app.add_exception_handler(ProblemError, on_problem)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(ValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    for kind in (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, kombu.exceptions.OperationalError):
        app.add_exception_handler(kind, on_redis)
    app.add_exception_handler(redis.exceptions.ResponseError, on_anything)
    app.add_exception_handler(Exception, on_anything)
