"""The supervisor with small real processes: readiness, kill -9, busy ports, stopping with all that services started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from services.cli.settings import CliSettings
from services.cli.specs import ServiceSpec, http_ready, service_specs
from services.cli.supervisor import Supervisor, SupervisorError, busy_ports, read_state
from tests.processes import free_port, wait_for

pytestmark = pytest.mark.integration

SERVER = """
import http.server, pathlib, signal, subprocess, sys, time
port, folder, mode = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
if mode == "dies":
    sys.exit("bad weights")
child = subprocess.Popen(["sleep", "300"])
(folder / f"{port}.children").open("a").write(f"{child.pid}\\n")
def stop(*_):
    (folder / "order").open("a").write(f"{port}\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "stubborn" else stop)
http.server.ThreadingHTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def spec(folder: Path, name: str, mode: str = "", *, after: tuple[str, ...] = (), stage: int = 1, port: int = 0) -> ServiceSpec:
    """A service that answers HTTP, starts a grandchild and leaves it behind."""
    script = folder / "server.py"
    script.write_text(SERVER)
    port = port or free_port()
    return ServiceSpec(
        name,
        [sys.executable, str(script), str(port), str(folder), mode or "plain"],
        http_ready(f"http://127.0.0.1:{port}/"),
        ports={port: f"W2A_{name.upper()}_PORT"},
        after=after,
        stage=stage,
        grace_s=1.0,
    )


def children(folder: Path, port: int) -> list[int]:
    return [int(line) for line in (folder / f"{port}.children").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_starts_in_order_restarts_the_killed_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = spec(tmp_path, "first", stage=3), spec(tmp_path, "second", after=("first",))
    heard: list[str] = []
    supervisor = Supervisor([first, second], tmp_path / "run", on_event=lambda name, text: heard.append(f"{name} {text}"))
    with supervisor:
        assert [line.split()[0] for line in heard] == ["first", "second"]  # ready in this order
        state = read_state(tmp_path / "run")
        assert state is not None and state["ready"] and state["pid"] == os.getpid()
        pid = supervisor.services["second"].process.pid  # type: ignore[union-attr]
        old_child = children(tmp_path, *second.ports)[0]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: supervisor.services["second"].restarts == 1 and supervisor.ready(), 15, "restarted")
        assert supervisor.services["second"].process.pid != pid  # type: ignore[union-attr]
        assert supervisor.services["first"].restarts == 0
        assert any("SIGKILL" in line for line in heard)
        assert gone(old_child), "what the killed service had started is gone too"
        everything = [s.process.pid for s in supervisor.services.values() if s.process]
        everything += [pid for s in (first, second) for pid in children(tmp_path, *s.ports)]
    wait_for(lambda: all(gone(pid) for pid in everything), 5, "no process is left")
    assert [int(p) for p in (tmp_path / "order").read_text().split()] == [*second.ports, *first.ports]  # dependents first
    assert read_state(tmp_path / "run") is None
    with Supervisor([first, second], tmp_path / "run"):  # and again
        pass


def test_stubborn_service_is_killed_after_its_grace(tmp_path: Path) -> None:
    stubborn = spec(tmp_path, "stubborn", "stubborn")
    supervisor = Supervisor([stubborn], tmp_path / "run")
    with supervisor:
        pid = supervisor.services["stubborn"].process.pid  # type: ignore[union-attr]
        began = time.monotonic()
    assert 0.9 < time.monotonic() - began < 5 and gone(pid)


def test_busy_port_is_named_with_its_owner_before_anything_starts(tmp_path: Path) -> None:
    good = spec(tmp_path, "good")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        supervisor = Supervisor([good, spec(tmp_path, "gateway", port=port)], tmp_path / "run")
        with pytest.raises(
            SupervisorError, match=rf"port {port} \(gateway\) is in use by .*process {os.getpid()}.*W2A_GATEWAY_PORT"
        ):
            supervisor.start()
    assert not (tmp_path / f"{next(iter(good.ports))}.children").exists()
    other = Supervisor([spec(tmp_path, "other")], tmp_path / "run")
    with Supervisor([good], tmp_path / "run"), pytest.raises(SupervisorError, match="already run"):  # the folder is free again
        other.start()


def test_a_port_that_two_services_want_is_named_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W2A_VLA_OPENPI_PORT", "8000")
    monkeypatch.setenv("W2A_PORT_OFFSET", "0")
    both = "port 8000 is wanted by triton (W2A_TRITON_HTTP_PORT) and by vla (W2A_VLA_OPENPI_PORT): give one of them another"
    assert both in busy_ports(service_specs(CliSettings.load()), "127.0.0.1")
    monkeypatch.setenv("W2A_PORT_OFFSET", "1000")
    shifted = {spec.name: spec.ports for spec in service_specs(CliSettings.load())}
    assert shifted["vla"][8000] == "W2A_VLA_OPENPI_PORT" and len(shifted["vla"]) == 3, "set by hand; the other door is off"


def test_service_that_cannot_start_ends_the_start_with_its_last_words(tmp_path: Path) -> None:
    good = spec(tmp_path, "good")
    supervisor = Supervisor([good, spec(tmp_path, "vla", "dies")], tmp_path / "run")
    with pytest.raises(SupervisorError, match=r"vla cannot start.*status 1.*bad weights.*vla\.log"):
        supervisor.__enter__()
    assert all(s.process is None for s in supervisor.services.values())


def test_service_that_never_gets_ready_is_a_failure(tmp_path: Path) -> None:
    asleep = ServiceSpec("asleep", ["sleep", "60"], lambda: "no weights yet")
    with pytest.raises(SupervisorError, match=r"asleep is not ready after 0 s: no weights yet"):
        Supervisor([asleep], tmp_path / "run", start_timeout_s=0.4).__enter__()


MAIN = """
import sys, threading
from pathlib import Path
from rich.console import Console
from tests.integration.test_supervisor import spec
from services.cli import processes
from services.cli.settings import CliSettings
from services.cli.supervisor import Supervisor
folder = Path(sys.argv[1])
specs = [spec(folder, "a", stage=3, port=int(sys.argv[2])), spec(folder, "b", port=int(sys.argv[3]))]
processes.make_supervisor = lambda settings, console: Supervisor(specs, folder / "run")
processes.up(CliSettings(run_dir=folder / "run"), Console(), detach=False)
"""


def start_up(folder: Path, ports: list[int]) -> tuple[subprocess.Popen[str], list[int]]:
    """`world2act up` on small services, ready; all pids that it started."""
    (folder / "main.py").write_text(textwrap.dedent(MAIN))
    command = [sys.executable, str(folder / "main.py"), str(folder), *map(str, ports)]
    env = {**os.environ, "PYTHONPATH": "."}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=env)
    wait_for(lambda: bool((read_state(folder / "run") or {}).get("ready")), 20, "up")
    rows = (read_state(folder / "run") or {})["services"]
    return process, [row["pid"] for row in rows] + [pid for port in ports for pid in children(folder, port)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_ends_cleanly_on_signals(tmp_path: Path, number: signal.Signals) -> None:
    process, pids = start_up(tmp_path, [free_port(), free_port()])
    process.send_signal(number)
    process.send_signal(number)  # an impatient second Ctrl-C changes nothing
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "all services have ended" in output
    assert all(gone(pid) for pid in pids)


def test_killed_supervisor_takes_its_services_along_and_the_next_run_works(tmp_path: Path) -> None:
    ports = [free_port(), free_port()]
    process, pids = start_up(tmp_path, ports)
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: all(gone(pid) for pid in pids[:2]), 5, "the kernel ends the services")
    second, _ = start_up(tmp_path, ports)
    second.terminate()
    second.communicate(timeout=20)
    for pid in pids[2:]:  # grandchildren of the killed run: only a service's own end or its supervisor takes them along
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)
