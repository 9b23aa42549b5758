"""Runs services as processes: starts them, waits until they are ready, restarts what dies, stops all and leaves nothing behind.

Every service is the leader of its own process group, so that Ctrl-C reaches only this process, and so that what a service
started (Triton's stubs, environment processes) ends with it. Should this process itself be killed, the kernel sends each
service SIGTERM (PR_SET_PDEATHSIG). All starts, restarts and stops happen in one thread; the kernel counts a thread that
ends as the death of the parent, so that thread lives as long as the services do.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import psutil

from services.cli.specs import ServiceSpec

State = Literal["waiting", "starting", "ready", "restarting", "stopped"]
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.2, 5.0
STABLE_S = 30.0
"""A service that was ready this long before it died starts again with the shortest back-off."""
FIRST_TRIES = 3
"""A service that dies this often before it was ever ready cannot start: its log has the reason."""
TICK_S, CHECK_S = 0.05, 0.2
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class SupervisorError(RuntimeError):
    """Services cannot be started; the text is one sentence for the user."""


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class Service:
    """One supervised process and what became of it. Times are monotonic seconds."""

    spec: ServiceSpec
    state: State = "waiting"
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    failures: int = 0  # deaths in a row
    was_ready: bool = False
    started: float = 0.0
    created: float = 0.0  # of the process, Unix seconds: its pid may be another's one day
    ready_at: float = 0.0
    next_step: float = 0.0
    reason: str = ""  # why it is not ready
    start_s: float = 0.0  # what its last start took

    def row(self) -> dict[str, Any]:
        """What status shows."""
        return {
            "name": self.spec.name,
            "state": self.state,
            "pid": self.process.pid if self.process else None,
            "created": self.created,
            "restarts": self.restarts,
            "start_s": round(self.start_s, 2),
            "reason": self.reason,
            "ports": sorted(self.spec.ports),
        }


def port_owner(port: int) -> str:
    """Who listens on `port`, as far as this user may know."""
    with contextlib.suppress(psutil.Error, OSError):
        for c in psutil.net_connections("tcp"):
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port and c.pid:
                command = " ".join(psutil.Process(c.pid).cmdline())[:100]
                return f"{command} (process {c.pid})"
    return "another process"


def busy_ports(specs: Iterable[ServiceSpec], host: str) -> list[str]:
    """One sentence for each port that cannot be bound, or that two services want."""
    found = []
    wanted: dict[int, str] = {}
    for spec in specs:
        for port, setting in spec.ports.items():
            mine = f"{spec.name} ({setting})"
            if (first := wanted.setdefault(port, mine)) != mine:
                found.append(f"port {port} is wanted by {first} and by {mine}: give one of them another")
                continue
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    s.bind((host, port))
                    s.listen(1)
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise SupervisorError(f"{spec.name}: cannot bind {host}:{port}: {error.strerror}") from None
                    hint = f"set {setting}, or W2A_PORT_OFFSET" if setting != "W2A_PORT_OFFSET" else "set W2A_PORT_OFFSET"
                    found.append(f"port {port} ({spec.name}) is in use by {port_owner(port)}: stop it, or {hint} to move")
    return found


def end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL whatever is left of a service's process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class Supervisor:
    """Use as a context manager, or start(), wait_ready(), stop(). `on_event(service, text)` hears of deaths and restarts."""

    def __init__(
        self,
        specs: Iterable[ServiceSpec],
        run_dir: Path,
        *,
        host: str = "127.0.0.1",
        start_timeout_s: float = 300.0,
        on_event: Callable[[str, str], None] | None = None,
    ) -> None:
        self.services = {spec.name: Service(spec) for spec in specs}
        self.run_dir, self.host, self.start_timeout_s = Path(run_dir), host, start_timeout_s
        self.logs = self.run_dir / "logs"
        self.state_file = self.run_dir / "supervisor.json"
        self.on_event = on_event or (lambda service, text: None)
        self.failure = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock: IO[str] | None = None
        self._written = ""
        self._begun = 0.0

    # -- for the caller --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything in the background. Raises SupervisorError, before anything runs, when another supervisor has this
        run folder or a port is taken."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            end_leftovers(self.run_dir)
            busy = busy_ports((s.spec for s in self.services.values()), self.host)
            if busy:
                more = f"; and {len(busy) - 3} ports more" if len(busy) > 3 else ""
                raise SupervisorError("; ".join(busy[:3]) + more)
            for name in self.services:
                (self.logs / f"{name}.log").write_bytes(b"")
        except BaseException:
            self._release_lock()
            raise
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        return all(s.state == "ready" for s in self.services.values())

    def wait_ready(self, waiting: Callable[[], bool] | None = None) -> float:
        """Block until every service is ready; returns the seconds since start(). `waiting()` is called now and then and may
        return False to give up. Raises SupervisorError when a service cannot start; everything is stopped then."""
        while not self.ready():
            if self.failure or (waiting is not None and not waiting()):
                self.stop()
                raise SupervisorError(self.failure or "stopped before all services were ready")
            time.sleep(TICK_S)
        return time.monotonic() - self._begun

    def stop(self) -> None:
        """Stop everything, dependents first; returns when no process is left. Safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def rows(self) -> list[dict[str, Any]]:
        """The services as status shows them."""
        return [service.row() for service in self.services.values()]

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # -- the supervising thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                for service in self.services.values():
                    self._step(service)
                self._write_state()
                self._stop.wait(TICK_S)
        except Exception as error:
            self.failure = self.failure or f"supervisor: {type(error).__name__}: {error}"
        finally:
            try:
                self._stop_all()
            finally:
                self._stop.set()
                self.state_file.unlink(missing_ok=True)
                self._release_lock()

    def _step(self, service: Service) -> None:
        """Move one service one step on."""
        now = time.monotonic()
        if service.process is not None and service.process.poll() is not None:
            self._died(service, now)
        elif service.state == "waiting":
            if all(self.services[name].state == "ready" for name in service.spec.after):
                self._launch(service, now)
        elif service.state == "restarting":
            if now >= service.next_step:
                self._launch(service, now)
        elif service.state == "starting" and now >= service.next_step:
            service.reason = service.spec.ready() or ""
            now = time.monotonic()
            service.next_step = now + CHECK_S
            if not service.reason:
                service.state, service.was_ready, service.ready_at = "ready", True, now
                service.start_s = now - service.started
                self.on_event(service.spec.name, f"ready after {service.start_s:.1f} s")
            elif now - service.started > self.start_timeout_s and not service.was_ready:
                self._fail(service, f"is not ready after {self.start_timeout_s:.0f} s: {service.reason}")

    def _launch(self, service: Service, now: float) -> None:
        spec = service.spec
        with (self.logs / f"{spec.name}.log").open("ab") as log:
            try:
                service.process = subprocess.Popen(
                    spec.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=spec.env or None,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            except OSError as error:
                self._fail(service, f"cannot be started: {error}")
                return
        with contextlib.suppress(psutil.Error):
            service.created = psutil.Process(service.process.pid).create_time()
        service.state, service.started, service.next_step = "starting", now, now
        service.reason = "starting"

    def _died(self, service: Service, now: float) -> None:
        assert service.process is not None
        code = service.process.returncode
        end_group(service.process)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        if service.state == "ready" and now - service.ready_at >= STABLE_S:
            service.failures = 0
        service.failures += 1
        service.process = None
        if not service.was_ready and service.failures >= FIRST_TRIES:
            self._fail(service, f"cannot start: it {how} {service.failures} times")
            return
        pause = min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(service.failures - 1, 10))
        service.restarts += 1
        service.state, service.next_step, service.reason = "restarting", now + pause, how
        self.on_event(service.spec.name, f"{how}; restart {service.restarts} in {pause:.1f} s")

    def _fail(self, service: Service, text: str) -> None:
        path = self.logs / f"{service.spec.name}.log"
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
        last = f"; its last words: {lines[-1].strip()[:300]}" if lines else ""
        self.failure = f"{service.spec.name} {text}{last} (log: {path})"
        self._stop.set()

    # -- stopping --------------------------------------------------------------------------------------------------

    def _stop_all(self) -> None:
        for stage in sorted({s.spec.stage for s in self.services.values()}):
            self._stop_some([s for s in reversed(self.services.values()) if s.spec.stage == stage and s.process is not None])

    def _stop_some(self, services: list[Service]) -> None:
        """SIGTERM, wait for the grace, then SIGKILL what is left of each, with all that it started."""
        family: list[psutil.Process] = []
        for service in services:
            assert service.process is not None
            with contextlib.suppress(psutil.Error):
                family += psutil.Process(service.process.pid).children(recursive=True)
            with contextlib.suppress(ProcessLookupError):
                service.process.terminate()
        begun = time.monotonic()
        for service in services:
            assert service.process is not None
            try:
                service.process.wait(max(0.0, begun + service.spec.grace_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.on_event(service.spec.name, f"did not end within {service.spec.grace_s:.0f} s and was killed")
            end_group(service.process)
            service.process.wait()
            service.state, service.process = "stopped", None
        for relative in family:  # those that left the group; psutil compares start times, so a reused id is not hit
            with contextlib.suppress(psutil.Error):
                relative.kill()

    # -- files -----------------------------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        lock = (self.run_dir / "supervisor.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            pid = (read_state(self.run_dir) or {}).get("pid", "unknown")
            raise SupervisorError(
                f"services of {self.run_dir} already run (supervisor process {pid}): world2act down stops them"
            ) from None
        self._lock = lock

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _write_state(self) -> None:
        rows = self.rows()
        text = json.dumps({"pid": os.getpid(), "ready": self.ready(), "services": rows}, indent=1)
        if text == self._written:
            return
        temporary = self.state_file.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.state_file)
        self._written = text


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """What the supervisor of `run_dir` last wrote, None where none runs (nobody holds the lock)."""
    try:
        with (Path(run_dir) / "supervisor.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read(run_dir)
    except OSError:
        return None


def _read(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((Path(run_dir) / "supervisor.json").read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def end_leftovers(run_dir: Path) -> None:
    """End what a supervisor that was killed left: the processes in its state file, if they are still the same ones."""
    for row in _read(run_dir).get("services", []):
        with contextlib.suppress(psutil.Error, KeyError, TypeError, ProcessLookupError, PermissionError):
            process = psutil.Process(row["pid"])
            if abs(process.create_time() - row["created"]) < 1.0:
                process.terminate()
                with contextlib.suppress(psutil.TimeoutExpired):
                    process.wait(5)
                os.killpg(row["pid"], signal.SIGKILL)
