"""`world2act`: one command. It talks to the gateway, and starts services and trainings as processes; it imports none of them.

Errors are one line and exit code 2.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import ValidationError
from rich.console import Console
from tyro.conf import Positional, arg

from services.cli.client import CliError, Gateway
from services.cli.settings import CliSettings
from world2act.console import terminal

MODULES = {
    "demos": "services.simulator.collect",
    "build-skills": "services.cli.skills",
    "skills-report": "services.cli.skills_page",
    "train-worldmodel": "services.worldmodel.training",
    "evaluate-worldmodel": "services.worldmodel.evaluate",
    "train-base": "world2act.behaviour_cloning",
    "stage1": "services.worldmodel.stage1",
    "experiment": "experiments",
    "results": "experiments.results",
    "diagnose": "experiments.diagnose",
}
"""Commands that run another program of the project with the arguments that follow; each has its own --help."""

Split = Literal["base", "worldmodel", "validation", "posttrain", "tuning", "evaluation"]
Wait = Annotated[bool, arg(help="wait for the end and show the result; else print the job's id")]
console = terminal()


def up(detach: bool = False) -> None:
    """Start all services; they run until Ctrl-C, or with --detach in the background."""
    from services.cli import processes

    processes.up(CliSettings.load(), console, detach)


def down() -> None:
    """Stop the services of this run folder."""
    from services.cli import processes

    processes.down(CliSettings.load(), console)


def status() -> None:
    """Show processes, health, heartbeat ages and queue backlogs."""
    from services.cli import processes

    processes.status(CliSettings.load(), console)


def prometheus() -> None:
    """Serve a Prometheus on these services, with the project's alerts (/alerts), until Ctrl-C."""
    from services.cli import monitor

    monitor.run(CliSettings.load())


def segment(
    instruction: Positional[str | None] = None,
    file: Annotated[Path | None, arg(help="HDF5 demonstrations to upload")] = None,
    demo: Annotated[str | None, arg(help="one of them: demo_3, episode_000003, a clip's name; else all")] = None,
    planner: Annotated[Literal["rule", "llm"], arg(help="llm: by the segmenter's language model; else by schemas")] = "rule",
    episode: Annotated[str | None, arg(help="file or folder below the gateway's W2A_DATA_ROOT: HDF5, LeRobot, clips")] = None,
    embodiment: Annotated[
        str | None, arg(help="whose gripper calibration to use (schemas.json); else the data's robot's, or Meta-World's")
    ] = None,
    gripper: Annotated[
        tuple[int, ...], arg(help="LeRobot: columns of the state whose absolute values add up to the gripper's width in metres")
    ] = (),
) -> None:
    """Cut an instruction, an uploaded HDF5 file, or data in the gateway's data folder into skills."""
    from services.cli import work

    with Gateway(CliSettings.load()) as gateway:
        hand = {"embodiment": embodiment, "gripper": list(gripper) or None}
        work.show_segments(work.segment(gateway, console, instruction, file, demo, planner, episode, **hand), console)


def schemas(file: Path | None = None) -> None:
    """Check the task schemas, the shipped ones or those of --file: rows, calibrations, and that each suite's tasks are known."""
    from world2act.segmentation import check_suites, load_schemas

    table = load_schemas(file)
    for problem in (problems := check_suites(table)):
        console.print(problem, highlight=False)
    counts = ", ".join(f"{s.name} {len(s.instructions)}" for s in table.suites) or "none"
    console.print(f"{len(table.tasks)} rows, {len(table.calibrations)} calibrations; tasks of suites: {counts}", highlight=False)
    if problems:
        raise CliError(f"schemas: {len(problems)} instructions are known to no row")


def _job(kind: str, body: dict[str, Any], wait: bool) -> None:
    from services.cli import work

    if body.get("tasks") == []:
        raise CliError("tasks: name at least one")
    with Gateway(CliSettings.load()) as gateway:
        work.run_job(gateway, console, kind, body, wait)


def imagine(
    task: Positional[str],
    index: int = 0,
    split: Split = "posttrain",
    instruction: str | None = None,
    seed: int = 0,
    video: bool = True,
    wait: Wait = True,
) -> None:
    """Imagine a task, skill by skill, from an initial state."""
    body = {"task": task, "index": index, "split": split, "instruction": instruction, "seed": seed, "video": video}
    _job("imagine", body, wait)


def rollout(
    task: Positional[str],
    indices: tuple[int, ...] = (0,),
    split: Split = "posttrain",
    mode: Literal["imagine", "execute", "both"] = "both",
    namespace: str = "default",
    version: int = -1,
    seed: int = 0,
    video: bool = True,
    wait: Wait = True,
) -> None:
    """Imagine and execute a task from initial states. Version 0 is the base policy alone, -1 the newest."""
    body = {"task": task, "indices": list(indices), "split": split, "mode": mode, "namespace": namespace, "version": version}
    _job("rollout", body | {"seed": seed, "video": video}, wait)


def posttrain(
    tasks: Positional[tuple[str, ...]],
    preset: Literal["default", "paper"] = "default",
    mode: Literal["serial", "synchronous", "asynchronous"] = "asynchronous",
    eta: Annotated[int | None, arg(help="asynchronous: versions that the acting policy may be behind, >= 1")] = None,
    rounds: Annotated[int | None, arg(help="on-policy rounds after the first")] = None,
    episodes: Annotated[int | None, arg(help="initial states a task and round")] = None,
    steps: Annotated[int | None, arg(help="optimiser steps a round")] = None,
    seed: int = 0,
    namespace: Annotated[str | None, arg(help="where versions are published; else the job's id")] = None,
    watch: Wait = False,
) -> None:
    """Post-train the base policy on tasks, without rewards. What is left out comes from the preset."""
    body: dict[str, Any] = {"tasks": list(tasks), "preset": preset, "mode": mode, "eta": eta, "rounds": rounds}
    _job("posttrain", body | {"episodes": episodes, "steps": steps, "seed": seed, "namespace": namespace}, watch)


def evaluate(
    tasks: Positional[tuple[str, ...]],
    episodes: int = 20,
    first_index: int = 0,
    namespace: str | None = None,
    version: int = -1,
    split: Literal["evaluation", "tuning"] = "evaluation",
    wait: Wait = True,
) -> None:
    """Success of base and post-trained policy on the same held-out initial states. Without --namespace: the newest run's."""
    body = {"tasks": list(tasks), "episodes": episodes, "first_index": first_index, "namespace": namespace, "version": version}
    _job("evaluate", body | {"split": split}, wait)


def watch(job: Positional[str]) -> None:
    """Follow a job to its end and show its result."""
    from services.cli import work

    with Gateway(CliSettings.load()) as gateway:
        kind = gateway.call("GET", f"/jobs/{job}")["kind"]
        work.finish(gateway, console, kind, job)


def cancel(job: Positional[str]) -> None:
    """Stop a job."""
    with Gateway(CliSettings.load()) as gateway:
        console.print(f"job {job}: {gateway.call('DELETE', f'/jobs/{job}')['status']}")


def export(namespace: Positional[str | None] = None, version: int = -1, out: Path = Path("residual.safetensors")) -> None:
    """Write a residual bundle to a file. The namespace is a post-training job's id (else the newest's), -1 its newest version.

    Signed where W2A_SIGNING_KEY or W2A_SIGNING_KEY_FILE gives an Ed25519 key (openssl genpkey -algorithm ed25519).
    """
    from services.cli import work

    settings = CliSettings.load()
    with Gateway(settings) as gateway:
        work.export(gateway, console, namespace, version, out, settings.signing())


def import_bundle(file: Positional[Path], namespace: str = "default") -> None:
    """Register a residual bundle as the next version of a namespace. The policy server checks it and says what does not fit."""
    from services.cli import work

    with Gateway(CliSettings.load()) as gateway:
        work.import_bundle(gateway, console, file, namespace)


def report(record: Path | None = None, out: Path = Path("report.html")) -> None:
    """Draw report.html again from the record of the last `world2act demo`."""
    from services.runtime.artifacts import ArtifactStore

    settings = CliSettings.load()
    record = record or Path(settings.run_dir) / "record.json"
    if not record.is_file():
        raise CliError(f"record: {record} is not there; world2act demo writes it")
    importlib.import_module("services.cli.report").write(record, out, ArtifactStore(settings.artifacts_url).get)
    console.print(f"{out} written")


def demo(
    out: Path = Path("report.html"),
    start: bool = True,
    tasks: Annotated[tuple[str, ...], arg(help="tasks or patterns such as 'libero_object-*'; none: Meta-World's seven")] = (),
    trials: Annotated[int, arg(help="evaluation scenes a task")] = 20,
    episodes: Annotated[int | None, arg(help="post-training episodes a task and round; none: the preset's")] = None,
    rounds: Annotated[int | None, arg(help="on-policy rounds; none: the preset's")] = None,
) -> None:
    """The main job, live: segment, imagine, roll out, post-train, evaluate, report. --no-start: on services that run already.

    With W2A_SIMULATOR_NAME and W2A_ZOO, in another simulator with weights made for it.
    """
    module = importlib.import_module("services.cli.demo")
    asked = {name: value for name, value in (("episodes", episodes), ("rounds", rounds)) if value is not None}
    code = module.run(CliSettings.load(), out, start, tasks or module.TASKS, trials, asked)
    if code:
        raise SystemExit(code)


def _module(name: str) -> Callable[[], None]:
    def command() -> None:
        raise AssertionError("dispatched before")

    command.__doc__ = {
        "demos": "Collect demonstrations with the scripted experts. Own options: world2act demos --help.",
        "build-skills": "Cut demonstrations of any origin into a data set of skills. Own options: world2act build-skills --help.",
        "skills-report": "Gather built skill data sets into docs/skills.md. Own options: world2act skills-report --help.",
        "train-worldmodel": "Train the embedded world model, or with --backbone fine-tune a large one: --help.",
        "evaluate-worldmodel": "Quality of world models on held-out clips. Own options: world2act evaluate-worldmodel --help.",
        "train-base": "Train the base policy by behaviour cloning. Own options: world2act train-base --help.",
        "stage1": "Train the adapters (Stage 1), with --backbone on a large world model. Own options: world2act stage1 --help.",
        "experiment": "Measure: main, methods, worldmodel, objectives, adapters, ... Own options: world2act experiment --help.",
        "results": "Gather what experiments measured into docs/results.md. Own options: world2act results --help.",
        "diagnose": "Do targets know better than the base? Asks an expert, or --demos. Own options: world2act diagnose --help.",
    }[name]
    return command


COMMANDS: dict[str, Callable[..., None]] = {
    "up": up,
    "down": down,
    "status": status,
    "prometheus": prometheus,
    "demos": _module("demos"),
    "segment": segment,
    "schemas": schemas,
    "build-skills": _module("build-skills"),
    "skills-report": _module("skills-report"),
    "imagine": imagine,
    "rollout": rollout,
    "train-worldmodel": _module("train-worldmodel"),
    "evaluate-worldmodel": _module("evaluate-worldmodel"),
    "train-base": _module("train-base"),
    "stage1": _module("stage1"),
    "experiment": _module("experiment"),
    "results": _module("results"),
    "diagnose": _module("diagnose"),
    "posttrain": posttrain,
    "evaluate": evaluate,
    "watch": watch,
    "cancel": cancel,
    "report": report,
    "export": export,
    "import": import_bundle,
    "demo": demo,
}


def run_module(module: str, arguments: list[str]) -> int:
    """Another program of the project as a process of its own; its exit status."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the terminal sent it to the child too: it ends in its own way


def main(arguments: list[str] | None = None) -> int:
    """Console entry; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in MODULES:
        return run_module(MODULES[arguments[0]], arguments[1:])
    try:
        about = "Post-train a robot policy in the imagination of a world model."
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="world2act", args=arguments, description=about)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = "_".join(str(p) for p in first["loc"])
        return _complain(f"W2A_{name.upper()}: {first['msg']}")
    except (CliError, ValueError, OSError, RuntimeError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain("interrupted")
    return 0


def _complain(text: str) -> int:
    if os.environ.get("W2A_LOG_LEVEL", "").upper() == "DEBUG":
        Console(stderr=True).print_exception()
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
