"""Starts the real tritonserver (the binary in the nvidia-pytriton wheel) on services/worldmodel/model_repository.

The same repository runs in NVIDIA's container; here the wheel's files are linked into `<run_dir>/triton` in the layout that
the server expects. The process is replaced (exec), so whoever starts this module holds tritonserver's process id.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import sysconfig
from pathlib import Path

from services.worldmodel.settings import WorldModelSettings

REPOSITORY = Path(__file__).parent / "model_repository"
ROOT = Path(__file__).parents[2]
"""What must be importable in the Python backend's processes: `world2act` and `services`."""
MODELS = ("worldmodel", "video_adapter", "imagine")


class TritonError(RuntimeError):
    """Triton cannot be started; the text says what to change."""


def _wheel() -> Path:
    """site-packages with the nvidia-pytriton wheel in it. (Found without importing pytriton, which is slow.)"""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise TritonError("triton: the nvidia-pytriton wheel is not installed: pip install 'world2act[worldmodel]'")
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
    for name in ("worldmodel.safetensors", "adapters.safetensors"):
        if not (settings.zoo / name).is_file():
            raise TritonError(f"triton: {settings.zoo / name} is missing; W2A_ZOO names the folder of the weights (make zoo builds it)")


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
        "backend-config": f"python,shm-region-prefix-name={_region_prefix(settings)}",
        "exit-timeout-secs": "10",
        "log-verbose": "0",
    }
    return [str(folder / "bin" / "tritonserver"), *(f"--{name}={value}" for name, value in options.items())]


def environment(settings: WorldModelSettings) -> dict[str, str]:
    """The server's environment: our packages, libpython and the wheel's libraries can be found, and our settings reach the models."""
    env = dict(os.environ)
    libraries = [str(sysconfig.get_config_var("LIBDIR")), str(_wheel() / "nvidia_pytriton.libs")]
    env["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(p for p in sys.path if p.endswith(("site-packages", "dist-packages")))])
    env["W2A_ZOO"] = str(settings.zoo.resolve())
    env["W2A_BACKBONE"] = settings.backbone
    env["W2A_TORCH_THREADS"] = env["OMP_NUM_THREADS"] = str(settings.torch_threads)
    return env


def prepare(settings: WorldModelSettings) -> tuple[list[str], dict[str, str]]:
    """Check ports and weights, clean up, build the run folder. Returns (command line, environment)."""
    check_ports(settings)
    check_weights(settings)
    remove_dead_regions(settings)
    return command(settings, build_run_folder(settings.run_dir)), environment(settings)


def main(settings: WorldModelSettings) -> None:
    """Become tritonserver. Exits with status 1 and one sentence when that cannot work."""
    try:
        arguments, env = prepare(settings)
    except TritonError as error:
        raise SystemExit(str(error)) from None
    os.execve(arguments[0], arguments, env)
