"""The trainings of the embedded models learn on tiny synthetic data and refuse data of other splits."""

from __future__ import annotations

import copy
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from world2act import stage1, worldmodel_metrics, worldmodel_training
from world2act.behaviour_cloning import Settings, samples_of, shifted, train, train_base
from world2act.console import command_line
from world2act.data.clips import CutEpisode, LatentBank
from world2act.data.robomimic import EpisodeWriter
from world2act.models.tiny_policy import TinyPolicy, TinyPolicyConfig
from world2act.models.vae import VAEConfig
from world2act.models.worldmodel import WorldModel, WorldModelConfig
from world2act.optimisation import device_of
from world2act.splits import LeakageError, Split
from world2act.types import Episode, Skill
from world2act.worldmodel_training import TransformerSettings, VAESettings, _Windows, mixed, train_transformer, train_vae

SMALL = WorldModelConfig(vae=VAEConfig(widths=(8, 8, 16)), heads=2, head_width=24, layers=1, text_width=8, adaln_width=8)


def moving_block(direction: int, split: str = "worldmodel", index: int = 0) -> CutEpisode:
    """A bright block that moves two pixels a frame, up or down as the prompt says."""
    frames = np.full((17, 64, 128, 3), 60, np.uint8)
    for t in range(17):
        top = 24 + 2 * direction * (t - 8 * (direction < 0) + 4)
        frames[t, max(0, top) : top + 16, 24:40] = 250
    prompt = "go down" if direction > 0 else "go up"
    return CutEpisode(
        "move",
        split,
        index,
        False,
        frames,
        np.full((16, 4), direction, np.float32),
        np.ones(16, np.bool_),
        (Skill(prompt, 0, 16),),
    )


def learn(device: str) -> tuple[WorldModel, LatentBank, list[float]]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, episodes, errors = WorldModel(SMALL).to(device), [moving_block(1), moving_block(-1)], []
    settings = VAESettings(steps=40, rate=2e-3, batch=2, normalising_windows=8)
    train_vae(model.vae, episodes, settings, 0, progress=lambda *a: errors.append(a[3]["error"]))
    bank = LatentBank(model.vae.requires_grad_(False), episodes)
    train_transformer(model, bank, TransformerSettings(steps=50, short_batch=4, long_batch=2, long_horizon=4, rate=5e-3), 0)
    return model.cpu(), bank, errors


@pytest.fixture(scope="module")
def trained() -> tuple[WorldModel, LatentBank, list[float]]:
    return learn("cpu")


def test_a_gpu_learns_the_same(trained: tuple[WorldModel, LatentBank, list[float]]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("NO GPU: training on one is not tested here")
    model, bank, errors = learn("cuda")
    assert errors[-1] == pytest.approx(trained[2][-1], rel=0.1)
    ours, theirs = (
        worldmodel_metrics.latent_errors(m, b, rows=16)["error_vs_copy_at_1"] for m, b in ((model, bank), trained[:2])
    )
    assert ours == pytest.approx(theirs, rel=0.2)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto").type == "cpu"
    with pytest.raises(ValueError, match="device: cuda"):
        device_of("cuda")


def test_few_demonstrations_weigh_as_much_as_other_tasks_video() -> None:
    own, other = moving_block(1), [replace(moving_block(-1, index=i), task="another") for i in range(6)]
    both = mixed([own, own], other)
    assert [e.weight for e in both] == [3, 3, *[1] * 6] and both[2:] == other
    windows = _Windows(both, VAESettings(), np.random.default_rng(0), torch.device("cpu"))
    assert windows.chances[:2].sum() == pytest.approx(0.5)
    assert [e.weight for e in mixed(other, [own])] == [1] * 7, "never less than once"
    with pytest.raises(ValueError, match=r"more: .* must not show move"):
        mixed([own], [own])


def test_vae_learns_and_latents_are_normalised(trained: tuple[WorldModel, LatentBank, list[float]]) -> None:
    _, bank, errors = trained
    assert errors[-1] < 0.7 * errors[0]
    latents = bank.moving[bank.starts].float()
    assert 0.3 < latents.std() < 3.0 and latents.mean().abs() < 0.5


def test_world_model_beats_copying_the_start(trained: tuple[WorldModel, LatentBank, list[float]]) -> None:
    model, bank, _ = trained
    errors = worldmodel_metrics.latent_errors(model, bank, rows=16)
    assert set(errors) == {"error_vs_copy_at_1", "error_vs_copy_at_4"}  # no clip is 8 latents long
    assert errors["error_vs_copy_at_1"] < 0.8


def test_a_latent_that_must_be_read_says_what_is_done(trained: tuple[WorldModel, LatentBank, list[float]]) -> None:
    model, bank, _ = trained
    named = copy.copy(bank)
    named.chunks = bank.chunks.clone()
    named.name(lambda latents: torch.full((*latents.shape[:2], 4, 4), 0.5))
    assert (named.chunks[named.wanted] == 0.5).all() and not (bank.chunks[bank.wanted] == 0.5).any()
    settings = TransformerSettings(steps=60, short_batch=4, long_batch=2, long_horizon=4, rate=2e-3)
    tuned, seen = copy.deepcopy(model).requires_grad_(True), []
    reader = worldmodel_training._Reader(tuned, bank)
    for dropped in (1.0, 0.0):
        generator = torch.Generator().manual_seed(0)
        _, read = worldmodel_training._losses(tuned, bank, reader, bank.starts[:4], 2, dropped, generator, "auto")
        assert (read == 0) == (dropped == 1.0), "without its prompt a clip does not say what is done"
    read.backward()  # type: ignore[no-untyped-call]
    assert any(p.grad is not None and p.grad.any() for p in tuned.transformer.parameters()), "it teaches the world model"
    tuned = copy.deepcopy(model)
    train_transformer(tuned, bank, replace(settings, reading_weight=4.0), 0, progress=lambda *a: seen.append(dict(a[3])))
    assert 0 < seen[-1]["reading"] < 0.7 * seen[0]["reading"]
    assert worldmodel_metrics.latent_errors(tuned, bank, rows=16)["error_vs_copy_at_1"] < 0.8, "what it shows is still true"


def test_vae_refuses_other_splits() -> None:
    with pytest.raises(LeakageError, match="train_vae"):
        train_vae(WorldModel(SMALL).vae, [moving_block(1, "validation")], VAESettings(steps=1), 0)


def test_pixels_that_differ_between_scenes_weigh_more() -> None:
    still = moving_block(1)
    episodes = [replace(still, frames=np.full_like(still.frames, 60), index=i) for i in range(3)]
    odd = np.full_like(still.frames, 60)
    odd[:, 10, 20] = 200  # a goal marker of one pixel, in the primary view
    episodes.append(replace(still, frames=odd, index=3))
    windows = _Windows(episodes, VAESettings(), np.random.default_rng(0), torch.device("cpu"))
    seen, weights = windows.draw(32)
    ratio = weights[:, :, 10, 20] / weights[:, :, 40, 20]
    marked = (seen[:, 1:, 10, 20] == 200).any(-1, keepdim=True)
    assert (
        marked.any() and torch.allclose(ratio[marked], torch.tensor(25.0)) and torch.allclose(ratio[~marked], torch.tensor(1.0))
    )
    assert torch.allclose(weights.mean(dim=(1, 2, 3, 4)), torch.ones(32), atol=1e-4)


def demonstration(split: str, value: float) -> Episode:
    images = {name: np.full((9, 64, 64, 3), 255 * (value > 0), np.uint8) for name in ("primary", "wrist")}
    actions = np.full((8, 4), value, np.float32)
    return Episode("reach", split, 0, "reach", images, np.zeros((9, 4), np.float32), np.zeros(9, np.float32), actions, True)


def test_base_learns_what_it_sees_from_split_base_only() -> None:
    torch.manual_seed(0)
    policy = TinyPolicy(TinyPolicyConfig(channels=(4, 4, 4), hidden=16))
    samples = samples_of([demonstration("base", 0.5), demonstration("base", -0.5)], 64)
    assert samples.frames.shape == (10, 64, 128, 3) and samples.chunks.shape == (10, 4, 4)
    train(policy, samples, Settings(demos=Path(), out=Path(), steps=80, batch=8, rate=5e-3))
    grid = torch.zeros(2, 128, 128, 3, dtype=torch.uint8)
    grid[0, :64] = 255
    chunk = policy.act(grid, torch.zeros(2, 4), ["reach", "reach"])
    assert chunk[0].mean() > 0.3 and chunk[1].mean() < -0.3
    with pytest.raises(LeakageError, match="behaviour_cloning"):
        samples_of([demonstration("worldmodel", 0.5)], 64)


def test_shift_moves_each_view_by_itself() -> None:
    views = torch.arange(64 * 128, dtype=torch.float32).reshape(1, 1, 64, 128).expand(8, 3, -1, -1)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(shifted(views, 0, generator), views)
    moved = shifted(views, 3, generator)
    offsets = {float(moved[row, 0, 32, column] - views[row, 0, 32, column]) for row in range(8) for column in (32, 96)}
    assert len(offsets) > 4
    assert all(abs(offset - 128 * round(offset / 128)) <= 3 and abs(offset) <= 3 * 128 + 3 for offset in offsets)
    assert shifted(views.to("meta"), 3, generator).device.type == "meta", "on whatever device they are"


ENV_ARGS = {
    "env_name": "reach",
    "simulator": "metaworld",
    "control_hz": 40.0,
    "chunk": 4,
    "cameras": {"primary": 0, "wrist": 1},
    "gripper_open_width": 0.09,
    "gripper_width_index": 3,
}


def write_demonstrations(root: Path, split: Split, task: str = "reach") -> None:
    with EpisodeWriter(root / split.value / f"{task}.hdf5", split=split, env_args=ENV_ARGS) as writer:
        for index in range(2):
            e = demonstration(split.value, 0.5 - index)
            e = replace(e, task=task, index=index, widths=np.full(9, 0.09, np.float32), instruction="reach the green goal")
            writer.write(e)


def test_a_cards_command_line_gives_the_same_settings() -> None:
    settings = worldmodel_training.Settings(
        demos=Path("my data"),
        out=Path("zoo/w.safetensors"),
        seed=3,
        tasks=("push", "reach"),
        segmented=False,
        split=Split.BASE,
        noise_scale=0.5,
        vae=VAESettings(steps=7, rate=1e-4),
        transformer=TransformerSettings(steps=9),
    )
    line = shlex.split(command_line("world2act train-worldmodel", settings))
    assert line[:4] == ["world2act", "train-worldmodel", "--demos", "my data"] and len(line) == 22
    config = (tyro.conf.EnumChoicesFromValues,)
    assert tyro.cli(worldmodel_training.Settings, args=line[2:], config=config) == settings
    one = stage1.Arguments(demos=Path("d"), worldmodel=Path("w"), out=Path("o"), steps=5)
    assert command_line("world2act stage1", one) == "world2act stage1 --demos d --worldmodel w --out o --seed 0 --steps 5"


def test_whole_recipes_write_weights_and_cards(tmp_path: Path) -> None:
    for split in (Split.WORLDMODEL, Split.VALIDATION, Split.BASE):
        write_demonstrations(tmp_path, split)
    settings = worldmodel_training.Settings(
        demos=tmp_path,
        out=tmp_path / "worldmodel.safetensors",
        vae=VAESettings(steps=1, batch=2, normalising_windows=4),
        transformer=TransformerSettings(steps=2, short_batch=2, long_batch=2, long_horizon=2, checkpoint_steps=1),
        probe_steps=2,
    )
    model = worldmodel_training.train_worldmodel(settings)
    loaded = WorldModel.load(settings.out)
    assert loaded.hash == model.hash and loaded.card["data"]["tasks"] == {"reach": 2}
    assert {"action_r2_predicted", "error_vs_copy_at_1", "reconstruction_psnr_db"} <= set(loaded.card["metrics"])
    assert model.hash in (tmp_path / "worldmodel.md").read_text()
    write_demonstrations(tmp_path / "more", Split.WORLDMODEL, "hammer")
    elsewhere = replace(settings, out=tmp_path / "wide.safetensors", split=Split.BASE, limit=1, more=tmp_path / "more")
    wide = worldmodel_training.train_worldmodel(elsewhere)
    card = (tmp_path / "wide.md").read_text()
    assert wide.card["data"]["tasks"] == {"hammer": 2, "reach": 1} and "scripted" not in card
    command = (
        f"world2act train-worldmodel --demos {tmp_path.name} --out wide.safetensors --seed 0 --limit 1 --split base --more more "
    )
    assert command + "--probe-steps 2 --vae.steps 1 --vae.batch 2 --vae.normalising-windows 4 --transformer.steps 2 " in card
    assert str(tmp_path) not in card, "no path of this machine"
    assert not list(tmp_path.glob("*.vae.safetensors"))
    read = TransformerSettings(steps=1, short_batch=2, long_batch=2, long_horizon=2, reading_weight=1.0)
    tuned = worldmodel_training.train_worldmodel(
        replace(settings, out=tmp_path / "read.safetensors", tune=settings.out, transformer=read, vae=VAESettings()),
        name=lambda latents: torch.zeros(*latents.shape[:2], 4, 4),
    )
    with pytest.raises(ValueError, match="vae_from, noise_scale: with tune"):
        worldmodel_training.train_worldmodel(
            replace(settings, tune=settings.out, vae=VAESettings(), vae_from=settings.out, noise_scale=0.5)
        )
    with pytest.raises(ValueError, match=r"transformer.reading_weight: must be >= 0, got -1"):
        worldmodel_training.train_worldmodel(replace(settings, transformer=replace(read, reading_weight=-1.0)))
    card = (tmp_path / "read.md").read_text()
    assert "VAE as in worldmodel.safetensors" in card and "actions too" in card and "--transformer.reading-weight 1.0" in card
    assert all(torch.equal(new, old) for new, old in zip(tuned.vae.parameters(), loaded.vae.parameters(), strict=True))
    assert tuned.hash != loaded.hash and tuned.card["metrics"]["loss_reading"] < 0.1, "all names are the same"
    policy = train_base(Settings(demos=tmp_path, out=tmp_path / "base.safetensors", steps=2, per_task=1))
    assert TinyPolicy.load(tmp_path / "base.safetensors").hash == policy.hash
    assert "train-base --demos " in (card := (tmp_path / "base.md").read_text()) and "--per-task 1 --steps 2`" in card
    assert policy.card["data"] == {"split": "base", "tasks": {"reach": 1}, "samples": 5}
