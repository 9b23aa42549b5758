"""Progress of long work: a callback that the trainings call, and its display as bars (terminal) or lines (log). And what a
command says where its user asked for what cannot be."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called with the name of a part, steps done, steps in all, current values."""

LINE_SECONDS = 15.0
SHOWN = 12
"""Bars that stay when they are full; later ones disappear."""


def terminal() -> Console:
    """As wide as the terminal; in a pipe or a log 160 columns, where rich would squeeze tables into 80."""
    return Console(width=None if sys.stdout.isatty() else 160)


def status(work: Callable[[], object]) -> int:
    """Exit status of `work`: 0, or 2 after one line of why on standard error for ValueError and OSError."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def command_line(program: str, settings: Any) -> str:
    """What gives `settings`, a dataclass of the options of `program`: all that are not the default, and the seed. Of a path from
    the root only its name is told."""
    return shlex.join([*program.split(), *_options(settings, "--")])


def _options(settings: Any, prefix: str) -> list[str]:
    words: list[str] = []
    for option in fields(settings):
        value, name = getattr(settings, option.name), option.name.replace("_", "-")
        if name != "seed" and value == (option.default if option.default_factory is MISSING else option.default_factory()):
            continue
        if is_dataclass(value):
            words += _options(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            words.append(f"{prefix}{'' if value else 'no-'}{name}")
        else:
            told = value.name if isinstance(value, Path) and value.is_absolute() else value
            words += [prefix + name, *map(str, told if isinstance(told, tuple) else (told,))]
    return words


def no_progress(part: str, done: int, total: int, values: dict[str, float]) -> None:
    """The silent Progress."""


def _text(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


@contextmanager
def progress_display() -> Iterator[Progress]:
    """Bars on a terminal; elsewhere a line every 15 s and at the end of each part."""
    if not sys.stdout.isatty():
        last: dict[str, float] = {}

        def line(part: str, done: int, total: int, values: dict[str, float]) -> None:
            if done == total or time.monotonic() - last.get(part, 0.0) > LINE_SECONDS:
                last[part] = time.monotonic()
                print(f"{time.strftime('%H:%M:%S')} {part} {done}/{total}  {_text(values)}", flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("{task.fields[values]}")) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(part: str, done: int, total: int, values: dict[str, float]) -> None:
            if part not in tasks:
                tasks[part] = bars.add_task(part, total=total, values="")
            full = done >= total and len(tasks) > SHOWN
            bars.update(tasks[part], completed=done, total=total, values=_text(values), visible=not full)

        yield bar
