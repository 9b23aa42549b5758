"""`python -m services.simulator`: the environment pool behind gRPC, with health, readiness and metrics."""

from __future__ import annotations

import sys

import structlog

from services.runtime.generated.simulator_pb2_grpc import add_SimulatorServicer_to_server
from services.runtime.rpc import start_server
from services.runtime.telemetry import configure_logging, serve_health, stop_on_signals
from services.simulator.pool import MAX_WAITING, LostError, Pool
from services.simulator.server import Servicer
from services.simulator.settings import SimulatorSettings

log = structlog.get_logger()


def main() -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit status."""
    settings = SimulatorSettings()
    configure_logging("simulator", settings)
    stop = stop_on_signals()
    pool = None
    try:
        pool = Pool(
            settings.simulator_name,
            settings.simulator_environments,
            settings.simulator_lease_seconds,
            settings.simulator_call_seconds,
        )
        running = pool
        server, _, port = start_server(
            lambda s: add_SimulatorServicer_to_server(Servicer(running), s),  # type: ignore[no-untyped-call]
            f"{settings.host}:{settings.simulator_port}",
            workers=MAX_WAITING + 2 * len(pool) + 8,  # callers that wait for an environment must not keep out those who have one
        )
        serve_health("simulator", settings, {"environments": lambda: None if running.alive() else "no environment process runs"})
        log.info("simulator serves", port=port, simulator=settings.simulator_name, environments=len(pool))
        stop.wait()
        server.stop(grace=2).wait()
    except (OSError, ValueError, LostError) as error:
        log.error("simulator stops", reason=str(error))
        return 1
    finally:
        if pool is not None:
            pool.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
