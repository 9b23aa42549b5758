"""Demonstrations that a request names: a file or folder of any format that world2act/data reads, without images.

The data may be an upload, so the readers do not trust it: links that leave a file and values kept in other files are refused,
sizes are checked before anything is read. One episode is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from world2act.data.formats import FormatError, Skipped, Source, find_format, open_source
from world2act.splits import Split
from world2act.types import Episode


def open_episodes(path: Path, **options: Any) -> Source:
    """The source at `path`. Raises ValueError as `open_source`. Cutting trains nothing: any split will do for foreign data."""
    kind = find_format(path)
    return open_source(path, split=None if kind.own_split else Split.WORLDMODEL, format=kind.name, **options)


def read_episodes(source: Source, demo: str | None, limit: int) -> Iterator[tuple[str, Episode | Skipped]]:
    """(name, episode) of each episode, or of `demo`: its key, or its last part (demo_0). A `Skipped` says why it cannot be read.

    Names are keys, without the file where there is but one. Raises ValueError naming the field: none there, more than `limit`.
    """
    found = False
    first, last, number = "", "", 0
    for key in source.keys():  # noqa: SIM118  (a Source, no mapping)
        name = key.rpartition(":")[2] if source.path.is_file() else key
        first, last = first or name, name
        if demo is not None and demo not in (key, key.rpartition(":")[2]):
            continue
        found, number = True, number + 1
        if number > limit:
            raise ValueError(
                f"episode: holds more than {limit} demonstrations, the limit; name one, or use world2act build-skills"
            )
        try:
            yield name, source.read(key, images=False)
        except FormatError as error:
            yield name, Skipped(source.path.name, key, str(error))
    if not found and demo is not None and first:
        raise ValueError(f"demo: {demo[:60]!r} is not in it; it has {first} to {last}")
    if not found:
        raise ValueError("episode: holds no demonstration")
