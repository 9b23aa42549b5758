"""Our policy for the clients of others: base + residual behind openpi's and GR00T's protocols. Off unless a port is set."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from services.vla.doors.acting import Acting
from services.vla.settings import VlaSettings


def open_doors(settings: VlaSettings, make: Callable[[str], Acting]) -> list[Callable[[], None]]:
    """Start the doors that have a port; `make(protocol)` gives what acts behind one. Returns what closes them.

    Raises ValueError for a public address without a token or a table that does not fit, OSError for a port that is taken.
    """
    closers: list[Callable[[], None]] = []
    token = settings.vla_door_token.get_secret_value()
    if not (settings.vla_openpi_port or settings.vla_gr00t_port):
        return closers
    if not token and not loopback(settings.vla_door_host):
        raise ValueError(f"vla_door_token: must be set where a door binds more than loopback, here {settings.vla_door_host}")
    try:
        if settings.vla_openpi_port:
            from services.vla.doors.openpi import OpenpiDoor

            closers.append(
                OpenpiDoor(make("openpi"), settings.vla_door_host, settings.vla_openpi_port, token, settings.vla_workers).close
            )
        if settings.vla_gr00t_port:
            from services.vla.doors.gr00t import Gr00tDoor

            closers.append(
                Gr00tDoor(make("gr00t"), settings.vla_door_host, settings.vla_gr00t_port, token, settings.vla_workers).close
            )
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
