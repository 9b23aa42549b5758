"""The embedded base policy's contract and weights file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from world2act.models.store import WeightsError
from world2act.models.tiny_policy import TinyPolicy
from world2act.models.worldmodel import WorldModel


@pytest.fixture(scope="module")
def policy() -> TinyPolicy:
    torch.manual_seed(0)
    policy = TinyPolicy()
    policy.action_std.fill_(0.5)
    return policy.eval()


def observation(batch: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch, 128, 128, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randn(batch, 4, generator=generator), ["reach the red goal", "open the drawer", "push"][:batch]


def test_act_gives_bounded_chunks(policy: TinyPolicy) -> None:
    images, states, instructions = observation(3)
    chunk = policy.act(images, 100.0 * states, instructions)
    assert chunk.shape == (3, 4, 4) and chunk.dtype == torch.float32
    assert chunk.abs().max() == 1.0


def test_rows_do_not_depend_on_their_batch(policy: TinyPolicy) -> None:
    images, states, instructions = observation(3)
    together = policy.act(images, states, instructions)
    alone = policy.act(images[1:2], states[1:2], instructions[1:2])
    assert torch.allclose(together[1], alone[0], atol=1e-5)


def test_every_input_matters_except_the_inactive_rows(policy: TinyPolicy) -> None:
    images, states, instructions = observation(1)
    chunk = policy.act(images, states, instructions)
    assert not torch.allclose(chunk, policy.act(255 - images, states, instructions), atol=1e-4)
    assert not torch.allclose(chunk, policy.act(images, states + 1, instructions), atol=1e-4)
    assert not torch.allclose(chunk, policy.act(images, states, ["close the door"]), atol=1e-4)
    below = images.clone()
    below[:, 64:] = 0
    assert torch.equal(chunk, policy.act(below, states, instructions))


def test_save_and_load_bit_exact(tmp_path: Path, policy: TinyPolicy) -> None:
    policy.save(tmp_path / "base.safetensors", {"split": "base"})
    loaded = TinyPolicy.load(tmp_path / "base.safetensors")
    assert loaded.card == {"split": "base"} and loaded.hash == policy.hash
    images, states, instructions = observation(2)
    assert torch.equal(policy.act(images, states, instructions), loaded.act(images, states, instructions))


def test_load_refuses_other_files(tmp_path: Path) -> None:
    WorldModel().save(tmp_path / "w.safetensors", {})
    with pytest.raises(WeightsError, match="base"):
        TinyPolicy.load(tmp_path / "w.safetensors")


def test_bad_observations(policy: TinyPolicy) -> None:
    images, states, instructions = observation(2)
    with pytest.raises(ValueError, match="frames: shape"):
        policy.act(images[:, :64], states, instructions)
    with pytest.raises(ValueError, match="frames: dtype"):
        policy.act(images.float(), states, instructions)
    with pytest.raises(ValueError, match="states: shape"):
        policy.act(images, states[:, :3], instructions)
    with pytest.raises(ValueError, match="instructions: need one per image"):
        policy.act(images, states, instructions[:1])
