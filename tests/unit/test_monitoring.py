"""Rules, dashboards and configurations without a running system; tests/integration/test_monitoring.py asks them of one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitoring import build, dashboards
from services.cli import monitor
from services.cli.settings import CliSettings
from services.cli.specs import metrics_targets, service_specs
from services.gateway.doors import Doors
from services.gateway.settings import GatewaySettings
from services.gateway.state import State
from services.runtime.messages import RolloutResult
from services.runtime.telemetry import ProcessTree
from services.trainer import metrics
from services.trainer.collector import Collector
from services.trainer.flow import Flow
from tests.processes import free_port
from world2act.schedule import EpisodeSpec, StalenessManager

ROOT = Path(__file__).resolve().parents[2]
ALERTS = [
    rule["alert"] for group in yaml.safe_load(monitor.RULES.read_text())["groups"] for rule in group["rules"] if "alert" in rule
]


def promtool(*arguments: str) -> str:
    """Run promtool in the repository's root; its output. Skips where it is not installed."""
    try:
        program = monitor.find_program("promtool")
    except ValueError as error:
        pytest.skip(str(error))
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", build.files(), ids=lambda p: p.name)
def test_generated_files_are_current(path: Path) -> None:
    assert path.read_text() == build.files()[path], "run: python -m monitoring.build"


def test_promtool_accepts_rules_and_configurations(tmp_path: Path) -> None:
    assert "SUCCESS" in promtool("check", "rules", str(monitor.RULES))
    assert "SUCCESS" in promtool("check", "config", "monitoring/prometheus.yml")
    settings = CliSettings(run_dir=tmp_path)
    monitor.prometheus_command(settings)
    assert "SUCCESS" in promtool("check", "config", str(tmp_path / "prometheus/prometheus.yml"))


def test_alerts_fire_and_keep_quiet_as_their_unit_tests_say() -> None:
    assert "SUCCESS" in promtool("test", "rules", "monitoring/tests/alerts.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_is_tested_and_has_its_section_in_the_runbook(alert: str) -> None:
    cases = [
        case for t in yaml.safe_load((ROOT / "monitoring/tests/alerts.yml").read_text())["tests"] for case in t["alert_rule_test"]
    ]
    mine = [bool(case.get("exp_alerts")) for case in cases if case["alertname"] == alert]
    assert True in mine and False in mine, "a case that fires and one that does not"
    assert re.search(rf"^### {alert}$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)


def test_processes_and_compose_have_the_same_targets(tmp_path: Path) -> None:
    settings = CliSettings(run_dir=tmp_path)
    processes = metrics_targets(settings)
    assert list(processes) == list(build.compose_targets())
    specs = {spec.name: spec for spec in service_specs(settings)}
    assert set(processes) == set(specs) - {"redis"}
    assert all(int(address.rsplit(":", 1)[1]) in specs[name].ports for name, address in processes.items())
    up = next(
        r for g in yaml.safe_load(monitor.RULES.read_text())["groups"] for r in g["rules"] if r.get("alert") == "TargetDown"
    )
    assert set(re.findall(r"\w+", up["expr"].split('"')[1])) == set(processes)


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_dashboard_is_whole(name: str) -> None:
    board: dict[str, Any] = json.loads((ROOT / f"monitoring/grafana/dashboards/{name}.json").read_text())
    assert board["uid"] == f"w2a-{name}" and len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        assert panel["title"] and panel["targets"] and all(t["datasource"]["uid"] == "prometheus" for t in panel["targets"])
    row: dict[int, int] = {}
    for place in (panel["gridPos"] for panel in board["panels"]):
        row[place["y"]] = row.get(place["y"], 0) + place["w"]
    assert all(width == 24 for width in row.values()), "rows are full"


def test_missing_prometheus_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(monitor.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"prometheus is not installed: scripts/setup\.sh dev"):
        monitor.prometheus_command(CliSettings(run_dir=tmp_path))
    assert not list(tmp_path.iterdir())


def test_redis_that_is_away_is_a_metric_and_no_error(tmp_path: Path) -> None:
    settings = GatewaySettings(redis_url=f"redis://127.0.0.1:{free_port()}/0", artifacts_url=f"file://{tmp_path}/artifacts")
    found = {metric.name: [sample.value for sample in metric.samples] for metric in State(Doors(settings)).collect()}
    assert found.pop("w2a_redis_up") == [0]
    assert set(found) == {"w2a_artifacts_disk_free_bytes", "w2a_artifacts_disk_size_bytes"}


def test_cpu_of_children_counts_while_they_live_and_after() -> None:
    def seconds() -> float:
        return float(next(ProcessTree().collect()).samples[0].value)

    before = seconds()
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "\n"
        alive = seconds()
        child.communicate("\n")
    assert before + 0.4 < alive <= seconds()


def test_episode_of_too_old_a_policy_is_counted() -> None:
    spec = EpisodeSpec(round=3, key="ab", task="reach", index=0, noise=0.0)
    collector = object.__new__(Collector)
    collector.flow = Flow([spec], StalenessManager(1), limit=1)
    collector.flow.admit(version=3)
    before = metrics.TOO_STALE._value.get()
    collector._executed(RolloutResult(id="ab", job="j", task="reach", split="posttrain", index=0, round=3, version=1))
    assert metrics.TOO_STALE._value.get() == before + 1
