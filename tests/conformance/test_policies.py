"""What any base policy must satisfy. A new policy adds its name and how to build it to `BUILDERS`.

Policies that run elsewhere talk to a server of their documented protocol around a made-up policy (tests/policy_servers.py), each
once in LIBERO's layout and once in RoboCasa's. `remote` talks to a real server of ours. `lerobot` needs LeRobot's environment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from services.vla.policies import base
from services.vla.policies.base import BasePolicy
from services.vla.policies.plans import Turn
from services.vla.settings import VlaSettings
from tests.lerobot_policy import save_tiny_act
from tests.policy_servers import SERVERS, Brain
from tests.vla_server import serving_tiny
from world2act.models.tiny_policy import TinyPolicy
from world2act.types import FloatArray, ImageArray

INSTRUCTIONS = ("open the drawer", "push the puck to the green goal", "close the drawer", "x" * 500)


def tiny(folder: Path, stack: ExitStack) -> VlaSettings:
    """Random weights, large enough that some actions reach their limits."""
    torch.manual_seed(0)
    policy = TinyPolicy()
    policy.action_std.fill_(3.0)
    policy.save(folder / "base.safetensors", {})
    return VlaSettings(zoo=folder)


def elsewhere(name: str, robot: str) -> Callable[[Path, ExitStack], VlaSettings]:
    """A policy behind a protocol, with its server."""

    def build(folder: Path, stack: ExitStack) -> VlaSettings:
        address = stack.enter_context(SERVERS[name](Brain(name, robot)))
        return VlaSettings(vla_policy=name, vla_remote=address, vla_layout=robot, vla_image_size=24, vla_remote_timeout=10)

    return build


def remote(folder: Path, stack: ExitStack) -> VlaSettings:
    """Another server of ours, which runs the tiny policy."""
    return VlaSettings(vla_policy="remote", vla_remote=stack.enter_context(serving_tiny(folder)), vla_remote_timeout=10)


def lerobot(folder: Path, stack: ExitStack) -> VlaSettings:
    """LeRobot's ACT, small, random weights, saved and loaded."""
    save_tiny_act(folder)
    return VlaSettings(vla_policy="lerobot", vla_base=str(folder), vla_layout="libero", vla_image_size=24)


BUILDERS: dict[str, Callable[[Path, ExitStack], VlaSettings]] = {
    "tiny": tiny,
    "remote": remote,
    "lerobot": lerobot,
    **{f"{name}, {robot}": elsewhere(name, robot) for name in SERVERS for robot in ("libero", "robocasa")},
}


def test_every_registered_policy_is_tested_here() -> None:
    assert {name.split(",")[0] for name in BUILDERS} == set(base.REGISTRY)


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def policy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BasePolicy]:
    with ExitStack() as stack:
        yield base.make(BUILDERS[request.param](tmp_path_factory.mktemp("policy"), stack))


def rows(policy: BasePolicy, count: int, seed: int = 0) -> tuple[ImageArray, FloatArray, list[str]]:
    """Plausible inputs: noise images in the cameras' cells, small states."""
    spec, rng = policy.spec, np.random.default_rng(seed)
    grids = np.zeros((count, 2 * spec.height, 2 * spec.width, 3), np.uint8)
    for cell in spec.cameras.values():
        y, x = (cell // 2) * spec.height, (cell % 2) * spec.width
        grids[:, y : y + spec.height, x : x + spec.width] = rng.integers(0, 256, (count, spec.height, spec.width, 3))
    states = rng.uniform(-0.5, 0.5, (count, spec.state_size)).astype(np.float32)
    return grids, states, [INSTRUCTIONS[i % len(INSTRUCTIONS)] for i in range(count)]


def test_spec_is_complete_and_constant(policy: BasePolicy) -> None:
    spec = policy.spec
    assert spec == policy.spec
    assert spec.name in base.REGISTRY and len(spec.hash) == 64
    assert spec.cameras and len(set(spec.cameras.values())) == len(spec.cameras) and set(spec.cameras.values()) <= {0, 1, 2, 3}
    assert min(spec.height, spec.width, spec.state_size, spec.action_size, spec.chunk) >= 1 and spec.horizon >= spec.chunk
    assert len(spec.low) == len(spec.high) and all(low < high for low, high in zip(spec.low, spec.high, strict=True))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_shape_dtype_and_range(policy: BasePolicy, count: int) -> None:
    spec = policy.spec
    chunks = policy.act(*rows(policy, count))
    assert chunks.shape == (count, spec.chunk, spec.action_size) and chunks.dtype == np.float32
    assert (chunks >= np.float32(spec.low)).all() and (chunks <= np.float32(spec.high)).all()


def test_same_input_same_actions_and_inputs_untouched(policy: BasePolicy) -> None:
    grids, states, texts = rows(policy, 3)
    kept = grids.copy(), states.copy()
    assert policy.act(grids, states, texts).tobytes() == policy.act(grids, states, texts).tobytes()
    assert (grids == kept[0]).all() and (states == kept[1]).all()
    grids.flags.writeable = states.flags.writeable = False  # arrays off the wire are read-only
    policy.act(grids, states, texts)


def test_a_row_depends_on_itself_alone(policy: BasePolicy) -> None:
    """To the bit where the policy declares a block, else within float noise: in any batch and at any place."""
    grids, states, texts = rows(policy, 7)
    together = policy.act(grids, states, texts)
    tolerance = 0.0 if policy.spec.block else 1e-5
    for i in range(7):
        assert np.abs(policy.act(grids[i : i + 1], states[i : i + 1], texts[i : i + 1])[0] - together[i]).max() <= tolerance
    order = np.random.default_rng(1).permutation(7)
    shuffled = policy.act(grids[order], states[order], [texts[i] for i in order])
    assert np.abs(shuffled - together[order]).max() <= tolerance


def test_an_episode_runs_its_plan_to_the_end(policy: BasePolicy) -> None:
    """Chunks of M out of one plan while it lasts, whatever is seen meanwhile; then, and at every new start, a new one."""
    spec, seen = policy.spec, [rows(policy, 1, seed) for seed in range(4)]
    texts = seen[0][2]

    def at(step: int, number: int, episode: str = "e") -> FloatArray:
        return policy.act(seen[number][0], seen[number][1], texts, [Turn(episode, step)])[0]

    (plan,) = policy.plan(seen[0][0], seen[0][1], texts)
    whole = len(plan) // spec.chunk  # chunks in a plan
    assert np.array_equal(at(0, 0), plan[: spec.chunk])
    for number in range(1, whole):
        expected = plan[number * spec.chunk : (number + 1) * spec.chunk]
        assert np.array_equal(at(number * spec.chunk, 1), expected)
        assert np.array_equal(at(number * spec.chunk, 2), expected), "asked again: the same"
    assert np.array_equal(at(whole * spec.chunk, 3), policy.act(seen[3][0], seen[3][1], texts)[0]), "the plan is used up"
    assert np.array_equal(at(0, 1), policy.act(seen[1][0], seen[1][1], texts)[0]), "a new episode"
    assert np.array_equal(at(spec.chunk, 2, "unknown"), policy.act(seen[2][0], seen[2][1], texts)[0])


@pytest.mark.parametrize("part", [0, 1, 2])
def test_image_state_and_instruction_are_all_read(policy: BasePolicy, part: int) -> None:
    if part == 2 and policy.spec.name == "lerobot":
        pytest.skip("the policy here is ACT, which reads no instruction")
    one, other = rows(policy, 1, 0), rows(policy, 1, 1)
    other[2][0] = INSTRUCTIONS[1]
    mixed = [other[i] if i == part else one[i] for i in range(3)]
    assert not np.array_equal(policy.act(*one), policy.act(*mixed))  # type: ignore[arg-type]


def test_each_camera_is_read(policy: BasePolicy) -> None:
    spec = policy.spec
    grids, states, texts = rows(policy, 1)
    before = policy.act(grids, states, texts)
    for cell in spec.cameras.values():
        changed = grids.copy()
        y, x = (cell // 2) * spec.height, (cell % 2) * spec.width
        changed[:, y : y + spec.height, x : x + spec.width] = 255 - changed[:, y : y + spec.height, x : x + spec.width]
        assert not np.array_equal(policy.act(changed, states, texts), before)


def test_wrong_sizes_raise(policy: BasePolicy) -> None:
    grids, states, texts = rows(policy, 2)
    for bad in ((grids[:, :-8], states, texts), (grids, states[:, :-1], texts), (grids.astype(np.float32), states, texts)):
        with pytest.raises(ValueError, match="must be"):
            policy.act(*bad)


class Broken(BasePolicy):
    """Returns what it is told to."""

    def __init__(self, good: BasePolicy, result: FloatArray) -> None:
        self._good, self._result = good, result

    @property
    def spec(self) -> base.PolicySpec:
        return self._good.spec

    def _act(self, grids: ImageArray, states: FloatArray, instructions: object) -> FloatArray:
        return np.repeat(self._result[None], len(grids), axis=0)


def test_a_policy_that_breaks_its_promise_is_caught(policy: BasePolicy) -> None:
    spec = policy.spec
    shape = (spec.horizon, spec.action_size)
    with pytest.raises(RuntimeError, match="not finite"):
        Broken(policy, np.full(shape, np.nan, np.float32)).act(*rows(policy, 2))
    with pytest.raises(RuntimeError, match="actions are float64"):
        Broken(policy, np.zeros(shape)).act(*rows(policy, 2))
    with pytest.raises(RuntimeError, match="actions are float32"):
        Broken(policy, np.zeros((spec.horizon + 1, spec.action_size), np.float32)).act(*rows(policy, 2))
    assert (Broken(policy, np.full(shape, 1e9, np.float32)).act(*rows(policy, 2)) == np.float32(spec.high)).all()


def test_unknown_policy_and_missing_or_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="policy: 'nonsense' is unknown; choose one of"):
        base.make(VlaSettings(vla_policy="nonsense"))
    with pytest.raises(FileNotFoundError, match=r"base\.safetensors"):
        base.make(VlaSettings(zoo=tmp_path))
    (tmp_path / "base.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"base\.safetensors: not a safetensors file"):
        base.make(VlaSettings(zoo=tmp_path))
