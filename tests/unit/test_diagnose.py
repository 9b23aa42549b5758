"""The table that says which part loses the gain, on links whose errors are known."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from experiments import diagnose
from experiments.diagnose import Links, row
from experiments.regimes import PARTS
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.models.tiny_policy import TinyPolicy
from world2act.normalisation import Statistics
from world2act.types import Episode


def test_errors_sizes_and_latents_are_those_of_the_links() -> None:
    adapters = Adapters(AdapterSettings(), Statistics(torch.zeros(4), torch.full((4,), 0.5)), "w" * 64)
    expert = torch.zeros(3, 4, 4)
    expert[..., 0] = 1.0  # half of the action's limit, along x
    found = [Links(expert, -expert, expert * 0.5, expert, torch.full((3,), 0.2), torch.full((3,), 0.8))] * 2
    base, true, predicted, size, base_size, predicted_size, latent = row(found, adapters)
    assert base == pytest.approx(4 / 4) and true == pytest.approx(0.25 / 4) and predicted == 0
    assert size == base_size == predicted_size == pytest.approx(0.5) and latent == pytest.approx(0.25)


class Still:
    """A base that answers with the first number of each state."""

    def act(self, frames: torch.Tensor, states: torch.Tensor, instructions: list[str]) -> torch.Tensor:
        return states[:, :1, None].expand(len(frames), 4, 4)


def test_states_of_a_demonstration_are_its_intended_chunk_starts_with_what_came_of_them() -> None:
    at = np.arange(30, dtype=np.float32)
    views = {name: np.broadcast_to(at.astype(np.uint8)[:, None, None, None], (30, 64, 64, 3)) for name in ("primary", "wrist")}
    widths = np.where(at >= 9, 0.035, 0.088).astype(np.float32)  # closes at frame 9: seen at the chunk's start 12
    actions, wanted = np.repeat(at[:29, None], 4, axis=1), np.ones(29, np.bool_)
    wanted[17] = False
    instruction = "pick up the puck and place it at the green goal"
    states = np.repeat(at[:, None], 4, axis=1)
    episode = Episode("pick-place", "validation", 0, instruction, views, states, widths, actions, True, wanted)

    found = diagnose.demonstrated(episode, cast(TinyPolicy, Still()))

    starts = [0, 4, 8, 12, 20, 24]  # not 16, which was disturbed, nor 28, which is no whole chunk
    assert found.frames[:, 0, 0, 0].tolist() == found.base[:, 0, 0].tolist() == starts
    assert found.expert[..., 0].tolist() == [[t, t + 1, t + 2, t + 3] for t in starts]
    assert found.seen[..., 0, 0, 0].tolist() == [[t + 1, t + 2, t + 3, t + 4] for t in starts]
    assert [prompt.split()[0] for prompt in found.prompts] == [*["pick"] * 3, *["place"] * 3]


def test_held_out_demonstrations_need_no_simulator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["diagnose", "--demos", str(tmp_path)])
    assert diagnose.main() == 2
    assert "no demonstration file of split validation" in capsys.readouterr().err


def test_it_needs_an_episode(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["diagnose", "--episodes", "0"])
    assert diagnose.main() == 2
    assert capsys.readouterr().err == "error: episodes, threads: must be >= 1, got 0, 1\n"


@pytest.mark.parametrize(
    ("regime", "words"),
    [("banana", "'banana' is unknown; choose all or some of shipped,"), ("matched-10", "matched-10: has no base")],
)
def test_a_regime_that_is_unknown_or_not_built_is_one_line(
    regime: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["diagnose", "--regimes", regime, "--cache", str(tmp_path), "--out", str(tmp_path)])
    assert diagnose.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error and not list(tmp_path.iterdir())


def test_what_is_found_is_kept_with_the_weights_it_was_found_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = {key: [0.5, 0.1, 0.25, 1.0, 1.0, 1.0, 0.6] for key in ("push", diagnose.ALL)}
    monkeypatch.setattr(diagnose, "measure", lambda paths, episodes, demos: numbers if (episodes, demos) == (3, None) else None)
    monkeypatch.setattr(sys, "argv", ["diagnose", "--regimes", "shipped", "--episodes", "3", "--out", str(tmp_path)])
    assert diagnose.main() == 0
    assert "gained below 0.75 and did harm from 0.98 on" in " ".join(capsys.readouterr().out.split())
    (kept,) = diagnose.read(tmp_path).values()
    assert kept["weights"] == {part: hashlib.sha256(Path(f"zoo/{part}.safetensors").read_bytes()).hexdigest() for part in PARTS}
    assert kept["rows"] == numbers and kept["columns"] == list(diagnose.COLUMNS) and kept["episodes"] == 3
