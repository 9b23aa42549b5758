"""The table that says which part loses the gain, on links whose errors are known."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch

from experiments import diagnose
from experiments.diagnose import Links, row
from experiments.regimes import PARTS
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.normalisation import Statistics


def test_errors_sizes_and_latents_are_those_of_the_links() -> None:
    adapters = Adapters(AdapterSettings(), Statistics(torch.zeros(4), torch.full((4,), 0.5)), "w" * 64)
    expert = torch.zeros(3, 4, 4)
    expert[..., 0] = 1.0  # half of the action's limit, along x
    found = [Links(expert, -expert, expert * 0.5, expert, torch.full((3,), 0.2), torch.full((3,), 0.8))] * 2
    base, true, predicted, size, base_size, predicted_size, latent = row(found, adapters)
    assert base == pytest.approx(4 / 4) and true == pytest.approx(0.25 / 4) and predicted == 0
    assert size == base_size == predicted_size == pytest.approx(0.5) and latent == pytest.approx(0.25)


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


def test_what_is_found_is_kept_with_the_weights_it_was_found_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {key: [0.5, 0.1, 0.25, 1.0, 1.0, 1.0, 0.6] for key in ("push", diagnose.ALL)}
    monkeypatch.setattr(diagnose, "measure", lambda paths, episodes: numbers if episodes == 3 else None)
    monkeypatch.setattr(sys, "argv", ["diagnose", "--regimes", "shipped", "--episodes", "3", "--out", str(tmp_path)])
    assert diagnose.main() == 0
    (kept,) = diagnose.read(tmp_path).values()
    assert kept["weights"] == {part: hashlib.sha256(Path(f"zoo/{part}.safetensors").read_bytes()).hexdigest() for part in PARTS}
    assert kept["rows"] == numbers and kept["columns"] == list(diagnose.COLUMNS) and kept["episodes"] == 3
