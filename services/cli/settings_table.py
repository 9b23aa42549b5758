"""docs/settings.md from the settings classes: `python -m services.cli.settings_table > docs/settings.md`.

It reads every services/*/settings.py by file, so a new service appears without an edit here. A test keeps the file current.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from services.runtime.settings import METRICS_PORTS, CommonSettings

ROOT = Path(__file__).parents[1]
SHARED = CommonSettings.__module__
COLUMNS = "| variable | type | default | limits | meaning |\n|---|---|---|---|---|"
HEAD = """# Settings

Made by `python -m services.cli.settings_table > docs/settings.md` from the settings classes; a test keeps it current.

Every setting is an environment variable. `W2A_ENV_FILE` names a file of `NAME=value` lines that stands in where a variable is
not set. A value out of range ends a program with one line that names it.
"""


def classes() -> dict[str, type[CommonSettings]]:
    """Owner -> settings class, the shared one first."""
    found: dict[str, type[CommonSettings]] = {"every service": CommonSettings}
    for path in sorted(ROOT.glob("*/settings.py")):
        module = importlib.import_module(f"services.{path.parent.name}.settings")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, CommonSettings) and value.__module__ == module.__name__ != SHARED:
                found[path.parent.name] = value
    return found


def limits(field: Any) -> str:
    """A field's bounds, such as ">= 1, <= 64"."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}
    return ", ".join(f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in signs.items() if hasattr(m, name))


def row(name: str, field: Any) -> str:
    """One line of the table."""
    default = field.default
    if default is PydanticUndefined:
        text = "required"
    elif isinstance(default, SecretStr):
        text = ""
    else:
        text = "" if default in ("", None) else f"`{default}`"
    kind = getattr(field.annotation, "__name__", str(field.annotation)).replace("SecretStr", "secret")
    kind = "Path" if "Path" in str(field.annotation) else kind
    cells = (f"`W2A_{name.upper()}`", kind, text, limits(field), field.description or name.replace("_", " "))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for owner, kind in classes().items():
        own = {n: f for n, f in kind.model_fields.items() if kind is CommonSettings or n not in CommonSettings.model_fields}
        title = {"cli": "`world2act` (command line and supervisor)"}.get(owner, owner)
        parts.append(
            f"\n## {title[0].upper() + title[1:]}\n\n| variable | type | default | limits | meaning |\n|---|---|---|---|---|"
        )
        parts += [row(name, field) for name, field in own.items()]
    ports = ", ".join(f"{name} {port}" for name, port in METRICS_PORTS.items())
    parts.append(f"\nDefault metrics ports (`W2A_METRICS_PORT`): {ports}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(render(), end="")
