"""Planner and aligner against a real language model behind a real server. Wiring, not wisdom: the model is tiny, so its JSON is
of the schema, and what it says is mostly rejected, which must end in a reason and never in an error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.runtime.artifacts import ArtifactStore
from services.runtime.llm import LLMSettings, make_asker
from tests import llm_server
from world2act.segmentation import load_schemas, parse_schemas, segment_series
from world2act.segmentation.llm import AlignAnswer, Asker, LLMAligner, LLMPlanner, PlanAnswer, replay

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(llm_server.missing()), reason=f"no local language model: {llm_server.missing()}"),
]

PICK = "pick up the milk and place it in the basket"
WIDTHS = np.r_[np.full(20, 0.08), np.full(20, 0.03), np.full(21, 0.08)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with (tmp_path_factory.mktemp("llm") / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.llm_server"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()
            process.wait()


def small_table() -> Any:
    """One row: the whole table is a long question for a small model on one core."""
    steps = [{"prompt": "pick up {object}", "ends": "contact_on"}, {"prompt": "place {object} {where}", "ends": "end"}]
    row = {"task": "pick-place", "slots": {"object": "it", "where": "there"}, "steps": steps}
    return parse_schemas({"tasks": [row], "verbs": {"contact_on": ["pick"], "contact_off": ["place"]}})


def test_an_episode_by_a_real_model(url: str, tmp_path: Path) -> None:
    settings = LLMSettings(
        llm_base_url=url,
        llm_model="smollm2",
        llm_format="json_schema",
        llm_max_tokens=120,
        llm_attempts=1,
        llm_retries=1,
        llm_timeout_s=600,
        llm_patience_s=600,
        llm_log=tmp_path / "llm.jsonl",
    )
    asker, client = make_asker(settings, ArtifactStore(f"file://{tmp_path}/artifacts"))
    hand = load_schemas().calibration("panda")

    by_model = segment_series(WIDTHS, PICK, calibration=hand, planner=LLMPlanner(asker, small_table()))
    aligned = segment_series(WIDTHS, PICK, calibration=hand, aligner=LLMAligner(asker))

    records = [json.loads(line) for line in (tmp_path / "llm.jsonl").read_text().splitlines()]
    assert len(records) == client.requests == 2
    for record, kind, found in zip(records, (PlanAnswer, AlignAnswer), (by_model, aligned), strict=True):
        assert 0 < record["completion_tokens"] <= 120 and record["prompt_tokens"] > 50, "the server counts"
        if not record["truncated"]:
            kind.model_validate_json(record["answer"])  # the schema went over the wire and was obeyed
        assert (found.discarded is None) == (record["rejected"] is None) or "step" in str(found.discarded)
        if record["rejected"]:
            assert record["rejected"] in str(found.discarded)
    assert client.prompt_tokens == sum(r["prompt_tokens"] for r in records)

    tape = Asker(replay(records, asker.model), model=asker.model, attempts=1)
    assert segment_series(WIDTHS, PICK, calibration=hand, planner=LLMPlanner(tape, small_table())) == by_model
    assert segment_series(WIDTHS, PICK, calibration=hand, aligner=LLMAligner(tape)) == aligned
