"""`python -m monitoring.build` writes what is generated: dashboards, Compose's Prometheus configuration, Kubernetes' rules.

A test keeps the files equal to what this makes.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from monitoring import dashboards
from services.cli.monitor import RULES, scrape_config
from services.cli.settings import CliSettings
from services.runtime.settings import METRICS_PORTS

ROOT = Path(__file__).parents[1]
HEAD = "# Made by `python -m monitoring.build`; a test keeps it current.\n"


def compose_targets() -> dict[str, str]:
    """Service -> host:port inside Compose's network, where a service's name is its host."""
    triton = CliSettings.model_fields["triton_metrics_port"].default
    return {"triton": f"triton:{triton}", **{service: f"{service}:{port}" for service, port in METRICS_PORTS.items()}}


def compose_prometheus() -> str:
    """prometheus.yml; a scaled service is found by its name's addresses, each of which is an instance."""
    config = scrape_config(compose_targets(), "rules/*.yml")
    for job in config["scrape_configs"]:
        if job["job_name"] == "simulator":
            host, port = job.pop("static_configs")[0]["targets"][0].split(":")
            job["dns_sd_configs"] = [{"names": [host], "type": "A", "port": int(port)}]
    return HEAD + yaml.safe_dump(config, sort_keys=False, width=130)


def kubernetes_rules() -> str:
    """The same rules as a PrometheusRule, which the operator reads."""
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "world2act"},
        "spec": yaml.safe_load(RULES.read_text()),
    }
    return HEAD + yaml.safe_dump(rule, sort_keys=False, width=130)


def files() -> dict[Path, str]:
    """Path -> content of all that is generated."""
    found = {ROOT / "monitoring/grafana/dashboards" / f"{name}.json": dashboards.render(name) for name in dashboards.DASHBOARDS}
    found[ROOT / "monitoring/prometheus.yml"] = compose_prometheus()
    found[ROOT / "k8s/components/monitoring/rules.yaml"] = kubernetes_rules()
    return found


if __name__ == "__main__":
    for path, content in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        print(path.relative_to(ROOT))
