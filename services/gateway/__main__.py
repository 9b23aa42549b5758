"""`python -m services.gateway`: serve the REST door until SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
import socket
import sys

import prometheus_client
import structlog
import uvicorn
from pydantic import ValidationError

from services.gateway.app import create_app
from services.gateway.settings import GatewaySettings
from services.gateway.state import State
from services.runtime.telemetry import configure_logging, serve_health


def main() -> int:
    """Exit code 2 with one sentence when a setting is wrong or a port is taken."""
    try:
        settings = GatewaySettings()
        settings.check_host()
        configure_logging("gateway", settings)
        app = create_app(settings)
        door = socket.socket()
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((settings.host, settings.gateway_port))
        except OSError as error:
            raise OSError(f"gateway: cannot bind {settings.host}:{settings.gateway_port}: {error.strerror}") from None
        prometheus_client.REGISTRY.register(State(app.state.doors))
        health = serve_health("gateway", settings, app.state.doors.checks())
    except (ValidationError, ValueError, OSError) as error:
        print(str(error), file=sys.stderr)
        return 2
    structlog.get_logger().info("serving", address=f"http://{settings.host}:{settings.gateway_port}")
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again after its shutdown: by then it means nothing
        signal.signal(number, lambda *_: None)
    # Open event streams must not keep the process from ending.
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=3, access_log=False, server_header=False, lifespan="off"
        )
    )
    server.run(sockets=[door])
    health.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
