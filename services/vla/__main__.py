"""`python -m services.vla`: the policy server. Flags are the settings: --vla_port 50051 --vla_max_batch 32 ..."""

from __future__ import annotations

import math
import sys

import structlog
import torch

from services.runtime.artifacts import ArtifactStore
from services.runtime.generated import policy_pb2_grpc
from services.runtime.rpc import start_server
from services.runtime.streams import connect
from services.runtime.telemetry import configure_logging, serve_health, start_heartbeat, stop_on_signals
from services.vla.batcher import Batcher
from services.vla.doors import open_doors
from services.vla.engine import Engine
from services.vla.observations import DEFAULT_NAMESPACE
from services.vla.policies import base
from services.vla.service import PolicyServicer
from services.vla.settings import VlaSettings
from services.vla.versions import Versions
from services.vla.vision import Vision
from world2act.bundle import Bundle
from world2act.models.adapters import Adapters
from world2act.signature import trusted_keys

log = structlog.get_logger()
GRACE_SECONDS = 5.0


def load_engine(settings: VlaSettings) -> Engine:
    """Policy, world model and adapters that belong together. Raises FileNotFoundError or ValueError with one clear sentence."""
    vision = Vision(settings.weights(settings.vla_worldmodel))
    adapters = Adapters.load(settings.weights(settings.vla_adapters)) if settings.vla_adapters else None
    if adapters is not None:
        adapters.check_worldmodel(vision.hash)
    return Engine(
        base.make(settings),
        vision,
        adapters.hash if adapters is not None else "",
        settings.vla_block,
        adapters,
        settings.vla_max_bound or math.inf,
        trusted_keys(settings.vla_trusted_keys, "vla_trusted_keys"),
        settings.vla_unseen == "residual",
    )


def load_residual(settings: VlaSettings, engine: Engine, versions: Versions) -> None:
    """Put the bundle that the settings name in memory, so that a server without a trainer has it. Raises as `Engine.check`."""
    if settings.vla_bundle is not None:
        path = settings.vla_bundle
        content = path.read_bytes()
        version = Bundle.from_bytes(content, str(path)).version
        versions.add(DEFAULT_NAMESPACE, engine.check(content, version, str(path)))
        log.info("residual loaded", version=version, file=str(path))


def serve(settings: VlaSettings) -> None:
    """Run until SIGTERM or SIGINT; requests in progress are answered."""
    stop = stop_on_signals()
    engine = load_engine(settings)
    batcher = Batcher(engine.compute, settings.vla_max_batch, settings.vla_max_wait_ms / 1000.0)
    versions = Versions(settings.vla_keep_versions, settings.vla_keep_namespaces)
    load_residual(settings, engine, versions)
    closers = open_doors(settings, engine, batcher, versions)
    servicer = PolicyServicer(engine, batcher, versions, ArtifactStore(settings.artifacts_url), settings.vla_max_batch)
    server, health, port = start_server(
        lambda s: policy_pb2_grpc.add_PolicyServicer_to_server(servicer, s),  # type: ignore[no-untyped-call]
        f"{settings.host}:{settings.vla_port}",
        settings.vla_workers,
    )
    http = serve_health("vla", settings, {"batcher": lambda: None if batcher.alive() else "the batcher thread has ended"})
    heart = start_heartbeat(connect(settings.redis_url, patient=False), "vla", settings.instance, stop)
    if reason := engine.policy.away():
        log.warning("no action until the base policy's server answers", reason=reason)
    log.info("serving", policy=engine.policy.spec.name, port=port, base=engine.policy.spec.hash[:12])
    stop.wait()
    log.info("stopping")
    health.enter_graceful_shutdown()
    for close in closers:
        close()
    server.stop(GRACE_SECONDS).wait()
    batcher.close()
    http.shutdown()
    heart.join(GRACE_SECONDS)


def main() -> None:
    settings = VlaSettings(_cli_parse_args=True, _cli_prog_name="python -m services.vla")
    configure_logging("vla", settings)
    torch.set_num_threads(settings.torch_threads)
    try:
        serve(settings)
    except (OSError, ValueError) as error:
        log.error("cannot serve", reason=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
