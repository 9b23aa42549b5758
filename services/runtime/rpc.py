"""gRPC: how every server starts, checks and answers, and how every client connects."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from concurrent import futures
from typing import Any, NoReturn, TypeVar

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

log = structlog.get_logger()
MAX_MESSAGE = 64 * 1024 * 1024
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    ("grpc.so_reuseport", 0),  # a busy port is an error, not a second server
]
Reply = TypeVar("Reply")


class RpcError(Exception):
    """What a servicer raises to answer with a gRPC status and one clear sentence."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def guarded(method: Callable[[Any, Any, grpc.ServicerContext], Reply]) -> Callable[[Any, Any, grpc.ServicerContext], Reply]:
    """ValueError -> INVALID_ARGUMENT with its text, RpcError -> its code, else INTERNAL; no traceback leaves the process."""

    @functools.wraps(method)
    def wrapper(self: Any, request: Any, context: grpc.ServicerContext) -> Reply:
        try:
            return method(self, request, context)
        except RpcError as error:
            _abort(context, error.code, str(error))
        except ValueError as error:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception:
            log.exception("request failed", method=method.__name__)
            _abort(context, grpc.StatusCode.INTERNAL, f"{method.__name__} failed; the server's log has the reason")

    return wrapper


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    context.abort(code, message[:1000])
    raise AssertionError("abort always raises")


def start_server(
    add: Callable[[grpc.Server], None], address: str, workers: int = 16
) -> tuple[grpc.Server, health.HealthServicer, int]:
    """A running server with the standard health service. `address` is host:port (port 0: any free one).

    Returns (server, health, port). Raises OSError with a clear sentence when the port is taken.
    """
    server = grpc.server(futures.ThreadPoolExecutor(workers), options=OPTIONS)
    add(server)
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise OSError(f"cannot bind {address}: is another process using the port?")
    server.start()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    return server, servicer, port


def connect_channel(address: str) -> grpc.Channel:
    """A channel to a door of ours."""
    return grpc.insecure_channel(address, options=OPTIONS)


def replicas(addresses: list[str]) -> list[str]:
    """Every host:port with its name replaced by all addresses that the name has now: a door with several replicas behind one
    name (Compose, a headless Kubernetes Service). A name that is not known stays, so that calling it says so.
    """
    found: dict[str, None] = {}  # in order, without doubles
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            infos = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        except OSError:
            found[address] = None
            continue
        numbers = sorted(str(info[4][0]) for info in infos if info[0] == socket.AF_INET)
        numbers = numbers or sorted(f"[{info[4][0]}]" for info in infos)
        found.update(dict.fromkeys(f"{number}:{port}" for number in numbers))
    return list(found)


def healthy(address: str, timeout: float = 2.0) -> bool:
    """Whether the server at `address` answers its health check with SERVING."""
    with connect_channel(address) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
