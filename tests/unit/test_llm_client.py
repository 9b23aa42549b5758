"""The client of a language model against a scripted HTTP server that misbehaves in every way: what is tried again, what is not,
what it costs, and that the key stays out of everything written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from services.runtime.artifacts import ArtifactStore
from services.runtime.llm import (
    DEEPSEEK,
    MAX_REPLY,
    BudgetExceededError,
    LLMClient,
    LLMSettings,
    LLMUnavailableError,
    make_asker,
)
from services.segmenter.segment import Cutter, run_request
from services.segmenter.settings import SegmenterSettings
from tests.scripted_llm import Server, Turn, cut_off, dripping, raw, refused, said, silent
from world2act.segmentation import load_schemas, segment_series
from world2act.segmentation.llm import Asker, InProcess, LLMAligner, LLMPlanner, replay

KEY = "sk-very-secret-0123456789"
PICK = "pick up the milk and place it in the basket"
PLAN = {
    "task": "pick-place",
    "steps": [{"prompt": "pick up the milk", "ends": "contact_on"}, {"prompt": "place the milk in the basket", "ends": "end"}],
    "explanation": "two steps",
}
ALIGNMENT = {"boundaries": [{"step": 0, "index": 20, "reason": "it closes"}], "missing": [], "explanation": "one grasp"}
WIDTHS = np.r_[np.full(20, 0.08), np.full(20, 0.03), np.full(21, 0.08)]
ASKED = [{"role": "system", "content": "rules"}, {"role": "user", "content": "question"}]


@pytest.fixture
def server() -> Iterator[Server]:
    s = Server()
    yield s
    s.close()


def settings(server: Server, tmp_path: Path, **changes: Any) -> SegmenterSettings:
    values: dict[str, Any] = {
        "llm_base_url": server.url,
        "llm_key": KEY,
        "llm_model": "scripted",
        "llm_timeout_s": 5.0,
        "llm_log": tmp_path / "llm.jsonl",
        **changes,
    }
    return SegmenterSettings(**values)


class Rig:
    """A client that notes its pauses instead of sleeping."""

    def __init__(self, s: LLMSettings) -> None:
        self.pauses: list[float] = []
        self.client = LLMClient(s, sleep=self.pauses.append)

    def ask(self) -> str:
        return self.client(ASKED, {"title": "answer", "type": "object"}).text


# -- the way there and back ------------------------------------------------------------------------------------------------


def test_what_is_sent(server: Server, tmp_path: Path) -> None:
    server.turns = [said({"a": 1}), said({"a": 1})]
    rig = Rig(settings(server, tmp_path, llm_format="json_schema"))
    assert rig.ask() == '{"a": 1}'
    Rig(settings(server, tmp_path)).ask()
    strict, plain = server.requests
    assert strict["path"] == "/v1/chat/completions" and strict["key"] == f"Bearer {KEY}"
    assert (strict["model"], strict["temperature"], strict["max_tokens"], strict["stream"]) == ("scripted", 0.0, 2000, False)
    wanted = {"name": "answer", "strict": True, "schema": {"title": "answer", "type": "object"}}
    assert strict["response_format"] == {"type": "json_schema", "json_schema": wanted} and strict["messages"] == ASKED
    assert plain["response_format"] == {"type": "json_object"} and '"type": "object"' in plain["messages"][0]["content"]
    assert ASKED[0]["content"] == "rules", "the caller's messages stay as they are"
    assert (rig.client.requests, rig.client.prompt_tokens, rig.client.completion_tokens) == (1, 100, 20)


@pytest.mark.parametrize(
    ("bad", "pause"),
    [
        (refused(429, "slow down", Retry_After="7"), 7.0),
        (refused(429, "slow down"), None),
        (refused(429, "slow down", Retry_After="soon"), None),
        (refused(500, "oops"), None),
        (refused(503, "overloaded", Retry_After="2"), 2.0),
        (raw(200, b"<html>hello</html>"), None),
        (raw(200, b'{"choices": []}'), None),
        (raw(200, b'{"choices": "none"}'), None),
        (raw(200, b'{"choices": [{"message": {"content": 7}}]}'), None),
        (raw(200, b"[" * 100_000), None),
        (raw(200, b"x" * (MAX_REPLY + 1)), None),
        (cut_off, None),
    ],
    ids=["429", "429 bare", "429 odd", "500", "503", "html", "no choice", "odd choice", "odd content", "deep", "huge", "cut off"],
)
def test_what_may_pass_is_tried_again(server: Server, tmp_path: Path, bad: Turn, pause: float | None) -> None:
    server.turns = [bad, bad, said("fine")]
    rig = Rig(settings(server, tmp_path))
    assert rig.ask() == "fine" and len(server.requests) == 3
    assert rig.pauses == [pause, pause] if pause else 0 < rig.pauses[0] <= 2 and len(rig.pauses) == 2


def test_retry_after_as_a_date(server: Server, tmp_path: Path) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    server.turns = [refused(429, "later", Retry_After=later), said("fine")]
    rig = Rig(settings(server, tmp_path))
    assert rig.ask() == "fine" and 25 < rig.pauses[0] <= 30


@pytest.mark.parametrize("slow", [silent(3.0), dripping], ids=["silent", "dripping"])
def test_time_outs(server: Server, tmp_path: Path, slow: Turn) -> None:
    server.turns = [slow, said("fine")]
    rig = Rig(settings(server, tmp_path, llm_timeout_s=0.5))
    start = time.monotonic()
    assert rig.ask() == "fine" and time.monotonic() - start < 2.5
    assert rig.client.prompt_tokens > 100, "what was asked and never answered may have been billed: it counts"


def test_tries_are_bounded(server: Server, tmp_path: Path) -> None:
    server.turns = [refused(500, f"secret {KEY}")] * 9
    with pytest.raises(LLMUnavailableError, match=r"no answer from http://127.*: status 500: secret \*\*\*$"):
        Rig(settings(server, tmp_path, llm_retries=4)).ask()
    assert len(server.requests) == 4


def test_a_pause_longer_than_the_patience_is_refused(server: Server, tmp_path: Path) -> None:
    server.turns = [refused(429, "come back tomorrow", Retry_After="86400"), said("fine")]
    rig = Rig(settings(server, tmp_path))
    with pytest.raises(LLMUnavailableError, match="status 429: come back tomorrow"):
        rig.ask()
    assert rig.pauses == [] and len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422, 301])
def test_what_cannot_pass_is_not_tried_again(server: Server, tmp_path: Path, status: int) -> None:
    server.turns = [refused(status, f"no: {KEY}", Location="http://127.0.0.1:1/"), said("fine")]
    with pytest.raises(LLMUnavailableError, match=rf"refuses: status {status}: no: \*\*\*") as caught:
        Rig(settings(server, tmp_path)).ask()
    assert len(server.requests) == 1 and KEY not in str(caught.value)


def test_nobody_listens(server: Server, tmp_path: Path) -> None:
    rig = Rig(settings(server, tmp_path, llm_base_url="http://127.0.0.1:1/v1", llm_retries=2))
    with pytest.raises(LLMUnavailableError, match="cannot connect"):
        rig.ask()
    assert rig.client.prompt_tokens == 0


def test_a_deadline_ends_the_asking(server: Server, tmp_path: Path) -> None:
    rig = Rig(settings(server, tmp_path))
    rig.client.deadline = time.monotonic() - 1
    with pytest.raises(LLMUnavailableError, match="out of time"):
        rig.ask()
    assert server.requests == []


def test_requests_keep_their_distance(server: Server, tmp_path: Path) -> None:
    server.turns = [said("a"), said("b"), said("c")]
    rig = Rig(settings(server, tmp_path, llm_requests_per_minute=6))
    for _ in range(3):
        rig.ask()
    assert rig.pauses[0] == 0 and 9 < rig.pauses[1] <= 10 and 19 < rig.pauses[2] <= 20


# -- money -------------------------------------------------------------------------------------------------------------


def test_the_token_budget_stops_before_it_is_exceeded(server: Server, tmp_path: Path) -> None:
    server.turns = [said("ok", usage={"prompt_tokens": 60, "completion_tokens": 200})] * 20
    rig = Rig(settings(server, tmp_path, llm_budget_tokens=1000, llm_max_tokens=200))
    done = 0
    with pytest.raises(BudgetExceededError, match=r"budget of 1000 tokens \(W2A_LLM_BUDGET_TOKENS\) is spent: 780 used"):
        while done < 20:
            rig.ask()
            done += 1
    assert done == len(server.requests) == 3


def test_the_money_budget(server: Server, tmp_path: Path) -> None:
    server.turns = [said("ok", usage={"prompt_tokens": 1000, "completion_tokens": 1000})] * 20
    prices = {"llm_usd_per_million_in": 1.0, "llm_usd_per_million_out": 10.0, "llm_max_tokens": 1000}
    rig = Rig(settings(server, tmp_path, llm_budget_usd=0.03, **prices))
    with pytest.raises(BudgetExceededError, match=r"budget of 0.03 USD .* 0.0220 used"):
        for _ in range(9):
            rig.ask()
    assert rig.client.usd == pytest.approx(0.022) and len(server.requests) == 2


@pytest.mark.parametrize("usage", [None, {}, "many", {"prompt_tokens": -5, "completion_tokens": "7"}])
def test_a_server_that_does_not_count_is_counted_for(server: Server, tmp_path: Path, usage: Any) -> None:
    server.turns = [said("x" * 1000, usage=usage)]
    rig = Rig(settings(server, tmp_path))
    rig.ask()
    assert rig.client.completion_tokens >= 500 and rig.client.prompt_tokens > 20


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W2A_LLM_KEY", KEY)
    monkeypatch.setenv("W2A_LLM_MODEL", "mine")
    s = LLMSettings()
    assert s.llm_configured and s.llm_base_url == DEEPSEEK and s.llm_model == "mine"
    assert KEY not in repr(s) and KEY not in str(s.model_dump())
    monkeypatch.delenv("W2A_LLM_KEY")
    assert not LLMSettings().llm_configured and LLMSettings(llm_base_url="http://127.0.0.1:8081/v1/").llm_configured
    with pytest.raises(ValueError, match="llm: is not configured; set W2A_LLM_KEY"):
        LLMClient(LLMSettings())
    for bad in ("ftp://host/v1", "host/v1", "https://user:word@host/v1", "https://host/v1?key=1"):
        with pytest.raises(ValidationError, match="llm_base_url"):
            LLMSettings(llm_base_url=bad)


# -- the whole way -----------------------------------------------------------------------------------------------------


def episode(asker: Asker) -> Any:
    hand = load_schemas().calibration("panda")
    return segment_series(WIDTHS, PICK, calibration=hand, planner=LLMPlanner(asker), aligner=LLMAligner(asker))


def test_every_misbehaviour_in_one_episode(server: Server, tmp_path: Path) -> None:
    """A time-out, 429, 500, prose, truncated JSON, wrong types, an invented index, a wrong count: the answer is right."""
    wrong_order = {**ALIGNMENT, "boundaries": [*ALIGNMENT["boundaries"]] * 2}
    invented = {**ALIGNMENT, "boundaries": [{"step": 0, "index": 21, "reason": "near"}]}
    server.turns = [
        refused(500, "oops"),
        said(f"Of course! {json.dumps(PLAN)}"),
        said(json.dumps(PLAN)[:50], reason="length"),
        said({**PLAN, "steps": "two"}),
        refused(429, "slow", Retry_After="0"),
        said(PLAN),
        said(invented),
        said(wrong_order),
        said(None),
        said(ALIGNMENT),
    ]
    s = settings(server, tmp_path, llm_attempts=4)
    asker, client = make_asker(s, ArtifactStore(f"file://{tmp_path}/artifacts"))
    client._sleep = lambda seconds: None
    found = episode(asker)
    assert [(k.prompt, k.start, k.end) for k in found.skills] == [
        ("pick up the milk", 0, 20),
        ("place the milk in the basket", 20, 60),
    ]
    assert len(server.requests) == 10 and client.requests == 10
    feedback = [r["messages"][-1]["content"] for r in server.requests if r["messages"][-1]["content"].startswith("Rejected")]
    for words in ("nothing around it", "cut off at the token limit", "steps: Input should be", "21 was not given", "wrong count"):
        assert any(words in f for f in feedback), words

    log = (tmp_path / "llm.jsonl").read_text()
    everything = log + "".join(p.read_text() for p in (tmp_path / "artifacts").rglob("*") if p.is_file())
    assert KEY not in everything
    records = [json.loads(line) for line in log.splitlines()]
    assert [r["rejected"] is None for r in records] == [False] * 3 + [True] + [False] * 3 + [True]
    assert sum(r["prompt_tokens"] for r in records) == 800

    # The second time nothing is asked; without the kept answers the log alone gives the same.
    again, _ = make_asker(s, ArtifactStore(f"file://{tmp_path}/artifacts"))
    assert episode(again) == found and len(server.requests) == 10
    tape = Asker(replay(records, asker.model), model=asker.model, attempts=4, memory=InProcess())
    assert episode(tape) == found and len(server.requests) == 10


@pytest.mark.parametrize(
    "bad",
    [
        "\ud800",
        json.dumps({**PLAN, "explanation": "\ud800"}, ensure_ascii=False),
        json.dumps({**PLAN, "\ud800": "x"}),
        '{"task": ' + "9" * 5000 + "}",
    ],
    ids=["surrogate", "surrogate in a text", "surrogate as a name", "5000 digits"],
)
def test_an_answer_of_odd_characters_or_digits_is_asked_for_again(server: Server, tmp_path: Path, bad: str) -> None:
    server.turns = [said(bad, usage=None), said(PLAN)]
    asker, client = make_asker(settings(server, tmp_path), ArtifactStore(f"file://{tmp_path}/artifacts"))
    assert LLMPlanner(asker).plan(PICK).prompts == ("pick up the milk", "place the milk in the basket")
    assert client.requests == 2 and server.requests[1]["messages"][-1]["content"].startswith("Rejected: ")


def request(**changes: Any) -> dict[str, Any]:
    return {"instruction": PICK, "gripper_width_m": WIDTHS.tolist(), "embodiment": "panda", "planner": "llm", **changes}


def test_the_segmenters_request(server: Server, tmp_path: Path) -> None:
    s = settings(server, tmp_path, llm_usd_per_million_in=1.0)
    store = ArtifactStore(f"file://{tmp_path}/artifacts")
    model = Cutter.of_model(s, store)
    server.turns = [said(PLAN), said(ALIGNMENT)]
    result = run_request(request(), s, store, model)
    assert [(k["start"], k["end"]) for k in result["episodes"][0]["skills"]] == [(0, 20), (20, 60)]
    assert result["llm"] == {"requests": 2, "prompt_tokens": 200, "completion_tokens": 40, "usd": 0.0002}
    assert "aligner: one grasp" in result["episodes"][0]["reasons"]
    again = run_request(request(), s, store, model)
    assert again["episodes"] == result["episodes"] and again["llm"]["requests"] == 0
    ruled = run_request(request(planner="rule"), s, store, model)
    assert "llm" not in ruled and len(server.requests) == 2
    assert [k["end"] for k in ruled["episodes"][0]["skills"]] == [20, 60]


def test_the_segmenters_errors(server: Server, tmp_path: Path) -> None:
    s = settings(server, tmp_path, llm_budget_tokens=10)
    store = ArtifactStore(f"file://{tmp_path}/artifacts")
    missing = run_request(request(), s, store, None)
    assert missing["error"].startswith("planner: no language model is configured")
    spent = run_request(request(), s, store, Cutter.of_model(s, store))
    assert spent["error"].startswith("planner: llm: the budget of 10 tokens") and spent["again"] is True
    assert "planner: Input should be 'rule' or 'llm'" in run_request(request(planner="magic"), s, store, None)["error"]
    server.turns = [refused(401, "bad key")]
    with pytest.raises(LLMUnavailableError, match="status 401"):
        run_request(request(), s := settings(server, tmp_path), store, Cutter.of_model(s, store))
    assert Cutter.of_model(SegmenterSettings(llm_base_url=DEEPSEEK, llm_key=""), store) is None
