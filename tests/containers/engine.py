"""A Docker Engine for the tests: the machine's own, or a private one that is started here and ends with the tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "world2act"
"""Where a private engine keeps its images between runs."""

HOW = "no Docker Engine with Compose v2: as root run scripts/engine.sh (Debian's packages), or start one that `docker info` finds"
DRIVERS = ("overlay2", "fuse-overlayfs", "vfs")
"""Storage drivers in the order in which they are tried."""


class NoEngineError(RuntimeError):
    """There is no engine and none can be started; the text says what was tried."""


class DockerError(RuntimeError):
    """A docker command failed; the text ends with what it said."""


@dataclass
class Engine:
    """`docker` with the environment that reaches one engine."""

    how: str
    env: dict[str, str] = field(default_factory=dict)

    def docker(
        self, *arguments: str, stdin: IO[bytes] | bytes = b"", timeout: float = 120, cwd: Path | None = None, **env: str
    ) -> str:
        """Standard output of a docker command. Raises DockerError."""
        done = subprocess.run(
            ["docker", *arguments],
            **({"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}),  # type: ignore[call-overload]
            capture_output=True,
            env=os.environ | self.env | env,
            timeout=timeout,
            cwd=cwd,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr + done.stdout).decode(errors="replace").strip()
            raise DockerError(f"docker {' '.join(arguments)[:200]}: {said[-3000:]}")
        return done.stdout.decode(errors="replace")

    def works(self, *arguments: str, timeout: float = 120) -> bool:
        try:
            self.docker(*arguments, timeout=timeout)
        except (DockerError, subprocess.TimeoutExpired):
            return False
        return True

    def has(self, image: str) -> bool:
        return self.works("image", "inspect", image)

    def pull(self, image: str) -> bool:
        return self.works("pull", "--quiet", image, timeout=900)

    def inspect(self, thing: str) -> dict[str, Any]:
        """What `docker inspect` says of one container, image, network or volume."""
        return dict(json.loads(self.docker("inspect", thing))[0])

    def label(self, image: str, name: str) -> str:
        return str((self.inspect(image)["Config"].get("Labels") or {}).get(name, "")) if self.has(image) else ""


@contextlib.contextmanager
def running_engine(folder: Path) -> Iterator[Engine]:
    """The engine that `docker info` finds, else a private one. Raises NoEngineError."""
    if shutil.which("docker") is None:
        raise NoEngineError(HOW)
    found = Engine("the machine's own engine")
    if found.works("info"):
        _check_compose(found)
        yield found
        return
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        raise NoEngineError(HOW)
    with _private(folder) as engine:
        _check_compose(engine)
        yield engine


def _check_compose(engine: Engine) -> None:
    if not engine.works("compose", "version"):
        raise NoEngineError(f"{engine.how} answers, but docker has no Compose v2 plugin: {HOW}")


@contextlib.contextmanager
def _private(folder: Path) -> Iterator[Engine]:
    """dockerd on a socket of its own, with the first storage driver that works."""
    folder.mkdir(parents=True, exist_ok=True)
    tried = []
    for driver in DRIVERS:
        socket, log = folder / "docker.sock", folder / "dockerd.log"
        command = ["dockerd", f"--host=unix://{socket}", f"--data-root={CACHE / 'docker'}", f"--exec-root={folder / 'exec'}"]
        command += [f"--pidfile={folder / 'dockerd.pid'}", f"--storage-driver={driver}"]
        with log.open("wb") as f:
            daemon = subprocess.Popen(command, stdout=f, stderr=f, start_new_session=True)
        engine = Engine(f"a private engine (dockerd, {driver})", {"DOCKER_HOST": f"unix://{socket}"})
        try:
            if _answers(engine, daemon):
                yield engine
                return
            tried.append(f"{driver}: {log.read_text(errors='replace').strip().splitlines()[-1][:200]}")
        finally:
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
    raise NoEngineError(f"dockerd does not start here: {'; '.join(tried)}")


def _answers(engine: Engine, daemon: subprocess.Popen[bytes], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and daemon.poll() is None:
        if engine.works("info", timeout=10):
            return True
        time.sleep(0.2)
    return False
