"""Residual policy: zero at first, bounded always. Bundle: what it refuses."""

from dataclasses import replace

import pytest
import torch

from world2act.bundle import ActionLayout, Bundle, Origin
from world2act.models import store
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.models.residual import ResidualPolicy, ResidualSettings
from world2act.normalisation import Statistics

STATISTICS = Statistics(torch.tensor([0.1, 0.0, 0.0, 0.2]), torch.tensor([0.5, 1.0, 1.0, 2.0]))
ORIGIN = Origin("b" * 64, "w" * 64, "a" * 64)


def make(**settings) -> ResidualPolicy:
    torch.manual_seed(0)
    return ResidualPolicy.from_adapters(ResidualSettings(**settings), Adapters(AdapterSettings(), STATISTICS, "w" * 64))


def bundle(policy: ResidualPolicy | None = None) -> Bundle:
    return Bundle(policy or make(), AdapterSettings(), STATISTICS, ActionLayout(), ORIGIN, 3, {"note": "x"})


def inputs(vision: str = "latent", n: int = 3):
    torch.manual_seed(1)
    visual = torch.randn(n, 16, 8, 16) if vision == "latent" else torch.randint(0, 256, (n, 128, 128, 3), dtype=torch.uint8)
    return visual, torch.randn(n, 4), torch.rand(n, 4, 4) * 2 - 1, ["open the drawer"] * n


def moved(policy: ResidualPolicy, scale: float) -> ResidualPolicy:
    with torch.no_grad():
        for parameter in policy.head.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    return policy


@pytest.mark.parametrize("vision", ["latent", "pixels"])
@pytest.mark.parametrize("instruction", [True, False])
def test_untrained_residual_is_exactly_zero_and_can_learn(vision, instruction):
    policy = make(vision=vision, instruction=instruction)
    residual = policy(*inputs(vision))
    assert residual.shape == (3, 4, 4) and not residual.any()
    (residual - 0.3).square().mean().backward()
    assert policy.head[-1].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in policy.action_adapter.parameters()), "E_a is frozen"


@pytest.mark.parametrize("bound", [0.25, 1.0])
def test_residual_never_exceeds_its_bound(bound):
    residual = moved(make(bound=bound), 5.0)(*inputs())
    assert 0.2 * bound < residual.abs().max() <= bound


def test_paper_visual_encoder_has_6272_features():
    assert make(vision="pixels").vision.net[-2].in_features == 32 * 14 * 14


def test_rows_do_not_depend_on_their_batch():
    policy = moved(make(), 0.1)
    visual, states, base, words = inputs()
    words = ["open the drawer", "reach", "open the drawer"]
    whole = policy(visual, states, base, words)
    for i in range(3):
        torch.testing.assert_close(policy(visual[i : i + 1], states[i : i + 1], base[i : i + 1], words[i : i + 1])[0], whole[i])


def test_combined_is_clipped_and_in_simulator_units(tmp_path):
    policy = moved(make(), 5.0)
    visual, states, base, words = inputs()
    residual, combined = bundle(policy).combine(visual, states, base, words)
    torch.testing.assert_close(residual, policy(visual, states, STATISTICS.normalise(base), words) * STATISTICS.std)
    torch.testing.assert_close(combined, (base + residual).clamp(-1, 1))
    assert combined.abs().max() == 1.0


def test_round_trip_is_exact(tmp_path):
    original = bundle(moved(make(), 0.5))
    original.policy.eval().set_state_statistics(torch.arange(4.0), torch.arange(4.0) + 1)
    original.instructions = ("open the drawer",)
    original.save(tmp_path / "r.safetensors")
    loaded = Bundle.load(tmp_path / "r.safetensors", ORIGIN, ActionLayout())
    assert loaded.knows("Open the  drawer.") and not loaded.knows("open the door")
    assert torch.equal(loaded.combine(*inputs())[1], original.combine(*inputs())[1])
    assert loaded.version == 3 and loaded.card == {"note": "x"} and loaded.to_bytes() == original.to_bytes()


def test_instructions_of_any_script_are_told_apart():
    speaking = bundle()
    speaking.instructions = ("打开抽屉", "Öffne die Tür")
    assert speaking.knows("打开抽屉。") and speaking.knows("öffne die TÜR!")
    assert not speaking.knows("关上抽屉") and not speaking.knows("Öffne das Tor") and not speaking.knows("")


def test_a_bundle_made_before_instructions_were_kept_loads_and_knows_all():
    tensors, metadata = bundle()._contents()
    del metadata["config"]["instructions"]
    assert Bundle.from_bytes(store.to_bytes(tensors, metadata)).knows("open the door")
    metadata["config"]["instructions"] = [7]
    with pytest.raises(store.WeightsError, match=r"instructions\.0: input should be a valid string"):
        Bundle.from_bytes(store.to_bytes(tensors, metadata))


@pytest.mark.parametrize(("part", "called"), [("base", "base policy"), ("worldmodel", "world model"), ("adapters", "adapters")])
def test_other_weights_are_refused_by_name(part, called):
    expected = replace(ORIGIN, **{part: "z" * 64})
    mine = getattr(ORIGIN, part)[:12]
    with pytest.raises(store.WeightsError, match=f"trained beside {called} {mine}, but the one in use is zzzzzzzzzzzz"):
        Bundle.from_bytes(bundle().to_bytes(), expected=expected)


@pytest.mark.parametrize("missing", ["actions.mean", "actions.std", "state_mean", "state_std"])
def test_missing_statistics_are_refused(missing):
    tensors, metadata = bundle()._contents()
    del tensors[missing]
    with pytest.raises(store.WeightsError, match=f"missing statistics: {missing}"):
        Bundle.from_bytes(store.to_bytes(tensors, metadata))


def test_weights_that_are_not_finite_and_other_layouts_are_refused():
    policy = make()
    with torch.no_grad():
        policy.head[-1].bias[0] = float("nan")
    with pytest.raises(store.WeightsError, match=r"not finite in head\.3\.bias"):
        Bundle.from_bytes(bundle(policy).to_bytes())
    other = ActionLayout(("x", "y", "z", "g"))
    with pytest.raises(store.WeightsError, match=r"layout has dx in \[-1, 1\] as component 0, the one in use x in"):
        Bundle.from_bytes(bundle().to_bytes(), layout=other)
    with pytest.raises(store.WeightsError, match="layout has 4 components, the one in use 1"):
        Bundle.from_bytes(bundle().to_bytes(), layout=ActionLayout(("x",), (-1.0,), (1.0,)))


def test_a_file_that_is_no_bundle_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\x80\x04pickle?")
    with pytest.raises(store.WeightsError, match="not a safetensors file"):
        Bundle.load(tmp_path / "x")
    tensors, metadata = bundle()._contents()
    del tensors["head.1.weight"]
    with pytest.raises(store.WeightsError, match="does not hold a residual policy that can run"):
        Bundle.from_bytes(store.to_bytes(tensors, metadata))
