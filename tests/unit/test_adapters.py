"""Adapters: shapes of the paper, file round trip, and the refusals that protect the action scale."""

import pytest
import torch

from world2act.models import store
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.normalisation import Statistics

STATISTICS = Statistics(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0]))


def make(**settings) -> Adapters:
    torch.manual_seed(0)
    return Adapters(AdapterSettings(**settings), STATISTICS, "w" * 64)


@pytest.mark.parametrize("pool", ["average", "flatten"])
def test_shapes_and_unit_length(pool):
    adapters = make(pool=pool, pool_grid=(2, 4))
    e_v = adapters.video(torch.randn(3, 5, 16, 8, 16))
    e_a = adapters.action(torch.randn(3, 5, 4, 4))
    assert e_v.shape == e_a.shape == (3, 5, 32)
    assert adapters.decoder(e_a).shape == (3, 5, 4, 4)
    torch.testing.assert_close(e_v.square().mean(-1), torch.ones(3, 5))


def test_paper_adapter_counts_its_parameters():
    """Conv2d(16,64,k3), Conv2d(64,128,k3), two GroupNorms, FC(128,32): the sizes of METHOD section 3."""
    count = sum(p.numel() for p in make(pool="average", unit=False).video.parameters())
    assert count == (16 * 9 + 1) * 64 + 128 + (64 * 9 + 1) * 128 + 256 + 129 * 32


def test_round_trip_keeps_outputs_hash_and_card(tmp_path):
    adapters = make()
    written = adapters.save(tmp_path / "a.safetensors", {"seed": 3})
    loaded = Adapters.load(tmp_path / "a.safetensors")
    latents = torch.randn(1, 2, 16, 8, 16)
    assert torch.equal(adapters.video(latents), loaded.video(latents))
    assert written == adapters.hash == loaded.hash and loaded.card == {"seed": 3}
    assert torch.equal(loaded.actions.std, STATISTICS.std)


def test_missing_statistics_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    make().save(path)
    tensors, metadata, _ = store.read(path, "adapters")
    del tensors["actions.std"]
    store.write(path, tensors, metadata)
    with pytest.raises(store.WeightsError, match=r"missing statistics: actions\.std"):
        Adapters.load(path)


def test_other_world_model_is_refused():
    adapters = make()
    adapters.check_worldmodel("w" * 64)
    with pytest.raises(store.WeightsError, match=r"trained on world model wwwwwwwwwwww, but the one in use is xxxxxxxxxxxx"):
        adapters.check_worldmodel("x" * 64)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    make().save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(store.WeightsError, match="not a safetensors file"):
        Adapters.load(path)
    store.write(path, {"x": torch.zeros(1)}, {"kind": "base"})
    with pytest.raises(store.WeightsError, match="kind must be 'adapters'"):
        Adapters.load(path)


def test_statistics_go_where_the_values_are():
    values = torch.zeros(2, 4, device="meta")
    assert STATISTICS.normalise(values).device == STATISTICS.denormalise(values).device == values.device


def test_statistics_round_trip_and_floor():
    values = torch.randn(50, 4, 3)
    values[..., 2] = 1.0  # a component that never moves
    statistics = Statistics.fit(values, torch.ones(50, dtype=torch.bool))
    torch.testing.assert_close(statistics.denormalise(statistics.normalise(values)), values)
    assert statistics.std[2] > 0
