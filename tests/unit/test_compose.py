"""Dockerfile, docker-compose.yml and .env.example, without an engine: they agree with each other and with the settings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli import settings_table
from services.runtime.settings import METRICS_PORTS, CommonSettings
from world2act import __version__

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CLASS_OF = {"triton": "worldmodel", "triton-gpu": "worldmodel", "rollout": "trainer", "demo": "cli"}
"""Service -> owner of its settings class, where the names differ."""

FIXED = {name for name in CommonSettings.model_fields if name not in ("log_level", "log_json", "torch_threads")}
"""What containers must not choose themselves: addresses, ports and folders."""

BACKBONE = {n for n in settings_table.classes()["worldmodel"].model_fields if n.startswith("backbone")} | {"guardrail"}
ELSEWHERE = {
    "triton": {"imagine_batch", "imagine_timeout", "video_fps", "triton_root"},  # the worker's; the image says where Triton is
    "worldmodel": {*BACKBONE, "triton_root"},
    "vla": {
        f"vla_{n}"
        for n in ("door_host", "door_layout", "door_namespace", "door_token", "door_version", "openpi_port", "gr00t_port")
    },
    "gateway": {"data_root"},
    "segmenter": {"data_root"},
    "trainer": {"data_root"},
    "simulator": {
        "libero_assets",
        "libero_image_size",
        "libero_effects",
        "robocasa_image_size",
    },  # the image has Meta-World alone
    "demo": {
        "gateway_token",
        "port_offset",
        "start_timeout_s",
        "signing_key",
        "signing_key_file",
        "prometheus_port",
        "simulator_name",
        "vla_openpi_port",
        "vla_gr00t_port",
    },
}
"""Settings of a class that its container neither needs nor may change."""


def image_user(target: str) -> str:
    """The user that a target of the Dockerfile ends with."""
    stages = {m[2]: (m[1], m[3]) for m in re.finditer(r"^FROM (\S+) AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)}
    users: list[str] = []
    while not users and target in stages:
        target, body = stages[target]
        users = re.findall(r"^USER (\S+)", body, re.M)
    return users[-1] if users else "root"


def test_dockerfiles_pass_hadolint() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    files = [ROOT / "Dockerfile", ROOT / "tests/containers/lookalike.Dockerfile"]
    done = subprocess.run([linter, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout, done.stdout


@pytest.mark.parametrize("profile", ["", "monitoring", "gpu", "demo"])
def test_compose_accepts_the_file(profile: str) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker-compose.yml not validated: no Compose v2 here; as root run scripts/engine.sh")
    command = [docker, "compose", *(["--profile", profile] if profile else []), "config", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_env_example_is_current() -> None:
    fresh = settings_table.render_env((ROOT / "docker-compose.yml").read_text())
    assert (ROOT / ".env.example").read_text() == fresh, "run: python -m services.cli.settings_table env > .env.example"


def test_env_example_has_every_variable_of_the_compose_file() -> None:
    compose = re.sub(r"#.*", "", (ROOT / "docker-compose.yml").read_text())
    used = set(re.findall(r"\$\{(\w+)", compose)) | set(re.findall(r"^ +(W2A_\w+):\s*$", compose, re.M))
    named = re.findall(r"^#?([A-Z]\w+)=", (ROOT / ".env.example").read_text(), re.M)
    assert len(named) == len(set(named))
    assert set(named) - {"COMPOSE_PROFILES"} == used


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_container_gets_every_setting_of_its_service_and_no_other(name: str) -> None:
    owner = CLASS_OF.get(name, name)
    fields = set(settings_table.classes()[owner].model_fields)
    given = {variable.removeprefix("W2A_").lower() for variable in OURS[name]["environment"]}
    assert given <= fields, f"{name} has no setting {given - fields}"
    missing = fields - given - FIXED - ELSEWHERE.get(name.removesuffix("-gpu"), ELSEWHERE.get(owner, set()))
    assert not missing, f"{name} cannot be told {missing}"


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_containers_are_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    limits = service["deploy"]["resources"]["limits"]
    assert limits["cpus"] and limits["memory"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert bool(service.get("ports")) == (name in ("gateway", "grafana")), "nothing else is published"
    assert "inside" in service["networks"]
    if name in OURS:
        assert image_user(service["build"]["target"]) == "10001:10001"
    if name != "demo":
        assert "healthcheck" in service or "HEALTHCHECK --" in _stage(service["build"]["target"])
    for needed, how in service.get("depends_on", {}).items():
        assert needed in SERVICES and how["condition"] == "service_healthy"


def test_the_inner_network_reaches_nothing_else() -> None:
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert {n for n, s in SERVICES.items() if "outside" in s["networks"]} == {"gateway", "grafana", "segmenter"}


def _stage(target: str) -> str:
    found = re.search(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    assert found, f"no target {target}"
    return found[1]


def test_versions_are_pinned_and_agree() -> None:
    for name, service in SERVICES.items():
        image, _, tag = service["image"].rpartition(":")
        if name in OURS:
            assert tag.removesuffix("-gpu") == __version__, service["image"]
            assert image == f"world2act/{service['build']['target']}"
        else:
            assert re.fullmatch(r"v?\d+\.\d+\.\d+(-\w+)?", tag), service["image"]
    assert set(re.findall(r"^ARG VERSION=(.*)$", DOCKERFILE, re.M)) == {__version__}
    arguments = COMPOSE["x-build"]["args"]
    for name in ("PYTHON_IMAGE", "TRITON_IMAGE", "TORCH_INDEX"):
        default = re.search(rf"^ARG {name}=(.*)$", DOCKERFILE, re.M)
        assert default and re.fullmatch(rf"\$\{{{name}:?-{re.escape(default[1])}}}", arguments[name]), name
    assert not re.findall(r"^FROM (?!\$|build |method-packages |service |rendering )\S+", DOCKERFILE, re.M), "bases are arguments"


def test_images_install_their_extra_and_open_their_ports() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for target in {service["build"]["target"] for service in OURS.values()}:
        installed = re.findall(r"install-extra (\S+)", _stage(f"{target}-packages").replace('"${TRITON_EXTRAS}"', "triton"))
        assert installed and set(installed[0].split(",")) <= set(extras), target
        assert target in installed[0].split(",")
        ports = {int(port) for line in re.findall(r"^EXPOSE (.*)$", _stage(target), re.M) for port in line.split()}
        wanted = {METRICS_PORTS[s] for s in ({"trainer": ("trainer", "rollout")}.get(target, (target,))) if s in METRICS_PORTS}
        doors = {n: f.default for n, f in CommonSettings.model_fields.items() if n.endswith("_port") and n != "metrics_port"}
        wanted |= {port for door, port in doors.items() if door.split("_")[0] == target}
        assert ports == wanted, target
    assert extras["triton-server"], "the Dockerfile reads the stub's package from there"
