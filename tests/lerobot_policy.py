"""A small LeRobot policy with random weights, saved as `save_pretrained` saves it."""

from __future__ import annotations

from pathlib import Path

import pytest

SKIP = (
    "lerobot is not installed: LeRobot's policies are NOT tested in this run. Its pins clash with ours (numpy 2); to test them, "
    "make another environment: pip install lerobot==0.4.4 pytest structlog pydantic-settings grpcio grpcio-health-checking "
    "prometheus-client redis psutil fsspec tenacity openpi-client json-numpy pyzmq httpx msgpack websockets, and run "
    "`python -m pytest tests/conformance/test_policies.py -k lerobot` there"
)


def save_tiny_act(folder: Path, horizon: int = 12, cameras: tuple[str, ...] = ("image", "image2")) -> None:
    """ACT for LIBERO's layout: 8 numbers of state, 7 of action. Skips loudly where lerobot is not installed."""
    pytest.importorskip("lerobot", reason=SKIP)
    import torch
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    images = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)) for name in cameras}
    config = ACTConfig(
        input_features={**images, "observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        device="cpu",
        chunk_size=horizon,
        n_action_steps=horizon,
        dim_model=32,
        n_heads=2,
        dim_feedforward=32,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        latent_dim=4,
        pretrained_backbone_weights=None,
        push_to_hub=False,
    )
    torch.manual_seed(0)
    policy = ACTPolicy(config)
    policy.save_pretrained(folder)
    statistics = {
        name: {key: torch.full(shape, value) for key, value in (("mean", 0.0), ("std", 0.5), ("min", -1.0), ("max", 1.0))}
        for name, shape in (*((name, (3, 1, 1)) for name in images), ("observation.state", (8,)), ("action", (7,)))
    }
    for processor in make_pre_post_processors(config, dataset_stats=statistics):
        processor.save_pretrained(folder)
