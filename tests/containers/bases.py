"""Base images for a machine that reaches no image registry: look-alikes under the public names. They are never pushed.

What a registry would give is made of Debian's packages and wheels (lookalike.Dockerfile), on a bare Debian by debootstrap.
Builds in a container use the host's way to packages: its pip configuration and its certificates go in as build secrets, and
folders of wheels that the configuration names are served to the build over loopback while it runs.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from tests.containers.engine import Engine

HERE = Path(__file__).parent
DEBIAN = "world2act-lookalike/debian:bookworm"
BARE = ("proc", "sys", "var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")
"""Folders whose contents the public slim images lack, too."""


def target_of(image: str) -> str | None:
    """The look-alike's target in lookalike.Dockerfile for a public image; None where none can be made here."""
    name = image.split(":")[0].rsplit("/", 1)[-1]
    return {"python": "python", "redis": "redis", "prometheus": "prometheus", "tritonserver": "triton"}.get(name)


@contextlib.contextmanager
def package_access() -> Iterator[dict[str, Path]]:
    """Secret id -> file, for builds: the host's pip configuration, its folders served over loopback, and its certificates."""
    with tempfile.TemporaryDirectory() as name, _served() as port:
        folder = Path(name)
        lines = ["[global]"]
        for key, value in _pip_settings().items():
            if key in (
                "index-url",
                "extra-index-url",
                "find-links",
                "trusted-host",
                "proxy",
                "timeout",
                "default-timeout",
                "retries",
            ):
                places = [_over_loopback(place, port) for place in value.split()]
                lines += [f"{key} =", *(f"    {place}" for place in places)]
        (folder / "pip.conf").write_text("\n".join(lines) + "\n")
        found = {"pip_conf": folder / "pip.conf"}
        bundle = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
        if bundle.is_file():
            found["ca_bundle"] = bundle
        yield found


def _pip_settings() -> dict[str, str]:
    """What `pip config list` says, without the sections' names; later lines (the environment's) win."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda text: text.startswith(":env:")):
        if match := re.match(r"^[\w:]+?\.([\w-]+)='(.*)'$", line):
            found[match[1]] = match[2].replace("\\n", " ")
    return found


def _over_loopback(place: str, port: int) -> str:
    path = place.removeprefix("file://")
    return f"http://127.0.0.1:{port}{path.rstrip('/')}/" if path.startswith("/") else place


@contextlib.contextmanager
def _served() -> Iterator[int]:
    """A file server on loopback for the folders that pip's configuration names, and nothing beside them; its port."""
    words = [word.removeprefix("file://") for value in _pip_settings().values() for word in value.split()]
    roots = tuple("/".join(word.split("/")[:3]) + "/" for word in words if word.startswith("/") and Path(word).is_dir())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory="/")  # type: ignore[arg-type]

        def send_head(self) -> object:  # type: ignore[override]
            if not os.path.normpath(unquote(self.path)).startswith(roots) and not f"{self.path}/".startswith(roots):
                self.send_error(404)
                return None
            return super().send_head()

        def log_message(self, format: str, *args: object) -> None:
            """Downloads are not worth a line."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def ensure(engine: Engine, images: list[str], secrets: dict[str, Path]) -> list[str]:
    """Have every image of `images` in the engine: there already, pulled, or a look-alike. Returns the look-alikes' names.

    Raises RuntimeError with what was tried where an image can be had in none of these ways.
    """
    made = []
    for image in images:
        target = target_of(image)
        if engine.label(image, "world2act.lookalike"):
            made.append(image)
        elif not engine.has(image) and not engine.pull(image):
            if target is None:
                raise RuntimeError(f"{image}: no registry answers, and there is no look-alike of it")
            _debian(engine)
            options = [f"--secret=id={name},src={path}" for name, path in secrets.items()]
            options += [f"--target={target}", f"--tag={image}", "--label=world2act.lookalike=1", "--network=host"]
            engine.docker("build", *options, f"--file={HERE / 'lookalike.Dockerfile'}", str(HERE), timeout=900)
            made.append(image)
    return made


def _debian(engine: Engine) -> None:
    """A bare Debian 12 as the image DEBIAN."""
    if engine.has(DEBIAN):
        return
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise RuntimeError("no registry answers, and look-alikes need root and debootstrap: apt-get install debootstrap")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "root"
        command = ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(root)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        exclude = [f"--exclude=./{folder}/*" for folder in BARE]
        tar = subprocess.Popen(["tar", "-C", str(root), *exclude, "-c", "."], stdout=subprocess.PIPE)
        engine.docker("import", "-", DEBIAN, stdin=tar.stdout)
        if tar.wait() != 0:
            raise RuntimeError("debootstrap's Debian could not be packed")
