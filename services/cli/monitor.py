"""`world2act prometheus`: a Prometheus on the services that `world2act up` started, with the rules of monitoring/."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from services.cli.settings import CliSettings
from services.cli.specs import metrics_targets

RULES = Path(__file__).parents[2] / "monitoring" / "rules" / "world2act.yml"
SCRAPE_SECONDS = 15


def scrape_config(targets: Mapping[str, str], rules: str, seconds: int = SCRAPE_SECONDS) -> dict[str, Any]:
    """Prometheus' configuration: one job a service, named as the service. `targets`: service -> host:port."""
    return {
        "global": {"scrape_interval": f"{seconds}s", "evaluation_interval": f"{seconds}s"},
        "rule_files": [rules],
        "scrape_configs": [
            {"job_name": service, "static_configs": [{"targets": [address]}]} for service, address in targets.items()
        ],
    }


def find_program(name: str) -> str:
    """A program beside this Python or on PATH. Raises ValueError that says how to get it."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ValueError(f"{name} is not installed: scripts/setup.sh dev fetches it where apt can, or apt-get install prometheus")
    return found


def prometheus_command(settings: CliSettings, seconds: int = SCRAPE_SECONDS) -> list[str]:
    """Write the configuration into the run folder; the command line that serves it."""
    program = find_program("prometheus")
    if not RULES.is_file():
        raise ValueError(f"{RULES} is not there: world2act prometheus needs the repository that it was installed from")
    folder = settings.run_dir.resolve() / "prometheus"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prometheus.yml"  # JSON is YAML
    path.write_text(json.dumps(scrape_config(metrics_targets(settings), str(RULES), seconds), indent=2) + "\n")
    options = {
        "config.file": str(path),
        "storage.tsdb.path": str(folder / "data"),
        "storage.tsdb.retention.time": "7d",
        "web.listen-address": f"{settings.host}:{settings.prometheus_port}",
        "log.level": "warn",
    }
    return [program, *(f"--{name}={value}" for name, value in options.items())]


def run(settings: CliSettings) -> NoReturn:
    """Become Prometheus, until Ctrl-C."""
    command = prometheus_command(settings)
    print(f"http://{settings.host}:{settings.prometheus_port}/alerts; Ctrl-C stops it", flush=True)
    os.execv(command[0], command)
