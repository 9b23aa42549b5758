"""A real Prometheus on all services: after one small job every panel of every dashboard and every rule has data."""

from __future__ import annotations

import json
import math
import re
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli import monitor
from services.cli.client import Gateway
from services.cli.settings import CliSettings
from services.cli.specs import service_specs
from services.cli.supervisor import Supervisor
from services.runtime.messages import DEAD
from services.runtime.streams import connect
from tests.integration.test_posttrain_end_to_end import settings_on_free_ports
from tests.processes import free_port, wait_for
from tests.vla_server import make_zoo

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]


def panels() -> Iterator[tuple[str, str]]:
    """(dashboard / panel, PromQL) of what is committed, with Grafana's variable filled in."""
    for path in sorted((ROOT / "monitoring/grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.stem} / {panel['title']}", target["expr"].replace("$__range", "5m")


def rules() -> Iterator[tuple[str, str]]:
    """(name, PromQL). An alert's comparison answers 0 or 1 here, so that it answers while all is well."""
    for group in yaml.safe_load(monitor.RULES.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], re.sub(r" (==|>|<) ", r" \1 bool ", rule["expr"])


class Prometheus:
    """Its HTTP API."""

    def __init__(self, settings: CliSettings) -> None:
        self.url = f"http://{settings.host}:{settings.prometheus_port}"

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=5) as reply:
            return json.load(reply)["data"]

    def value(self, expression: str) -> list[float]:
        """The numbers that the query answers with; NaN is none."""
        found = [float(sample["value"][1]) for sample in self.get("query", query=expression)["result"]]
        return [value for value in found if not math.isnan(value)]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[tuple[Supervisor, CliSettings, Prometheus]]:
    try:
        monitor.find_program("prometheus")
    except ValueError as error:
        pytest.skip(str(error))
    (tmp_path / "zoo").mkdir()
    make_zoo(tmp_path / "zoo")
    settings = settings_on_free_ports(tmp_path).model_copy(update={"prometheus_port": free_port()})
    with (
        Supervisor(service_specs(settings), tmp_path / "run", start_timeout_s=300) as supervisor,
        subprocess.Popen(monitor.prometheus_command(settings, seconds=1)) as prometheus,
    ):
        try:
            yield supervisor, settings, Prometheus(settings)
        finally:
            prometheus.terminate()


def test_every_panel_and_rule_has_data(stack: tuple[Supervisor, CliSettings, Prometheus]) -> None:
    supervisor, settings, prometheus = stack
    services = {name for name in supervisor.services if name != "redis"}
    wait_for(lambda: len(prometheus.value("up == 1")) == len(services), 120, "every target is scraped")
    assert {target["labels"]["job"] for target in prometheus.get("targets")["activeTargets"]} == services

    with Gateway(settings) as gateway:
        jobs = [
            gateway.submit(
                "/rollout", {"task": "reach", "split": "evaluation", "indices": [0, 1], "mode": "execute", "video": False}
            ),
            gateway.submit("/posttrain", {"tasks": ["reach"], "rounds": 1, "episodes": 2, "steps": 20}),
        ]
        for job in jobs:
            wait_for(lambda j=job: gateway.call("GET", f"/jobs/{j}")["status"] == "succeeded", 300, f"job {job}")

    asked = [*panels(), *rules()]
    assert len(asked) > 60

    def empty() -> list[str]:
        return [name for name, expression in asked if not prometheus.value(expression)]

    if empty():
        wait_for(lambda: not empty(), 60, f"these answer too: {empty()}")
    firing = {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"}
    assert not firing - {"DiskLow", "DiskFills"}, "a healthy system is quiet; the disk is this machine's"

    connect(settings.redis_url).xadd(DEAD, {"json": "{}"})
    wait_for(lambda: bool(prometheus.value('ALERTS{alertname="DeadLetters"}')), 60, "a dead letter is an alert")
