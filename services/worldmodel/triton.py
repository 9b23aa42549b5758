"""Starts the real tritonserver on services/worldmodel/model_repository.

In NVIDIA's container W2A_TRITON_ROOT names the server's folder; elsewhere the binary comes from the nvidia-pytriton wheel,
whose files are linked into `<run_dir>/triton` in the layout that the server expects. The launcher stays as tritonserver's parent,
because tritonserver goes on calling itself ready when one of its Python backend processes has died, while it answers every
request with an error: the launcher then stops it and exits, so that whoever started it (the CLI, a container runtime) starts it
afresh. Kill -9 of the launcher takes tritonserver with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import psutil

from services.worldmodel.settings import WorldModelSettings

REPOSITORY = Path(__file__).parent / "model_repository"
ROOT = Path(__file__).parents[2]
"""What must be importable in the Python backend's processes: `world2act` and `services`."""

WATCH_SECONDS = 0.5
START_ATTEMPTS = 3
"""On a starved machine a Python backend sometimes aborts while it loads (a lock in shared memory not had within 10 s)."""
REGION_BYTES = 64 * 1024 * 1024
"""Shared memory of a backend process at its start (pages are taken when touched): 64 rows fit, so it rarely has to grow."""


class TritonError(RuntimeError):
    """Triton cannot be started; the text says what to change."""


def _wheel() -> Path:
    """site-packages with the nvidia-pytriton wheel in it. (Found without importing pytriton, which is slow.)"""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise TritonError("triton: the nvidia-pytriton wheel is not installed: pip install 'world2act[triton-server]'")
    return Path(next(iter(spec.submodule_search_locations))).parent


def build_run_folder(run_dir: Path) -> Path:
    """Link bin, backends and caches out of the wheel into `<run_dir>/triton`, with the stub of this Python beside the backend.

    Raises TritonError when the wheel has no stub for this Python version.
    """
    source = _wheel() / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = source / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise TritonError(f"triton: the nvidia-pytriton wheel has no Python backend for Python {version}")
    target = (run_dir / "triton").resolve()
    backend = target / "backends" / "python"
    for folder in (backend, target / "caches"):
        folder.mkdir(parents=True, exist_ok=True)
    _link(source / "bin", target / "bin")
    _link(source / "caches" / "local", target / "caches" / "local")
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        _link(source / "backends" / "python" / name, backend / name)
    if not (backend / stub.name).exists():  # copied, not linked: the backend resolves the folder it lies in
        shutil.copy2(stub, backend / stub.name)
    return target


def _link(source: Path, target: Path) -> None:
    if target.is_symlink() and target.readlink() == source:
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.symlink_to(source)
    temporary.replace(target)


def check_ports(settings: WorldModelSettings) -> None:
    """Raise TritonError naming the busy port and the variable that changes it; tritonserver's own message names neither."""
    for door in ("http", "grpc", "metrics"):
        port = getattr(settings, f"triton_{door}_port")
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((settings.host, port))
            except OSError as error:
                raise TritonError(
                    f"triton: cannot bind {settings.host}:{port} ({door}): {error.strerror}; "
                    f"stop what uses it or set W2A_TRITON_{door.upper()}_PORT"
                ) from None


def check_weights(settings: WorldModelSettings) -> None:
    """Raise TritonError when a weights file is missing: clearer than the failed load that would follow."""
    own = settings.backbone == "small" and not settings.backbone_model
    for name in ("worldmodel.safetensors", "adapters.safetensors")[not own :]:
        if not (settings.zoo / name).is_file():
            raise TritonError(
                f"triton: {settings.zoo / name} is missing; W2A_ZOO names the folder of the weights (make zoo builds it)"
            )


def _region_prefix(settings: WorldModelSettings) -> str:
    """Name of this server's shared-memory regions: one per gRPC port, since two servers cannot share one."""
    return f"w2a_triton_{settings.triton_grpc_port}_"


def remove_dead_regions(settings: WorldModelSettings, folder: Path = Path("/dev/shm")) -> int:
    """Delete what a killed server on the same port left in shared memory; call after `check_ports`. Returns how many."""
    if not folder.is_dir():
        return 0
    found = list(folder.glob(f"{_region_prefix(settings)}*"))
    for region in found:
        region.unlink(missing_ok=True)
    return len(found)


def command(settings: WorldModelSettings, folder: Path) -> list[str]:
    """The command line of tritonserver in the run folder `folder`."""
    options = {
        "model-repository": str(REPOSITORY),
        "backend-directory": str(folder / "backends"),
        "cache-directory": str(folder / "caches"),
        "http-address": settings.host,
        "http-port": str(settings.triton_http_port),
        "grpc-address": settings.host,
        "grpc-port": str(settings.triton_grpc_port),
        "metrics-address": settings.host,
        "metrics-port": str(settings.triton_metrics_port),
        "exit-timeout-secs": "10",
    }
    backend = {"shm-region-prefix-name": _region_prefix(settings), "shm-default-byte-size": str(REGION_BYTES)}
    return [
        str(folder / "bin" / "tritonserver"),
        *(f"--{name}={value}" for name, value in options.items()),
        *(f"--backend-config=python,{name}={value}" for name, value in backend.items()),
    ]


def environment(settings: WorldModelSettings) -> dict[str, str]:
    """The server's environment: our packages, libpython and the wheel's libraries are found; our settings reach the models."""
    env = dict(os.environ)
    libraries = [str(sysconfig.get_config_var("LIBDIR"))]
    if settings.triton_root is None:
        libraries.append(str(_wheel() / "nvidia_pytriton.libs"))
    env["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(p for p in sys.path if p.endswith(("site-packages", "dist-packages")))])
    # The stub's embedded interpreter takes its prefix from the first python3 on PATH: it must be this environment's.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), *filter(None, [env.get("PATH")])])
    env["W2A_ZOO"] = str(settings.zoo.resolve())
    env["W2A_BACKBONE"] = settings.backbone
    env["W2A_TORCH_THREADS"] = env["OMP_NUM_THREADS"] = str(settings.torch_threads)
    return env


def prepare(settings: WorldModelSettings) -> tuple[list[str], dict[str, str]]:
    """Check ports and weights, clean up, build the run folder. Returns (command line, environment)."""
    check_ports(settings)
    check_weights(settings)
    remove_dead_regions(settings)
    return command(settings, settings.triton_root or build_run_folder(settings.run_dir)), environment(settings)


def _die_with_parent() -> None:
    """Runs in the child before exec: a killed launcher leaves no server behind that holds the ports."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


class Launcher:
    """Runs tritonserver until it ends, a signal ends it, or one of its Python backends dies."""

    def __init__(self, settings: WorldModelSettings) -> None:
        self.settings = settings
        self.ending = False
        self.server: subprocess.Popen[bytes] | None = None

    def run(self, arguments: list[str], env: dict[str, str]) -> int:
        """Returns the exit status: 0 after SIGTERM or SIGINT, else 1 or the server's own."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        status = 1
        for _ in range(START_ATTEMPTS):
            self.server = subprocess.Popen(arguments, env=env, preexec_fn=_die_with_parent)
            was_ready, status = self._watch(self.server)
            if self.ending or was_ready or status != -signal.SIGABRT:
                break
            _say("the server aborted while it loaded its models; starting it again")
            remove_dead_regions(self.settings)
        return 0 if self.ending else status if status > 0 else 1

    def _end(self, *_: object) -> None:
        self.ending = True
        if self.server is not None:
            self.server.terminate()

    def _watch(self, server: subprocess.Popen[bytes]) -> tuple[bool, int]:
        """Until `server` ended: whether it was ready, and its exit status."""
        backends: list[psutil.Process] = []
        while (status := server.poll()) is None:
            if not backends and _ready(self.settings):
                backends = [p for p in psutil.Process(server.pid).children() if p.name().startswith("triton_python")]
            dead = [p.pid for p in backends if not p.is_running() or p.status() == psutil.STATUS_ZOMBIE]
            if dead and not self.ending:
                _say(f"Python backend process {dead[0]} died; stopping the server, start it again")
                server.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(WATCH_SECONDS)
        return bool(backends), status


def _say(sentence: str) -> None:
    print(f"triton: {sentence}", file=sys.stderr, flush=True)


def _ready(settings: WorldModelSettings) -> bool:
    """Whether server and all models are ready (asked over HTTP: the launcher needs no client library)."""
    try:
        with urllib.request.urlopen(f"http://{settings.host}:{settings.triton_http_port}/v2/health/ready", timeout=1.0) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def main(settings: WorldModelSettings) -> None:
    """Run Triton in the foreground. Exits with status 1 and one sentence when that cannot work."""
    try:
        arguments, env = prepare(settings)
    except TritonError as error:
        raise SystemExit(str(error)) from None
    raise SystemExit(Launcher(settings).run(arguments, env))
