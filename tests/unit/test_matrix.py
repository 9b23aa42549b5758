"""docs/matrix.md is current, claims nothing without a test, and names only tests that exist."""

from __future__ import annotations

import ast

from services.vla.policies.base import REGISTRY
from tests import matrix


def test_the_page_is_current() -> None:
    page = (matrix.ROOT / "docs/matrix.md").read_text()
    assert page == matrix.render(), "run `python -m tests.matrix > docs/matrix.md`"


def test_every_claim_has_a_test_that_exists() -> None:
    for cell in matrix.cells():
        assert bool(cell.test) == (cell.state != matrix.NOT), cell
        if cell.test:
            file, _, name = cell.test.partition("::")
            functions = {
                node.name for node in ast.walk(ast.parse((matrix.ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
            }
            assert name in functions, f"{cell.test} does not exist"


def test_every_policy_and_backbone_has_its_row() -> None:
    assert {name.split(" ")[0] for name in matrix.POLICIES} == set(REGISTRY)
    found = {path.stem for path in (matrix.ROOT / "services/worldmodel/backbones").glob("*.py")}
    assert {name.split(" ")[0] for name in matrix.BACKBONES} >= found & {
        "small",
        "cosmos_predict2",
        "wan22",
        "ltx_video",
        "hunyuan_video15",
    }
