"""docs/matrix.md: which policy, simulator and backbone was run, tested at its protocol, or neither, and by which test.

`python -m tests.matrix > docs/matrix.md` writes the page; tests/unit/test_matrix.py keeps it current and checks that every named
test exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN, PROTOCOL, CLASSES, NOT = "run here", "protocol-tested", "same classes, tiny random weights", "not run"
CONFORMANCE = "tests/conformance/test_policies.py::test_shape_dtype_and_range"
ELSEWHERE = "tests/unit/test_policies_elsewhere.py"
BACKBONE = "tests/conformance/test_backbones.py::test_equals_diffusers_own_pipeline"
LAYOUTS = "tests/unit/test_layouts.py::test_every_preset_there_and_back"


@dataclass(frozen=True)
class Cell:
    """How far something was taken, and the test (file::function) that backs it; no test only where nothing was run."""

    state: str
    test: str = ""

    def __str__(self) -> str:
        name = self.test.rpartition("::")[2]
        return f"{self.state} ([{name}](../{self.test.partition('::')[0]}))" if self.test else self.state


TABLE = Cell("table tested", LAYOUTS)

SIMULATORS: dict[str, Cell] = {
    "Meta-World": Cell(RUN, "tests/conformance/test_environment.py::test_a_seed_determines_everything"),
    "LIBERO": Cell(RUN, "tests/unit/test_libero.py::test_the_first_evaluation_scenes_are_the_shipped_ones"),
    "RoboCasa": Cell(PROTOCOL, "tests/unit/test_robocasa.py::test_both_orders_of_an_action"),
}
"""Simulators by themselves."""

POLICIES: dict[str, dict[str, Cell]] = {
    "tiny (embedded)": {
        "alone": Cell(RUN, CONFORMANCE),
        "Meta-World": Cell(RUN, "tests/integration/test_posttrain_end_to_end.py::test_kill_every_service_once"),
        "LIBERO": Cell(NOT),
        "RoboCasa": Cell(NOT),
    },
    "remote (policy.proto)": {
        "alone": Cell(RUN, CONFORMANCE),
        "Meta-World": Cell(RUN, f"{ELSEWHERE}::test_another_server_of_ours_is_a_base_policy_and_takes_its_residuals"),
        "LIBERO": Cell(NOT),
        "RoboCasa": Cell(NOT),
    },
    "gr00t (GR00T N1.6)": {
        "alone": Cell(PROTOCOL, f"{ELSEWHERE}::test_gr00t_says_what_it_wants_and_is_held_to_it"),
        "Meta-World": TABLE,
        "LIBERO": Cell(PROTOCOL, f"{ELSEWHERE}::test_libero_in_every_dialect"),
        "RoboCasa": Cell(PROTOCOL, f"{ELSEWHERE}::test_robocasa_rests_what_a_policy_does_not_move_and_keeps_our_order"),
    },
    "openpi (pi0, pi0.5)": {
        "alone": Cell(PROTOCOL, f"{ELSEWHERE}::test_their_own_client_agrees_with_the_test_server"),
        "Meta-World": TABLE,
        "LIBERO": Cell(PROTOCOL, f"{ELSEWHERE}::test_libero_in_every_dialect"),
        "RoboCasa": Cell(PROTOCOL, CONFORMANCE),
    },
    "openvla_oft (OpenVLA-OFT)": {
        "alone": Cell(PROTOCOL, "tests/unit/test_wire.py::test_json_numpy_to_the_byte"),
        "Meta-World": Cell(NOT),
        "LIBERO": Cell(PROTOCOL, f"{ELSEWHERE}::test_libero_in_every_dialect"),
        "RoboCasa": Cell(PROTOCOL, CONFORMANCE),
    },
    "cosmos_policy (Cosmos Policy)": {
        "alone": Cell(PROTOCOL, "tests/unit/test_wire.py::test_json_numpy_to_the_byte"),
        "Meta-World": Cell(NOT),
        "LIBERO": Cell(PROTOCOL, f"{ELSEWHERE}::test_libero_in_every_dialect"),
        "RoboCasa": Cell(PROTOCOL, f"{ELSEWHERE}::test_robocasa_rests_what_a_policy_does_not_move_and_keeps_our_order"),
    },
    "lerobot (ACT; SmolVLA and pi0 by the same door)": {
        "alone": Cell("ACT, random weights, in lerobot's own environment only", CONFORMANCE),
        "Meta-World": Cell(NOT),
        "LIBERO": TABLE,
        "RoboCasa": TABLE,
    },
}
"""Base policies: alone, and acting in (or mapped to) a simulator. No published weights of any of them were run here."""

BACKBONES: dict[str, dict[str, Cell]] = {
    "small (embedded)": {
        "alone": Cell(RUN, "tests/integration/test_worldmodel_triton.py::test_ensemble_equals_the_library"),
        "Meta-World": Cell(RUN, "tests/integration/test_posttrain_end_to_end.py::test_kill_every_service_once"),
    },
    "cosmos_predict2": {
        "alone": Cell(CLASSES, "tests/integration/test_backbone_triton.py::test_triton_serves_the_same_latents_as_this_process"),
        "Meta-World": Cell(NOT),
    },
    "wan22": {"alone": Cell(CLASSES, BACKBONE), "Meta-World": Cell(NOT)},
    "ltx_video": {"alone": Cell(CLASSES, BACKBONE), "Meta-World": Cell(NOT)},
    "hunyuan_video15": {"alone": Cell(CLASSES, BACKBONE), "Meta-World": Cell(NOT)},
}
"""World-model backbones; their published weights were not run here."""

DOORS: dict[str, Cell] = {
    "policy.proto": Cell(RUN, "tests/integration/test_vla_server.py::test_the_server_acts_as_the_library_does"),
    "openpi (openpi-client itself)": Cell(RUN, "tests/unit/test_doors.py::test_openpis_own_client_gets_base_plus_residual"),
    "GR00T (client written after its own)": Cell(
        PROTOCOL, "tests/unit/test_doors.py::test_gr00ts_client_gets_base_plus_residual_natively_and_flat"
    ),
}
"""Base + residual for clients."""

HEAD = f"""# What was run, and what only speaks the right protocol

Made by `python -m tests.matrix > docs/matrix.md`; a test keeps it current and checks that each named test exists.

- **{RUN}**: the real thing ran in a test of this repository.
- **{PROTOCOL}**: our side ran against a counterpart that speaks the documented protocol or layout; what is behind it was made up.
- **table tested**: the mapping of cameras, state and actions is tested in both directions, nothing acts on it.
- **{CLASSES}**: the library's own classes, saved and loaded from disk at a tiny size.
- **{NOT}**: not run here. Whoever runs it first should expect to mend something.
"""


def tables() -> dict[str, dict[str, dict[str, Cell]]]:
    """Title -> rows -> columns -> cell."""
    return {
        "Simulators": {name: {"alone": cell} for name, cell in SIMULATORS.items()},
        "Base policies": POLICIES,
        "World-model backbones": BACKBONES,
        "Doors for clients": {name: {"base + residual": cell} for name, cell in DOORS.items()},
    }


def cells() -> list[Cell]:
    """Every cell of every table."""
    return [cell for rows in tables().values() for columns in rows.values() for cell in columns.values()]


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, rows in tables().items():
        columns = list(next(iter(rows.values())))
        parts.append(f"\n## {title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
        parts += [f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for name, row in rows.items()]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(render(), end="")
