"""The video VAE's causality and chunk alignment, the world model's contract, its weights file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from world2act.models.store import WeightsError
from world2act.models.text import token_batch, word_ids
from world2act.models.tiny_policy import TinyPolicy
from world2act.models.vae import VAEConfig
from world2act.models.worldmodel import WorldModel, WorldModelConfig

SMALL = WorldModelConfig(vae=VAEConfig(widths=(8, 8, 16)), heads=2, head_width=12, layers=1, text_width=8, adaln_width=8)


def random_model(config: WorldModelConfig = SMALL) -> WorldModel:
    torch.manual_seed(0)
    model = WorldModel(config)
    # A fresh model predicts the start latent exactly; give the last layer weights so that prompts and noise can show.
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    return model.eval().requires_grad_(False)


def random_frames(batch: int, time: int) -> torch.Tensor:
    frames = torch.randint(0, 256, (batch, time, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    frames[:, :, 64:] = 0
    return frames


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return random_model()


def test_shapes_and_black_rows(model: WorldModel) -> None:
    latents = model.encode(random_frames(2, 9))
    assert latents.shape == (2, 3, 16, 8, 16) and latents.dtype == torch.float32
    decoded = model.decode(latents)
    assert decoded.shape == (2, 9, 128, 128, 3) and decoded.dtype == torch.uint8
    assert not decoded[:, :, 64:].any() and decoded[:, :, :64].any()


@pytest.mark.parametrize("frame", range(9))
def test_a_frame_changes_exactly_the_latents_that_may_see_it(model: WorldModel, frame: int) -> None:
    """Latent k sees frames 4k-4 .. 4k: shifting the windows by one frame breaks this."""
    frames = random_frames(1, 9)
    changed = frames.clone()
    changed[:, frame, :64] = 255 - changed[:, frame, :64]
    difference = (model.encode(frames) - model.encode(changed)).abs().amax(dim=(0, 2, 3, 4))
    assert [k for k in range(3) if difference[k] > 0] == [k for k in range(3) if 4 * k - 4 <= frame <= 4 * k]


def test_a_latent_is_decoded_to_its_own_frames(model: WorldModel) -> None:
    latents = model.encode(random_frames(1, 9))
    changed = latents.clone()
    changed[:, 1] += 1.0
    difference = (model.decode(latents).int() - model.decode(changed).int()).abs().amax(dim=(0, 2, 3, 4))
    assert [t for t in range(9) if difference[t] > 0] == [1, 2, 3, 4]


def test_latent_0_is_the_encoded_start_frame_alone(model: WorldModel) -> None:
    frames = random_frames(2, 5)
    imagined = model.imagine(frames[:, 0], ["push the puck", "close"], 3, [1, 2])
    assert imagined.shape == (2, 4, 16, 8, 16)
    assert torch.allclose(imagined[:, 0], model.encode(frames)[:, 0], atol=1e-5)


def test_an_untrained_model_predicts_the_start() -> None:
    model = WorldModel(SMALL).eval()
    imagined = model.imagine(random_frames(1, 1)[:, 0], ["reach"], 2, [0])
    assert torch.equal(imagined[:, 1], imagined[:, 0]) and torch.equal(imagined[:, 2], imagined[:, 0])


@pytest.mark.parametrize("noise_scale", [0.0, 1.0])
def test_rows_do_not_depend_on_their_batch(noise_scale: float) -> None:
    model = random_model(replace(SMALL, noise_scale=noise_scale))
    start, prompts, seeds = random_frames(3, 1)[:, 0], ["reach", "open the drawer by its green handle", ""], [5, 6, 7]
    together = model.imagine(start, prompts, 2, seeds, steps=2, guidance=2.0)
    for row in range(3):
        alone = model.imagine(start[row : row + 1], prompts[row : row + 1], 2, seeds[row : row + 1], steps=2, guidance=2.0)
        assert torch.allclose(together[row], alone[0], atol=1e-4)


def test_prompt_and_seed_matter() -> None:
    model = random_model(replace(SMALL, noise_scale=1.0))
    start = random_frames(1, 1)[:, 0].repeat(3, 1, 1, 1)
    imagined = model.imagine(start, ["open", "close", "open"], 1, [5, 5, 6])
    assert (imagined[0] - imagined[1])[1].abs().max() > 1e-4
    assert (imagined[0] - imagined[2])[1].abs().max() > 1e-2


def test_regression_ignores_the_seed(model: WorldModel) -> None:
    start = random_frames(1, 1)[:, 0]
    assert torch.equal(model.imagine(start, ["open"], 2, [1]), model.imagine(start, ["open"], 2, [2]))


def test_save_and_load_bit_exact(tmp_path: Path, model: WorldModel) -> None:
    model.save(tmp_path / "w.safetensors", {"seed": 3})
    loaded = WorldModel.load(tmp_path / "w.safetensors")
    assert loaded.card == {"seed": 3} and loaded.config == SMALL and loaded.hash == model.hash
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    start = random_frames(1, 1)[:, 0]
    assert torch.equal(model.imagine(start, ["open"], 2, [1]), loaded.imagine(start, ["open"], 2, [1]))
    model.save(tmp_path / "again.safetensors", {"seed": 3})
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()


def test_load_refuses_other_files(tmp_path: Path, model: WorldModel) -> None:
    TinyPolicy().save(tmp_path / "base.safetensors", {})
    with pytest.raises(WeightsError, match="worldmodel"):
        WorldModel.load(tmp_path / "base.safetensors")
    model.save(tmp_path / "w.safetensors", {})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"cut\.safetensors"):
        WorldModel.load(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": torch.zeros(1, 64, 64, 3, dtype=torch.uint8)}, "frames: shape"),
        ({"start": torch.zeros(1, 128, 128, 3)}, "frames: dtype"),
        ({"horizon": 0}, "horizon: 0 is outside"),
        ({"horizon": 21}, "horizon: 21 is outside"),
        ({"steps": 0}, "steps: 0 is outside"),
        ({"prompts": ["a", "b"]}, "prompts, seeds"),
        ({"seeds": []}, "prompts, seeds"),
    ],
)
def test_bad_requests(model: WorldModel, change: dict[str, object], message: str) -> None:
    request = {"start": torch.zeros(1, 128, 128, 3, dtype=torch.uint8), "prompts": ["open"], "horizon": 1, "seeds": [0]}
    with pytest.raises(ValueError, match=message):
        model.imagine(**{**request, **change})


def test_frames_must_be_whole_chunks(model: WorldModel) -> None:
    with pytest.raises(ValueError, match=r"1 \+ 4n"):
        model.encode(torch.zeros(1, 4, 128, 128, 3, dtype=torch.uint8))


def test_words() -> None:
    assert word_ids("Open the DRAWER!") == word_ids("open  the drawer") != word_ids("close the drawer")
    assert len(word_ids("a " * 40)) == 17
    assert word_ids("Öffne die Schublade.") == word_ids("öffne die schublade") != word_ids("offne die schublade")
    assert word_ids("打开抽屉") != word_ids("关闭抽屉") and word_ids("दराज की") != word_ids("दराज का")
    ids, mask = token_batch(["", "open the drawer"])
    assert ids.shape == mask.shape == (2, 17)
    assert mask.sum(1).tolist() == [1, 4]
