"""The house rules (docs/design.md), checked: import direction, no pickle, loopback, sizes, generated code up to date."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    p
    for part in ("world2act", "services", "experiments", "bench")
    for p in sorted((ROOT / part).rglob("*.py"))
    if "generated" not in p.parts
]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_house_rules(path: Path) -> None:
    relative = path.relative_to(ROOT)
    found = list(imports(path))
    assert not {name.split(".")[0] for name in found} & {"pickle", "dill", "cloudpickle", "joblib", "torchvision"}
    assert "torch.load(" not in path.read_text(), "weights are safetensors"
    assert "0.0.0.0" not in path.read_text(), "doors bind loopback by default"
    assert len(path.read_text().splitlines()) <= 500
    if relative.parts[0] == "world2act":
        above = {"services", "experiments"}
        assert not [name for name in found if name.split(".")[0] in above], "the method imports nothing above it"
    if relative.parts[0] == "services":
        own = relative.parts[1]
        others = {name.split(".")[1] for name in found if name.startswith("services.")} - {own, "runtime"}
        assert not others, f"{own} imports {others}"
        assert not [name for name in found if name.split(".")[0] == "experiments"], "services import no experiment"
    if relative.parts[0] == "experiments":
        imported = {name for name in found if name.startswith("services.")}
        assert not {name for name in imported if not name.startswith("services.simulator.envs")}, "experiments run no service"


def test_functions_are_short() -> None:
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno > 80:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long


def test_generated_protobuf_is_current(tmp_path: Path) -> None:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    subprocess.run(["bash", str(ROOT / "scripts/make_proto.sh"), str(tmp_path)], check=True, env=environment, cwd=ROOT)
    committed = ROOT / "services/runtime/generated"
    for fresh in sorted(tmp_path.iterdir()):
        assert fresh.read_text() == (committed / fresh.name).read_text(), f"{fresh.name}: run `make proto`"


def test_shipped_weights_are_small_and_have_cards() -> None:
    weights = sorted((ROOT / "zoo").rglob("*.safetensors"))
    assert weights, "zoo/ is empty: run `make zoo`"
    assert sum(w.stat().st_size for w in weights) <= 40_000_000
    for file in weights:
        card = file.with_suffix(".md").read_text()
        for word in ("sha256", "data:", "command:", "--seed", "seconds"):
            assert word in card.lower(), f"{file.stem}.md does not say its {word}"
        assert hashlib.sha256(file.read_bytes()).hexdigest() in card, f"{file.stem}.md is of other weights"
