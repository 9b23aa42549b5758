"""Stand-in packages put before the real ones for a while."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDERS = {"robocasa": "robocasa_v0", "robocasa365": "robocasa_v1"}


def folder(simulator: str) -> Path:
    """What goes on PYTHONPATH."""
    return Path(__file__).parent / FOLDERS[simulator]


@contextmanager
def installed(simulator: str) -> Iterator[None]:
    """The packages of `simulator` can be imported inside; those that were imported before come back after."""

    def ours(name: str) -> bool:
        return name.partition(".")[0] in ("robocasa", "robosuite")

    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    sys.path.insert(0, str(folder(simulator)))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder(simulator)))
        for name in list(sys.modules):
            if ours(name):
                del sys.modules[name]
        sys.modules.update(kept)
