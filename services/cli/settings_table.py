"""docs/settings.md and .env.example from the settings classes.

`python -m services.cli.settings_table > docs/settings.md`; `python -m services.cli.settings_table env > .env.example`.
It reads every services/*/settings.py by file, so a new service appears without an edit here. A test keeps both files current.
"""

from __future__ import annotations

import importlib
import re
import sys
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


ENV_HEAD = """# Settings of docker-compose.yml: cp .env.example .env, and take the # off what you change.
# Made by `python -m services.cli.settings_table env > .env.example`; a test keeps it current.
# Compose fixes addresses and folders inside its containers: those settings (docs/settings.md has all) are not here.

# -- Compose itself: what runs, and the images' bases ----------------------------------------------------------------------
# monitoring: Prometheus and Grafana. gpu: Triton on a GPU (then also TRITON_CPU=0).
COMPOSE_PROFILES=monitoring
#TRITON_CPU=1
#SIMULATORS=1
# Folder of demonstrations for {"episode": ...} and stage1 jobs; default: a volume.
#DATA=./data
#GRAFANA_PORT=3000
#GRAFANA_PASSWORD=
#PYTHON_IMAGE=python:3.11-slim-bookworm
#TRITON_IMAGE=nvcr.io/nvidia/tritonserver:24.10-py3
# Where pip finds the CPU build of torch; empty: the CUDA build.
#TORCH_INDEX=https://download.pytorch.org/whl/cpu
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
        parts.append(f"\n## {title[0].upper() + title[1:]}\n\n{COLUMNS}")
        parts += [row(name, field) for name, field in own.items()]
    ports = ", ".join(f"{name} {port}" for name, port in METRICS_PORTS.items())
    parts.append(f"\nDefault metrics ports (`W2A_METRICS_PORT`): {ports}.\n")
    return "\n".join(parts)


def render_env(compose: str) -> str:
    """.env.example: every setting that the Compose file `compose` hands on, with its default and meaning."""
    handed_on = set(re.findall(r"^ +(W2A_\w+):$|\$\{(W2A_\w+)", compose, re.MULTILINE))
    names = {name for pair in handed_on for name in pair if name}
    parts = [ENV_HEAD]
    seen: set[str] = set()
    for owner, kind in classes().items():
        own = {
            f"W2A_{n.upper()}": f
            for n, f in kind.model_fields.items()
            if kind is CommonSettings or n not in CommonSettings.model_fields
        }
        own = {name: field for name, field in own.items() if name in names - seen}
        seen |= set(own)
        if own:
            parts.append(f"\n# -- {owner} ".ljust(122, "-"))
        for name, field in own.items():
            notes = "; ".join(filter(None, [field.description or name[4:].lower().replace("_", " "), limits(field)]))
            value = field.default
            text = (
                "" if value is None or isinstance(value, SecretStr) else str(value).lower() if isinstance(value, bool) else value
            )
            parts.append(f"# {notes}\n#{name}={text}")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["env"]:
        print(render_env((ROOT.parent / "docker-compose.yml").read_text()), end="")
    else:
        print(render(), end="")
