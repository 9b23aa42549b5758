"""Stage 1 on a large world model's latents, both modes, and that serving accepts what it makes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="backbones are not tested: pip install 'world2act[backbones]'")

from services.worldmodel import serving, training
from services.worldmodel.settings import WorldModelSettings
from services.worldmodel.stage1 import Arguments, run
from tests import tiny_models
from tests.unit.test_finetune import demos
from world2act.models.adapters import Adapters


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage1")
    demos(folder / "demos")
    tiny_models.build("wan22", folder / "wan22")
    tiny_models.build("ltx_video", folder / "ltx_video")
    return folder


def settings(root: Path, name: str) -> WorldModelSettings:
    return WorldModelSettings(backbone=name, backbone_model=str(root / name), backbone_size="32x64", backbone_frames=17)


def arguments(root: Path, name: str, **changes: Any) -> Arguments:
    return Arguments(
        name, str(root / name), root / "demos", root / "zoo" / "adapters.safetensors", episodes=1, steps=2, **changes
    )


@pytest.mark.parametrize("latents", ["full", "one-step"])
def test_adapters_of_a_large_model_are_served_with_it(root: Path, monkeypatch: pytest.MonkeyPatch, latents: Any) -> None:
    monkeypatch.setattr("services.worldmodel.backbones.wan22.Wan22.steps", 3)
    card = run(arguments(root, "wan22", latents=latents), settings(root, "wan22"))
    assert np.isfinite(card["loss"]) and latents in card["what"] and "r2_true" in card["metrics"]
    adapters = Adapters.load(root / "zoo" / "adapters.safetensors")
    assert adapters.settings.channels == 4 and adapters.card["settings"]["adapters"]["channels"] == 4
    for name in ("backbone", "backbone_model", "backbone_size", "backbone_frames"):
        monkeypatch.setenv(f"W2A_{name.upper()}", str(getattr(settings(root, "wan22"), name)))
    monkeypatch.setenv("W2A_ZOO", str(root / "zoo"))
    assert serving.load_video_adapter("cpu").hash == adapters.hash
    monkeypatch.setenv("W2A_BACKBONE_LAYOUT", "libero")
    with pytest.raises(ValueError, match="adapters: trained on world model"):
        serving.load_video_adapter("cpu")


def test_a_vae_that_compresses_otherwise_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="one latent of 8 frames, but an action chunk is M = 4"):
        run(arguments(root, "ltx_video"), settings(root, "ltx_video"))


@pytest.mark.parametrize(
    ("line", "passed_on", "left"),
    [
        (["--demos", "d"], None, ["--demos", "d"]),
        (["--backbone", "small", "--demos", "d"], None, ["--demos", "d"]),
        (["--demos", "d", "--backbone=small"], None, ["--demos", "d"]),
        (["--backbone", "wan22", "--data", "d"], ["--backbone", "wan22", "--data", "d"], ["--backbone", "wan22", "--data", "d"]),
    ],
)
def test_one_command_for_small_and_large(
    monkeypatch: pytest.MonkeyPatch, line: list[str], passed_on: list[str] | None, left: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *line])
    assert training.without_backbone() == passed_on and sys.argv[1:] == left
