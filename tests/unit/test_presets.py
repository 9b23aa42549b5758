"""Settings: ranges are checked, fields are replaced by name, and docs/method.md shows what the presets are."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from world2act import presets
from world2act.models.adapters import AdapterSettings
from world2act.presets import STAGE1, STAGE2, Stage1Weights, changed

PAGE = Path(__file__).resolve().parents[2] / "docs" / "method.md"


@pytest.mark.parametrize(
    ("settings", "values", "words"),
    [
        (STAGE2["default"], {"closed_loop_every": 0}, "closed_loop_every: must be in [1, 16], got 0"),
        (STAGE2["paper"], {"closed_loop_every": 2}, "closed_loop_every: target open-loop"),
        (STAGE2["default"], {"alignment": "monotone"}, "alignment: closed-loop targets"),
        (STAGE2["default"], {"alignment": "dtw"}, "alignment: must be one of same-index, monotone"),
        (STAGE2["default"], {"target": "oracle"}, "target: must be one of closed-loop, open-loop"),
        (STAGE2["default"], {"vision": "depth"}, "vision: must be one of latent, pixels"),
        (STAGE2["default"], {"cosine_weight": -0.1}, "cosine_weight: must be >= 0"),
        (STAGE2["default"], {"residual_penalty": -1.0}, "residual_penalty: must be >= 0"),
        (STAGE2["default"], {"cosine_weight": 0.0, "residual_penalty": 1.0}, "one of them must be > 0"),
        (STAGE2["default"], {"bound": 0.0}, "bound: must be > 0"),
        (STAGE2["default"], {"plan.rounds": -1}, "rounds: must be >= 0"),
        (STAGE2["default"], {"contrastive.form": "triplet"}, "form: must be one of"),
        (STAGE1["default"], {"predicted_share": 1.5}, "predicted_share: must be in [0, 1]"),
        (STAGE1["default"], {"action_noise": -0.5}, "action_noise: must be >= 0"),
        (STAGE1["default"], {"weights.cosine": -1.0}, "cosine: must be >= 0"),
        (STAGE1["default"], {"adapters.pool": "max"}, "pool: must be"),
        (STAGE2["default"], {"bond": 1.0}, "bond: no such setting"),
        (STAGE2["default"], {"plan": 3}, "plan: no such setting"),
        (STAGE2["default"], {"bound.x": 3}, "bound.x: no such setting"),
        (STAGE2["default"], {"bound": True}, "bound: must be float, got True"),
        (STAGE2["default"], {"instruction": 1}, "instruction: must be bool, got 1"),
    ],
)
def test_what_is_out_of_range_is_named(settings, values, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        changed(settings, values)


def test_fields_are_replaced_by_name_in_any_order():
    found = changed(STAGE2["default"], {"alignment": "monotone", "plan.rounds": 2, "target": "open-loop", "bound": 1})
    assert found == replace(
        STAGE2["default"], alignment="monotone", target="open-loop", bound=1.0, plan=replace(STAGE2["default"].plan, rounds=2)
    )
    assert changed(STAGE1["default"], {}) == STAGE1["default"]


def test_every_stage_1_choice_of_the_paper_can_be_named():
    """From `default`, name by name: pooling, unit norm, terms, share of predicted latents."""
    names = {"adapters.pool": "average", "adapters.unit": False, "predicted_share": 1, "horizon": 0, "action_noise": 0}
    found = changed(STAGE1["default"], names)
    assert found.adapters == STAGE1["paper"].adapters == AdapterSettings(pool="average", unit=False)
    assert (found.predicted_share, found.horizon) == (STAGE1["paper"].predicted_share, STAGE1["paper"].horizon)
    with pytest.raises(ValueError, match="one of them must be > 0"):
        Stage1Weights(0.0, 0.0, 0.0, 0.0, 0.0)


def test_the_method_page_shows_the_presets():
    text = PAGE.read_text()
    assert presets.with_tables(text) == text, "run: python -m world2act.presets docs/method.md"
    stale = re.sub(r"\| `bound` \|.*", "| `bound` | 7.0 | 7.0 |", text)
    assert stale != text and presets.with_tables(stale) == text


def test_a_page_without_places_for_the_tables_is_refused():
    with pytest.raises(ValueError, match="<!-- stage1 -->"):
        presets.with_tables("# Method")
