"""Starting real processes in tests: free ports, a Valkey server, waiting."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from services.runtime.embedded import valkey_command
from services.runtime.streams import connect


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float = 30.0, what: str = "condition") -> None:
    """Wait until `condition()` holds; exceptions count as not yet. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except Exception as error:
            last = error
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds} s ({last})")


class ValkeyProcess:
    """A real Valkey that can be killed and started again on its append-only file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> redis.Redis:
        command = valkey_command("127.0.0.1", self.port, self.folder)
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        client = connect(self.url)
        wait_for(lambda: bool(client.ping()), 20, "valkey answers")
        return client

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def running_valkey(folder: Path) -> Iterator[ValkeyProcess]:
    server = ValkeyProcess(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
