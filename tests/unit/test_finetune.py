"""Fine-tuning of large world models, with tiny random ones of the same classes: what is learned, saved, resumed, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="fine-tuning is not tested: pip install 'world2act[backbones]'")

from safetensors import safe_open
from safetensors.torch import load_file

from services.worldmodel.backbones import load_backbone
from services.worldmodel.backbones.folder import LORA, NOTE, ModelError
from services.worldmodel.finetune import Run, Settings
from services.worldmodel.settings import WorldModelSettings
from services.worldmodel.windows import cut_windows, read_episodes
from tests import tiny_models
from tests.unit.test_worldmodel_training import ENV_ARGS
from world2act.data.robomimic import EpisodeWriter
from world2act.splits import Split
from world2act.types import Episode

ROOT = Path(__file__).parents[2]


def demos(root: Path) -> Path:
    """Two demonstrations a split: a bright block that moves; the second has two skills (reach, and a grasp)."""
    for split in (Split.WORLDMODEL, Split.VALIDATION):
        with EpisodeWriter(root / split.value / "reach.hdf5", split=split, env_args=ENV_ARGS) as writer:
            for index in range(2):
                writer.write(moving(split.value, index))
    return root


def moving(split: str, index: int) -> Episode:
    frames = np.full((25, 64, 64, 3), 60, np.uint8)
    for t in range(25):
        frames[t, 2 * t : 2 * t + 12, 10 * index : 10 * index + 12] = 250
    images = {"primary": frames, "wrist": frames[:, ::-1].copy()}
    actions, states = np.full((24, 4), 0.1, np.float32), np.zeros((25, 4), np.float32)
    return Episode("reach", split, index, "reach the green goal", images, states, np.full(25, 0.08, np.float32), actions, True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    demos(folder / "demos")
    for name in tiny_models.BUILDERS:
        tiny_models.build(name, folder / "models" / name)
    return folder


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps one state a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(root: Path, name: str, out: str, **changes: Any) -> Settings:
    values: dict[str, Any] = {"steps": 4, "size": (32, 64), "frames": 17, "sample_steps": 0, "checkpoint_steps": 2, "warmup": 1}
    values |= {"cache": root / "cache" / name, "trackers": (), "averaging": 0.5, "log_steps": 1}
    values |= {"model": str(root / "models" / name), "data": root / "demos", "out": root / out}
    return Settings(backbone=name, **{**values, **changes})


def served(name: str, folder: Path) -> Any:
    """The result as the service loads it: its size and frames come from its own note."""
    return load_backbone(WorldModelSettings(backbone=name, backbone_model=str(folder), guardrail=False), "cpu")


@pytest.mark.parametrize(("name", "rank"), [("cosmos_predict2", None), ("wan22", 32), ("ltx_video", 128), ("hunyuan_video15", 8)])
def test_fine_tuning_with_the_papers_ranks(root: Path, name: str, rank: int | None) -> None:
    base = {p: p.read_bytes() for p in (root / "models" / name).rglob("*") if p.is_file()}
    card = Run(settings(root, name, f"out-{name}", layout="metaworld")).train()
    assert card["rank"] == rank and np.isfinite(card["loss"]) and card["seconds"]["a_step"] > 0 and card["peak_mib"] > 0
    out = root / f"out-{name}"
    assert {p: p.read_bytes() for p in base} == base, "the base is never changed"
    assert (out / LORA).is_file() == (rank is not None) and (out / "transformer").is_dir() == (rank is None)
    if rank is not None:
        shapes = [tensor.shape for key, tensor in load_file(out / LORA).items() if "lora_A" in key]
        assert shapes and {shape[0] for shape in shapes} == {rank}
    tuned = served(name, out)
    assert tuned.info.frame_shape == (32, 64, 3) and tuned.info.max_horizon == 16 // tuned.info.temporal_compression
    assert "corner camera" in tuned.layout
    plain = WorldModelSettings(
        backbone=name,
        backbone_model=str(root / "models" / name),
        backbone_size="32x64",
        backbone_frames=17,
        guardrail=False,
        backbone_layout="metaworld",
    )
    before = load_backbone(plain, "cpu")
    assert tuned.info.hash != before.info.hash
    frame = np.full((1, 32, 64, 3), 90, np.uint8)
    a, b = (model.imagine(frame, ["reach"], [0], 1, 3, 1.0) for model in (before, tuned))
    assert not np.array_equal(a, b) and np.array_equal(a[:, 0], b[:, 0])


def test_it_learns(root: Path) -> None:
    """The loss at fixed draws falls."""
    run = Run(settings(root, "wan22", "learns", method="full", rate=5e-3, steps=40, text_dropout=0.0))
    cache, _ = run.prepare_data()
    run.prepare_model()

    def at_fixed_draws() -> float:
        with torch.no_grad():
            return float(np.mean([run.loss(cache, torch.Generator().manual_seed(i)).item() for i in range(8)]))

    before = at_fixed_draws()
    for _ in range(40):
        values = run.one_step(cache)
    assert at_fixed_draws() < 0.9 * before and values["gradient"] > 0


def test_resume_to_the_bit(root: Path) -> None:
    whole = settings(root, "cosmos_predict2", "whole", steps=6, accumulate=2)
    Run(whole).train()
    for steps, resume in ((2, False), (6, True)):
        fresh = settings(root, "cosmos_predict2", "parts", steps=steps, accumulate=2, resume=resume)
        Run(fresh).train()
    for file in ("transformer/diffusion_pytorch_model.safetensors", "checkpoint/0.safetensors"):
        one, other = (load_file(root / out / file) for out in ("whole", "parts"))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one), file
    with pytest.raises(ValueError, match=r"resume: .*checkpoint is of a run with other settings"):
        Run(settings(root, "cosmos_predict2", "parts", steps=8, accumulate=2, resume=True, seed=1)).train()


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes(root: Path, sharded: bool) -> None:
    """Over gloo, from the command line: plain data parallelism, or weights sharded. One process cannot continue it."""
    name, folder = ("cosmos_predict2", root / "sharded") if sharded else ("wan22", root / "plain")
    command = [sys.executable, "-m", "services.worldmodel.training", "--backbone", name, "--model", str(root / "models" / name)]
    command += ["--data", str(root / "demos"), "--out", str(folder), "--cache", str(root / "cache" / "two"), "--steps", "2"]
    command += ["--size", "32", "64", "--frames", "17", "--processes", "2", "--sample-steps", "2", "--sample-denoising", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += ["--fsdp"] if sharded else []
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"loss"' in done.stdout and "W2A_BACKBONE_MODEL=" in done.stdout
    note = json.loads((folder / NOTE).read_text())
    assert note["card"]["processes"] == 2 and ("lora" in note) != sharded
    parts = [load_file(folder / "checkpoint" / f"{rank}.safetensors") for rank in (0, 1)]
    sizes = [sum(t.numel() for k, t in part.items() if k.startswith("weight.")) for part in parts]
    if sharded:
        assert sum(sizes) == note["card"]["trained_parameters"] and min(sizes) > 0.4 * sum(sizes), "each holds its half"
    else:
        assert all(torch.equal(parts[0][k], parts[1][k]) for k in parts[0]), "both hold the same"
    with safe_open(folder / "checkpoint" / "1.safetensors", "pt") as kept:
        assert json.loads(kept.metadata()["state"])["step"] == 2
    assert len(list((folder / "samples").glob("step-000002-clip-*.mp4"))) == 2
    assert list(folder.rglob("events.out.tfevents.*")), "TensorBoard"
    served(name, folder)
    with pytest.raises(ValueError, match="is of 2 processes, these are 1"):
        Run(settings(root, name, folder.name, resume=True)).train()


def test_latents_are_encoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = settings(root, "wan22", "cached", cache=root / "cache-once")
    Run(first).prepare_data()
    from services.worldmodel import finetune

    monkeypatch.setattr(finetune, "fill", lambda *_: pytest.fail("encoded again"))
    assert Run(first).prepare_data()[0].clips


def test_base_wm_sees_whole_episodes(root: Path) -> None:
    """One switch: segmented, skills and their prompts; not, the episode and its instruction. Long ones are cut."""
    (episode, _) = read_episodes(root / "demos", Split.WORLDMODEL)
    whole = list(cut_windows(episode, segmented=False, compression=4, horizon=4))
    assert [len(w.frames) for w in whole] == [17, 9] and {w.prompt for w in whole} == {"reach the green goal"}
    assert np.array_equal(whole[0].frames[-1], whole[1].frames[0])
    assert next(cut_windows(episode, segmented=True, compression=4, horizon=4)).prompt
    assert len(list(read_episodes(root / "demos", Split.WORLDMODEL, limit=1))) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "huge"}, "backbone: 'huge' is unknown"),
        ({"steps": 0}, "steps: must be >= 1"),
        ({"trackers": ("wandb",)}, "trackers: wandb is not installed"),
    ],
)
def test_bad_settings_are_named(root: Path, changes: dict[str, Any], message: str) -> None:
    if "trackers" in changes:
        import importlib.util

        if importlib.util.find_spec("wandb"):
            pytest.skip("wandb is installed here")
    values = {"backbone": "wan22", "model": "x", "data": root, "out": root / "never", **changes}
    with pytest.raises(ValueError, match=message):
        Settings(**values)


def test_a_base_that_is_gone_or_a_lora_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / NOTE).write_text(json.dumps({"base": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match=r"its base .*gone.* cannot be had"):
        Run(settings(root, "wan22", "never", model=str(tmp_path)))
    (tmp_path / NOTE).write_text(json.dumps({"base": str(root / "models" / "wan22")}))
    (tmp_path / LORA).write_bytes(b"x")
    with pytest.raises(ModelError, match="is a LoRA of another model already"):
        Run(settings(root, "wan22", "never", model=str(tmp_path)))
