"""A large model's architecture through the real Triton: Cosmos-Predict2's classes with tiny random weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="backbones are not tested: pip install 'world2act[backbones]'")

from services.worldmodel.backbones import load_backbone, weights_hash
from services.worldmodel.client import ImagineClient, TritonFailedError, TritonRefusedError
from services.worldmodel.settings import WorldModelSettings
from tests import tiny_models
from tests.integration.triton_process import TritonProcess, running_triton
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.normalisation import Statistics

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TritonProcess, WorldModelSettings]]:
    root = tmp_path_factory.mktemp("cosmos")
    folder = tiny_models.build("cosmos_predict2", root / "model")
    settings = WorldModelSettings(
        backbone="cosmos_predict2",
        backbone_model=str(folder),
        backbone_size="32x64",
        backbone_frames=4 * 10**9 + 1,
        guardrail=False,
    )
    adapters = AdapterSettings(channels=4)
    statistics = Statistics(torch.zeros(4), torch.ones(4))
    torch.manual_seed(0)
    Adapters(adapters, statistics, weights_hash(settings, "cpu")).save(root / "zoo" / "adapters.safetensors", {})
    names = ("backbone", "backbone_model", "backbone_size", "backbone_frames", "guardrail")
    environment = {f"W2A_{name.upper()}": str(getattr(settings, name)) for name in names}
    with running_triton(root / "zoo", root / "run", environment) as server:
        yield server, settings


def test_triton_serves_the_same_latents_as_this_process(served: tuple[TritonProcess, WorldModelSettings]) -> None:
    server, settings = served
    backbone = load_backbone(settings, "cpu")
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), np.uint8)
    client = ImagineClient(server.address)
    try:
        info = client.served().worldmodel
        assert info == backbone.info and (info.name, info.temporal_compression, info.steps) == ("cosmos_predict2", 4, 35)
        found, worldmodel, _ = client.imagine(
            frames, ["open the drawer", "push"], [3, 4], 2, 4, 2.0, ("e_v", "latents", "frames")
        )
        assert worldmodel == info.hash and found["e_v"].shape == (2, 2, 32)
        latents = backbone.imagine(frames, ["open the drawer", "push"], [3, 4], 2, 4, 2.0)
        np.testing.assert_allclose(found["latents"], latents, atol=1e-4)
        assert np.abs(found["frames"].astype(int) - backbone.decode(latents)).max() <= 1
        with pytest.raises(TritonRefusedError, match="steps: 1 is outside"):
            client.imagine(frames, ["a", "b"], [0, 0], 1, 1)
        # A clip that no machine can hold: said as it is, and the server goes on.
        with pytest.raises(TritonFailedError, match="out of memory for a clip of 1000000001 latents"):
            client.imagine(frames[:1], ["a"], [0], 10**9, 2, 1.0, ("latents",))
        again, _, _ = client.imagine(frames[:1], ["open the drawer"], [3], 2, 4, 2.0, ("latents",))
        np.testing.assert_allclose(again["latents"], latents[:1], atol=1e-4)
    finally:
        client.close()
    assert "clip imagined" in server.log.read_text(), "time and memory of a clip are printed"
