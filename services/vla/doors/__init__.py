"""Our policy for the clients of others: base + residual behind openpi's and GR00T's protocols. Off unless a port is set.

Only then are the libraries of the extra `policies` imported.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import structlog

from services.vla.batcher import Batcher
from services.vla.engine import ActJob, Chunks, Engine
from services.vla.observations import read_namespace
from services.vla.settings import VlaSettings
from services.vla.versions import Versions

log = structlog.get_logger()


def open_doors(
    settings: VlaSettings, engine: Engine, batcher: Batcher[ActJob, Chunks], versions: Versions
) -> list[Callable[[], None]]:
    """Start the doors that have a port. Returns what closes them.

    Raises ValueError for a public address without a token, a table that does not fit or a missing library, OSError for a port
    that is taken.
    """
    closers: list[Callable[[], None]] = []
    token = settings.vla_door_token.get_secret_value()
    if not (settings.vla_openpi_port or settings.vla_gr00t_port):
        return closers
    try:
        from services.vla.doors.acting import Acting
        from services.vla.doors.gr00t import Gr00tDoor
        from services.vla.doors.openpi import OpenpiDoor
        from services.vla.policies import layouts
    except ImportError as error:
        raise ValueError(f"vla_openpi_port, vla_gr00t_port: {error.name} is missing; install the extra `policies`") from None

    if not token and not loopback(settings.vla_door_host):
        raise ValueError(f"vla_door_token: must be set where a door binds more than loopback, here {settings.vla_door_host}")
    namespace = read_namespace(settings.vla_door_namespace)
    if not versions.loaded(namespace):
        log.warning("no residual is loaded yet: the newest is the base alone", namespace=namespace)
    try:
        for name, door, port in (
            ("openpi", OpenpiDoor, settings.vla_openpi_port),
            ("gr00t", Gr00tDoor, settings.vla_gr00t_port),
        ):
            if port:
                layout = layouts.load(settings.vla_door_layout, name)
                acting = Acting(engine, batcher, versions, layout, namespace, settings.vla_door_version, settings.vla_max_batch)
                closers.append(door(acting, settings.vla_door_host, port, token, settings.vla_workers).close)
    except BaseException:
        for close in closers:
            close()
        raise
    return closers


def loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
