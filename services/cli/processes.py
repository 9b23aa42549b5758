"""`world2act up`, `down`, `status`: the services as processes on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table

from services.cli.client import CliError, Gateway
from services.cli.settings import CliSettings
from services.cli.specs import service_specs
from services.cli.supervisor import Supervisor, SupervisorError, read_state

COLOURS = {"ready": "green", "starting": "yellow", "waiting": "dim", "restarting": "red", "stopped": "dim"}


def make_supervisor(settings: CliSettings, console: Console | None = None) -> Supervisor:
    """The supervisor of the whole embedded default."""
    told = (lambda service, text: console.print(f"[dim]{service}: {text}[/dim]")) if console is not None else None
    return Supervisor(
        service_specs(settings),
        settings.run_dir,
        host=settings.host,
        start_timeout_s=settings.start_timeout_s,
        on_event=told,
    )


def services_table(rows: list[dict[str, Any]], title: str = "", heartbeats: dict[str, float] | None = None) -> Table:
    """State, process, restarts and start-up time of each service."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for name in ("service", "state", "pid", "restarts", "start", *(["heartbeat"] if heartbeats is not None else []), "ports"):
        table.add_column(name, justify="right" if name in ("pid", "restarts", "start", "heartbeat") else "left")
    for row in rows:
        colour = COLOURS.get(row["state"], "")
        note = f" ({row['reason'][:70]})" if row["reason"] and row["state"] == "restarting" else ""
        cells = [row["name"], f"[{colour}]{row['state']}[/{colour}]{note}", str(row["pid"] or "-"), str(row["restarts"])]
        cells.append(f"{row['start_s']:.1f} s" if row["start_s"] else "-")
        if heartbeats is not None:
            ages = [age for name, age in heartbeats.items() if name.split(":")[0] == row["name"]]
            cells.append(f"{min(ages):.1f} s" if ages else "-")
        table.add_row(*cells, " ".join(str(port) for port in row["ports"]))
    return table


@contextlib.contextmanager
def stopping_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, within the block; a second Ctrl-C does not cut the stopping short."""
    stop = threading.Event()
    before = {n: signal.signal(n, lambda *_: stop.set()) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bring_up(supervisor: Supervisor, console: Console, stop: threading.Event) -> float:
    """start() and wait until ready, showing what is awaited; returns the seconds. Raises SupervisorError."""
    supervisor.start()
    if not console.is_terminal:
        return supervisor.wait_ready(lambda: not stop.is_set())
    with Live(services_table(supervisor.rows()), console=console, refresh_per_second=4, transient=True) as live:

        def waiting() -> bool:
            live.update(services_table(supervisor.rows(), "starting"))
            return not stop.is_set()

        return supervisor.wait_ready(waiting)


def up(settings: CliSettings, console: Console, detach: bool) -> None:
    """Start all services and stay until Ctrl-C or SIGTERM; or, detached, return when they are ready."""
    if detach:
        _up_detached(settings, console)
        return
    supervisor = make_supervisor(settings, console)
    with stopping_signals() as stop:
        try:
            seconds = bring_up(supervisor, console, stop)
            console.print(services_table(supervisor.rows()))
            url = settings.gateway()
            console.print(f"ready after {seconds:.1f} s: {url} (viewer), {url}/docs. Ctrl-C stops all.")
            while not stop.wait(0.2):
                if supervisor.failure:
                    raise SupervisorError(supervisor.failure)
            console.print("stopping")
        except SupervisorError as error:
            if stop.is_set():
                console.print("stopped before all services were ready")
                return
            raise CliError(str(error)) from None
        finally:
            supervisor.stop()
    console.print("all services have ended")


def _up_detached(settings: CliSettings, console: Console) -> None:
    run_dir = Path(settings.run_dir)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    path = run_dir / "logs" / "supervisor.log"
    running = read_state(run_dir)
    if running is not None:
        raise CliError(f"services of {run_dir} already run (supervisor process {running.get('pid')}): world2act down stops them")
    with path.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "services.cli.main", "up"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with console.status("starting services"):
        while True:
            state = read_state(run_dir)
            if state is not None and state.get("pid") == child.pid and state.get("ready"):
                break
            if child.poll() is not None:
                lines = path.read_text(errors="replace").strip().splitlines()
                raise CliError((lines[-1] if lines else "the supervisor ended").removeprefix("error: ") + f" (log: {path})")
            time.sleep(0.1)
    console.print(services_table(state["services"]))
    console.print(f"running in the background: {settings.gateway()} (viewer). world2act down stops all.")


def down(settings: CliSettings, console: Console) -> None:
    """Stop the services of this run folder, wherever they were started."""
    state = read_state(settings.run_dir)
    if state is None or not state.get("pid"):
        console.print(f"no services of {settings.run_dir} are running")
        return
    with contextlib.suppress(psutil.Error, ProcessLookupError), console.status("stopping services"):
        supervisor = psutil.Process(int(state["pid"]))
        os.kill(supervisor.pid, signal.SIGTERM)
        try:
            supervisor.wait(90)
        except psutil.TimeoutExpired:
            raise CliError(f"supervisor process {supervisor.pid} does not end; see {settings.run_dir}/logs") from None
    console.print("all services have ended")


def memory_mb(pid: int | None) -> float:
    """Proportional set size of a process and all that it started, in MB; 0 where it is gone or not ours to ask."""
    total = 0
    if pid is None:
        return 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += member.memory_full_info().pss
    return total / 1e6


def status(settings: CliSettings, console: Console) -> None:
    """Processes, health, heartbeat ages and queue backlogs."""
    state = read_state(settings.run_dir)
    if state is None:
        console.print(f"no services of {settings.run_dir} were started by world2act up")
    try:
        with Gateway(settings) as gateway:
            found = gateway.call("GET", "/status")
    except CliError as error:
        if state is not None:
            console.print(services_table(state.get("services", [])))
        raise CliError(f"no health and queues: {error}") from None
    if state is not None:
        rows = state.get("services", [])
        console.print(services_table(rows, heartbeats=found["heartbeats"]))
        console.print(f"memory of all: {sum(memory_mb(row['pid']) for row in rows):,.0f} MB")
    else:
        for name, age in found["heartbeats"].items():
            console.print(f"{name}: heartbeat {age:.1f} s ago")
    queues = Table(box=None, pad_edge=False)
    queues.add_column("queue")
    queues.add_column("unfinished", justify="right")
    for name, count in found["backlogs"].items():
        queues.add_row(name, str(count))
    console.print()
    console.print(queues)
    for name, reason in found["missing"].items():
        console.print(f"[red]{name}[/red] {reason}")
