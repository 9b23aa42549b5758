"""Record demonstrations with a simulator's scripted experts: `python -m services.simulator.collect --out DIR --split worldmodel`.

A plain episode follows the expert; one that fails is dropped and counted. A perturbed episode begins with up to five chunks
of wandering: random motion, hand open or closed. Then the expert takes over, with random xyz offsets, each held for one to
three chunks, on 40 % of its chunks on average, which in half of the cases force the gripper open or closed: states off the
expert's path, dropped and missed objects, and the way back are seen too. The action recorded is the action executed, marked
as not intended while wandering or offset, and the episode is kept whether or not it succeeds. An
episode ends AFTER_SUCCESS chunks after success, in whole chunks, or at the task's limit: what a solved task looks like is
seen too, since policies go on there. Scene i is the same scene for ever (world2act.splits), and scene i is perturbed or
plain whatever --episodes is, so a longer collection extends a shorter one (--resume).
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from services.simulator.envs import base
from world2act.data.robomimic import EpisodeWriter
from world2act.splits import Split, scene_seed
from world2act.types import Episode

MOST_ATTEMPTS = 4  # scenes tried for each episode wanted, before an expert is declared broken
LONGEST_WANDER = 5  # chunks
OFFSET_CHANCE = 0.4  # of a perturbed episode's spans after it, those that get an offset
LONGEST_SPAN = 3  # chunks
AFTER_SUCCESS = 4  # chunks


@dataclass
class CollectSettings:
    """Collect demonstrations with the scripted experts, in parallel over tasks, as robomimic HDF5 files."""

    out: Path
    """Folder; files are <out>/<split>/<task>.hdf5."""
    split: tyro.conf.EnumChoicesFromValues[Split] = Split.WORLDMODEL
    """Whose scenes to use."""
    tasks: tuple[str, ...] = ()
    """Tasks, or patterns such as 'libero_object-*'; none: all that the simulator has."""
    episodes: Annotated[int, tyro.conf.arg(metavar="N")] = 100
    """Episodes to keep per task."""
    perturbed_share: float = 0.0
    """Share of scenes whose expert is perturbed, 0 to 1."""
    noise: float = 0.6
    """Standard deviation of a perturbed span's xyz offset, in action units; of every other one on average, twice that."""
    camera_every: int = 1
    """Draw a frame after every that many actions; those between repeat it, as a slow camera's do. 4 in LIBERO: half the time."""
    workers: int = 2
    """Processes."""
    simulator: str = "metaworld"
    """Simulator."""
    resume: bool = False
    """Go on with existing files."""


@dataclass
class Tally:
    """What became of one task's scenes."""

    task: str
    written: int = 0
    existing: int = 0
    plain: int = 0
    plain_failed: int = 0
    perturbed: int = 0
    perturbed_failed: int = 0


def is_perturbed(index: int, share: float) -> bool:
    """Whether scene `index` is perturbed; spread evenly, so that any prefix of scenes has close to `share` of them."""
    return int((index + 1) * share + 1e-9) > int(index * share + 1e-9)


def record(env: base.Environment, task: str, split: Split, index: int, noise: float = 0.0, camera_every: int = 1) -> Episode:
    """One episode of the expert in scene (split, index). noise > 0 perturbs: xyz offsets of that spread or twice it."""
    spec = env.spec
    seed = scene_seed(split, index)
    rng = np.random.default_rng([seed, *task.encode()])  # the seed alone would give all tasks the same offsets
    gripper = [axis.name == "gripper" for axis in spec.action]
    observation = env.reset(task, seed)
    images = {name: [image] for name, image in observation.images.items()}
    states, actions, known = [observation.state], [], [truth(env)]
    intended: list[bool] = []
    wander = int(rng.integers(0, LONGEST_WANDER + 1)) if noise > 0 else 0
    success, after, left = False, 0, 0
    for chunk in range(spec.task(task).max_chunks):
        wandering = chunk < wander
        if left == 0:
            left, offset = int(rng.integers(1, LONGEST_SPAN + 1)), np.zeros(len(spec.action), np.float32)
            if wandering:
                left = min(left, wander - chunk)
                offset[:3] = rng.normal(0.0, 1.0, 3)
                offset[gripper] = rng.choice((-1.0, 1.0))
            elif noise > 0 and rng.random() < OFFSET_CHANCE:
                offset[:3] = rng.normal(0.0, noise * rng.integers(1, 3), 3)
                offset[gripper] = rng.choice((-2.0, 0.0, 0.0, 2.0))
        left -= 1
        for _ in range(spec.chunk):
            wanted = np.zeros_like(offset) if wandering else env.expert_action()
            action = np.clip(wanted + offset, -1.0, 1.0).astype(np.float32)
            actions.append(action)
            result = env.step(action[None], "none" if len(actions) % camera_every else "last")
            intended.append(not offset.any())
            states.append(result.states[0])
            known.append(truth(env))
            for name, frames in result.images.items():
                images[name].append(frames[0] if len(frames) else images[name][-1])
            success = result.success
        after += success
        if after > AFTER_SUCCESS:
            break
    stacked = np.stack(states)
    return Episode(
        task=task,
        split=split.value,
        index=index,
        instruction=observation.instruction,
        images={name: np.stack(frames) for name, frames in images.items()},
        states=stacked,
        widths=stacked[:, spec.gripper_width_index],
        actions=np.stack(actions),
        success=success,
        intended=np.array(intended),
        truth={name: np.array([moment[name] for moment in known], np.float32) for name in known[0]} or None,
    )


def truth(env: base.Environment) -> dict[str, float]:
    """`Environment.truth`, or nothing from a simulator that does not tell."""
    return {} if type(env).truth is base.Environment.truth else env.truth()


def collect_task(env: base.Environment, task: str, settings: CollectSettings) -> Iterator[Tally]:
    """Write one task's file; yields the tally after every scene. Raises RuntimeError when the expert fails nearly always."""
    path = settings.out / settings.split.value / f"{task}.hdf5"
    tally = Tally(task)
    with EpisodeWriter(
        path, split=settings.split, env_args=env.spec.env_args(task, settings.camera_every), resume=settings.resume
    ) as writer:
        tally.existing = tally.written = len(writer.indices)
        start = max(writer.indices, default=-1) + 1
        wanted = settings.episodes - tally.written
        for index in range(start, start + MOST_ATTEMPTS * max(wanted, 0)):
            if tally.written >= settings.episodes:
                break
            perturbed = is_perturbed(index, settings.perturbed_share)
            episode = record(env, task, settings.split, index, settings.noise if perturbed else 0.0, settings.camera_every)
            if perturbed:
                tally.perturbed += 1
                tally.perturbed_failed += not episode.success
            else:
                tally.plain += 1
                tally.plain_failed += not episode.success
            if perturbed or episode.success:
                writer.write(episode, perturbed=perturbed)
                tally.written += 1
            yield tally
        if tally.written < settings.episodes:
            raise RuntimeError(
                f"{task}: only {tally.written} of {settings.episodes} episodes after {start + MOST_ATTEMPTS * wanted} scenes"
            )
    yield tally


def work(connection: Connection, settings: CollectSettings) -> None:
    """A worker process: receives task names, sends tallies and errors as JSON, until an empty name."""
    env = base.make(settings.simulator)
    try:
        while task := connection.recv_bytes().decode():
            try:
                for tally in collect_task(env, task, settings):
                    connection.send_bytes(json.dumps({"tally": asdict(tally)}).encode())
                connection.send_bytes(json.dumps({"finished": task}).encode())
            except (RuntimeError, ValueError, OSError) as error:
                connection.send_bytes(json.dumps({"error": f"{task}: {error}"}).encode())
    except EOFError:
        pass  # the parent is gone
    finally:
        env.close()


def collect(settings: CollectSettings, console: Console | None = None) -> list[Tally]:
    """Collect all tasks; returns their tallies. Raises ValueError for bad settings, RuntimeError when a task or worker failed."""
    probe = base.make(settings.simulator)
    tasks = base.matching_tasks(probe.spec, settings.tasks)
    probe.close()
    for name, value, low, high in (
        ("episodes", settings.episodes, 1, 100_000),
        ("perturbed_share", settings.perturbed_share, 0, 1),
        ("noise", settings.noise, 0, 2),
        ("camera_every", settings.camera_every, 1, probe.spec.chunk),
        ("workers", settings.workers, 1, 64),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name}: {value} is outside [{low}, {high}]")
    if probe.spec.chunk % settings.camera_every:
        raise ValueError(f"camera_every: {settings.camera_every} must divide the {probe.spec.chunk} actions of a chunk")
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        bars = {task: progress.add_task(task, total=settings.episodes, start=False) for task in tasks}
        return run_workers(tasks, settings, progress, bars)


def run_workers(tasks: list[str], settings: CollectSettings, progress: Progress, bars: dict[str, TaskID]) -> list[Tally]:
    """Hand tasks to spawned workers, first come, first served; stops all workers whatever happens."""
    context = multiprocessing.get_context("spawn")
    queue, tallies, errors = list(tasks), {task: Tally(task) for task in tasks}, []
    processes, connections = [], []
    try:
        for _ in range(min(settings.workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, settings), daemon=True)
            process.start()
            theirs.close()
            ours.send_bytes(queue.pop(0).encode())
            processes.append(process)
            connections.append(ours)
        while connections:
            for connection in cast(list[Connection], wait(connections)):
                try:
                    message = json.loads(connection.recv_bytes())
                except EOFError:
                    connections.remove(connection)
                    errors.append("a worker process died")
                    continue
                if "tally" in message:
                    tally = Tally(**message["tally"])
                    tallies[tally.task] = tally
                    progress.start_task(bars[tally.task])
                    progress.update(bars[tally.task], completed=tally.written)
                    continue
                errors += [message["error"]] if "error" in message else []
                if queue:
                    connection.send_bytes(queue.pop(0).encode())
                else:
                    connection.send_bytes(b"")  # the worker ends
                    connections.remove(connection)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join(10)
    if errors:
        raise RuntimeError("; ".join(errors))
    return list(tallies.values())


def print_tallies(tallies: list[Tally], console: Console) -> None:
    """Success of the experts per task, and what was kept."""
    table = Table(title="Scripted experts")
    for column in ("task", "episodes", "expert success", "perturbed success"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for t in tallies:
        table.add_row(
            t.task,
            str(t.written),
            f"{t.plain - t.plain_failed}/{t.plain}",
            f"{t.perturbed - t.perturbed_failed}/{t.perturbed}",
        )
    console.print(table)


def main() -> int:
    """Console entry."""
    settings = tyro.cli(CollectSettings, prog="world2act demos")
    console = Console()
    try:
        print_tallies(collect(settings), console)
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"[red]error:[/red] {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
