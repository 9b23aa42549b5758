"""Names that come from outside, as places in a folder of this machine."""

from __future__ import annotations

from pathlib import Path


def below(root: Path, name: str, field: str, setting: str) -> Path:
    """What `name`, relative to `root`, means. ValueError naming `field` and `setting` when it leads out, also by a link."""
    top = root.resolve()
    try:
        path = (top / name).resolve()
    except (ValueError, OSError, RuntimeError):
        raise ValueError(f"{field}: is not a usable path") from None
    if not path.is_relative_to(top):
        raise ValueError(f"{field}: {name[:200]!r} lies outside the data folder ({setting})")
    return path
