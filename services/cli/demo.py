"""`world2act demo`: the main job, live, on this machine: segment, imagine and roll out, post-train, evaluate, report.

A client of the gateway like any other; it only also starts and stops the services, unless they run already. Everything
it shows is kept in `<run_dir>/record.json`, from which `report.html` is drawn.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule

from services.cli import report, work
from services.cli.client import CliError, Gateway
from services.cli.processes import bring_up, make_supervisor, stopping_signals
from services.cli.settings import CliSettings
from services.cli.supervisor import Supervisor, SupervisorError
from services.runtime.artifacts import ArtifactStore
from services.runtime.tensors import unpack_metadata
from world2act.console import terminal

TASKS = ("reach", "push", "pick-place", "drawer-open", "drawer-close", "button-press", "door-open")
SHOWN = ("pick-place", "drawer-open", "door-open")
"""Tasks whose imagined and executed videos the report shows; of other tasks, the first three."""
DEMOS_PER_TASK = 2
NAMES = {"metaworld": "Meta-World", "libero": "LIBERO", "robocasa": "RoboCasa"}
POSTTRAIN: dict[str, Any] = {"preset": "default", "mode": "asynchronous", "eta": 1}


@dataclass
class Demo:
    """One run: its console, the gateway, and the record that grows.

    tasks: names, or patterns until the demonstrations are collected; trials: scenes a task in the evaluation; posttrain: fields
    of the post-training request beside the tasks.
    """

    settings: CliSettings
    console: Console
    gateway: Gateway
    stop: threading.Event
    tasks: list[str]
    trials: int
    posttrain: dict[str, Any]
    record: dict[str, Any] = field(default_factory=lambda: {"cost": {}})

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A headed, timed part; the record is saved after it."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        self.console.print(Rule(name, align="left", style="cyan"))
        started = time.monotonic()
        yield
        self.record["cost"][name] = round(time.monotonic() - started, 1)
        path = Path(self.settings.run_dir) / "record.json"
        path.write_text(json.dumps(self.record))

    def job(self, kind: str, body: dict[str, Any], label: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Run a job to its end; its result and the events on the way. Ctrl-C cancels it."""
        job = self.gateway.submit(f"/{kind}", body)
        events: list[dict[str, Any]] = []
        say = work.round_line(self.console)

        def heard(name: str, data: dict[str, Any]) -> None:
            if self.stop.is_set():
                self.gateway.call("DELETE", f"/jobs/{job}")
                raise KeyboardInterrupt
            say(name, data)
            if name not in ("status", "end"):
                events.append({"name": name, **data})

        ended = self.gateway.follow(job, self.console, label, heard)
        return dict(ended["result"]), events


def collect(demo: Demo) -> Path:
    """Demonstrations of scenes that no training has seen, by the scripted experts. Patterns of tasks become the tasks' names."""
    folder = Path(demo.settings.run_dir) / "demos"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "services.simulator.collect", "--out", str(folder), "--split", "validation"]
    command += ["--simulator", demo.settings.simulator_name, "--episodes", str(DEMOS_PER_TASK), "--workers", "2"]
    if subprocess.run([*command, "--tasks", *demo.tasks], check=False).returncode:
        raise CliError("the scripted experts could not collect demonstrations; the lines above say why")
    found = [path.stem for path in sorted((folder / "validation").glob("*.hdf5"))]
    demo.tasks = list(dict.fromkeys(task for wanted in demo.tasks for task in fnmatch.filter(found, wanted)))
    return folder / "validation"


def segment(demo: Demo, folder: Path) -> None:
    """POST /segment with each file."""
    episodes = []
    for task in demo.tasks:
        found = work.segment(demo.gateway, demo.console, None, folder / f"{task}.hdf5", None)
        for e in found["episodes"]:
            cut = "; ".join(f"{s['prompt']} ({s['start']}-{s['end']})" for s in e["skills"])
            demo.console.print(f"{task} {e['demo']}: {cut or e['discarded']}")
        episodes += [{"task": task, **e} for e in found["episodes"]]
    episodes.sort(key=lambda e: -len(e["skills"]))
    demo.record["segmentation"] = episodes


def roll_out(demo: Demo) -> None:
    """POST /rollout: imagined and executed by the base policy, from the same initial states."""
    rollouts: list[dict[str, Any]] = []
    for task in [task for task in SHOWN if task in demo.tasks] or demo.tasks[:3]:
        body = {"task": task, "split": "posttrain", "indices": [0, 1], "mode": "both", "version": 0, "video": True}
        result, _ = demo.job("rollout", body, f"imagine and execute {task}")
        for r in result["rollouts"]:
            outcome = "success" if r["success"] else "no success"
            demo.console.print(f"{task} {r['index']}: imagined {', '.join(r['skills'])}; executed by the base policy: {outcome}")
        rollouts += result["rollouts"]
    demo.record["rollouts"] = rollouts


def post_train(demo: Demo) -> dict[str, Any]:
    """POST /posttrain: generation, execution and optimisation at the same time; no reward, no label."""
    result, events = demo.job("posttrain", {"tasks": demo.tasks, **POSTTRAIN, **demo.posttrain}, "post-train")
    work.show_posttrain(result, demo.console)
    demo.record["posttrain"] = {"result": result, "events": events}
    return result


def evaluate(demo: Demo, namespace: str) -> None:
    """POST /evaluate: base against post-trained on the evaluation split, matched initial states."""
    body = {"tasks": demo.tasks, "episodes": demo.trials, "namespace": namespace, "split": "evaluation"}
    result, _ = demo.job("evaluate", body, "evaluate base and post-trained policy")
    work.show_evaluation(result, demo.console)
    demo.record["evaluation"] = {"rows": result["rows"], "split": result["split"]}


def find_services(demo: Demo) -> None:
    """Services that somebody else started: all that the gateway needs must answer. Raises CliError naming what does not."""
    missing = demo.gateway.call("GET", "/status")["missing"]
    if missing:
        raise CliError("; ".join(f"{name} {reason}" for name, reason in missing.items()))
    demo.console.print(f"services answer; {demo.gateway.url} shows what happens")


def run_parts(demo: Demo, supervisor: Supervisor | None) -> None:
    """The parts in order."""
    with demo.part("start the services" if supervisor else "find the services"):
        if supervisor is None:
            find_services(demo)
        else:
            seconds = bring_up(supervisor, demo.console, demo.stop)
            demo.console.print(
                f"{len(supervisor.rows())} services ready after {seconds:.1f} s; {demo.gateway.url} shows what happens"
            )
    with demo.part("collect demonstrations"):
        folder = collect(demo)
    with demo.part("segment into skills"):
        segment(demo, folder)
    with demo.part("imagine and roll out"):
        roll_out(demo)
    with demo.part("post-train"):
        namespace = str(post_train(demo)["namespace"])
    with demo.part("evaluate"):
        evaluate(demo, namespace)


def shipped_stage1(zoo: Path) -> dict[str, Any]:
    """History and held-out metrics that the shipped adapters carry in their card."""
    card = json.loads(unpack_metadata((zoo / "adapters.safetensors").read_bytes())["world2act"]).get("card", {})
    return {"history": card.get("history", []), "metrics": card.get("metrics", {})}


def run(
    settings: CliSettings,
    out: Path = Path("report.html"),
    start: bool = True,
    tasks: Sequence[str] = TASKS,
    trials: int = 20,
    posttrain: Mapping[str, Any] | None = None,
) -> int:
    """The whole demo; the exit status. Every process that it started has ended when it returns. `start`: the services, too.

    tasks, trials, posttrain: see `Demo`.
    """
    console = terminal()
    supervisor = make_supervisor(settings) if start else None
    Path(settings.run_dir).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with stopping_signals() as stop, Gateway(settings) as gateway:
        demo = Demo(settings, console, gateway, stop, list(tasks), trials, dict(posttrain or {}))
        demo.record["stage1"] = shipped_stage1(Path(settings.zoo))
        try:
            run_parts(demo, supervisor)
        except (KeyboardInterrupt, CliError, SupervisorError) as error:
            if stop.is_set():
                console.print("interrupted; stopping the services" if supervisor else "interrupted")
                return 130
            console.print(f"[red]error:[/red] {error}", highlight=False)
            return 2
        finally:
            if supervisor is not None:
                supervisor.stop()
    minutes, simulator = (time.monotonic() - started) / 60, settings.simulator_name
    demo.record["about"] = (
        f"{NAMES.get(simulator, simulator)}, {len(demo.tasks)} tasks, embedded models, {minutes:.1f} minutes on this machine. "
        "Scenes of demonstrations, post-training and evaluation are disjoint."
    )
    path = Path(settings.run_dir) / "record.json"
    path.write_text(json.dumps(demo.record))
    report.write(path, out, ArtifactStore(settings.artifacts_url).get)
    console.print(f"{out} written; the whole took {minutes:.1f} minutes")
    return 0
