"""The language-model planner and aligner without a network: what is asked, what is accepted, what is rejected and why."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from world2act.segmentation import AnswerRejectedError, ContactEvent, RuleBasedPlanner, load_schemas, segment_series
from world2act.segmentation.alignment import Alignment
from world2act.segmentation.llm import (
    MAX_ANSWER,
    Asker,
    Completion,
    InProcess,
    LLMAligner,
    LLMPlanner,
    Messages,
    ReplayError,
    parse_answer,
    replay,
)
from world2act.segmentation.schemas import Step, TaskSchema

PICK = "pick up the milk and place it in the basket"
GOOD_PLAN = {
    "task": "pick-place",
    "steps": [
        {"prompt": "pick up the milk", "ends": "contact_on"},
        {"prompt": "place the milk in the basket", "ends": "end"},
    ],
    "explanation": "two steps",
}
TWICE = TaskSchema(
    "two", (Step("pick a", "contact_on"), Step("place a", "contact_off"), Step("pick b", "contact_on"), Step("place b", "end"))
)
EVENTS = [ContactEvent(10, 20, 0.03, 0.03), ContactEvent(22, 24, 0.07, 0.07), ContactEvent(30, None, 0.03, 0.03)]
GOOD_ALIGNMENT = {
    "boundaries": [
        {"step": 0, "index": 10, "reason": "first closure"},
        {"step": 1, "index": 20, "reason": "it opens"},
        {"step": 2, "index": 30, "reason": "second closure"},
    ],
    "missing": [],
    "explanation": "22 comes too soon after 20",
}


class Scripted:
    """Answers from a list; keeps what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = iter(answers)
        self.asked: list[list[dict[str, str]]] = []
        self.schemas: list[Mapping[str, Any]] = []

    def __call__(self, messages: Messages, schema: Mapping[str, Any]) -> Completion:
        self.asked.append([dict(m) for m in messages])
        self.schemas.append(schema)
        answer = next(self.answers)
        if isinstance(answer, Completion):
            return answer
        return Completion(answer if isinstance(answer, str) else json.dumps(answer))


def plan_of(*answers: Any, instruction: str = PICK, task: str | None = None) -> Any:
    return LLMPlanner(Asker(Scripted(*answers), attempts=len(answers))).plan(instruction, task)


def alignment_of(*answers: Any, schema: TaskSchema = TWICE) -> Alignment:
    return LLMAligner(Asker(Scripted(*answers), attempts=len(answers))).align(EVENTS, schema, 50)


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`content` with one value replaced; path as 'steps.0.prompt'."""
    copy: Any = json.loads(json.dumps(content))
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    target = copy
    for p in parents:
        target = target[p]
    target[last] = value
    return dict(copy)


# -- JSON and nothing else -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("Sure! Here it is: {}", "one JSON object and nothing around it"),
        ("```json\n{}\n```", "one JSON object and nothing around it"),
        ('{"a": 1} Hope this helps!', "nothing around it: Extra data"),
        ('{"a": [1, 2', "nothing around it"),
        ("[]", "must be a JSON object, got list"),
        ("null", "must be a JSON object, got NoneType"),
        ('{"a": 1, "a": 2}', "has a key twice"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": ' + "9" * 5000 + "}", "a number has 5000 digits, the limit is 20"),
        ("[" * 100_000, f"the limit is {MAX_ANSWER}"),
        ('{"a":' * 3_000, "nested too deeply|nothing around it"),
    ],
)
def test_what_is_no_json_object_is_rejected(text: str, message: str) -> None:
    with pytest.raises(AnswerRejectedError, match=message):
        parse_answer(text)


@given(st.text(max_size=200))
def test_any_text_is_parsed_or_rejected(text: str) -> None:
    try:
        assert isinstance(parse_answer(text), dict)
    except AnswerRejectedError as e:
        assert str(e).startswith("answer: ")


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_good_plan() -> None:
    plan = plan_of(GOOD_PLAN)
    assert plan.prompts == ("pick up the milk", "place the milk in the basket") and plan.task == "pick-place"
    assert plan_of(GOOD_PLAN, task="some_benchmark_name").task == "some_benchmark_name"


def test_what_the_planner_is_asked() -> None:
    complete = Scripted(GOOD_PLAN)
    LLMPlanner(Asker(complete)).plan(PICK, "x")
    ((system, user),) = complete.asked
    asked = json.loads(user["content"])
    assert system["role"] == "system" and asked["instruction"] == PICK and asked["benchmark_task"] == "x"
    assert {r["task"] for r in asked["schemas"]} == {r.task for r in load_schemas().tasks}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("task", "fly", "task: 'fly' is no schema and not 'none'"),
        ("task", 7, "task: Input should be a valid string"),
        ("steps", [], "steps: List should have at least 1 item"),
        ("steps", "pick", "steps: Input should be a valid list"),
        ("steps", GOOD_PLAN["steps"][:1], "steps.0.ends: 'contact_on'; the last step, and no other"),
        ("steps", [GOOD_PLAN["steps"][1]], "has 2 steps that end at contact_on, end; got end"),
        ("steps", [GOOD_PLAN["steps"][0], *GOOD_PLAN["steps"]], "got contact_on, contact_on, end"),
        ("steps", GOOD_PLAN["steps"][::-1], "steps.0.ends: 'end'; the last step, and no other"),
        ("steps", [GOOD_PLAN["steps"][1]] * 40, "at most 32 items"),
        ("steps.0.prompt", "pick up the banana", "'banana' is neither in the instruction nor in the schemas"),
        ("steps.0.prompt", "the milk", "must begin with one of the verbs"),
        ("steps.1.prompt", "place {object} in the basket", "{object} of .* is not filled from the instruction"),
        ("steps.0.prompt", " ", "must begin with one of the verbs"),
        ("task", "none", "task: 'none', but the instruction's is 'pick-place'"),
        ("task", "put", "task: 'put', but the instruction's is 'pick-place'"),
        ("steps.0.prompt", "place the milk", "steps.0.prompt: 'place the milk' is not 'pick up the milk'"),
        ("steps.0.prompt", "pick up the basket", "'pick up the basket' is not 'pick up the milk'"),
        ("steps.1.prompt", "place the basket in the milk", "steps.1.prompt: .* is not 'place the milk in the basket'"),
        ("steps.0.ends", "contact_off", "got contact_off, end"),
        ("steps.0.ends", "soon", "steps.0.ends: Input should be"),
        ("steps.0.colour", "red", "steps.0.colour: Extra inputs"),
        ("explanation", "x" * 501, "explanation: String should have at most 500"),
    ],
)
def test_bad_plans_are_rejected(path: str, value: Any, message: str) -> None:
    with pytest.raises(AnswerRejectedError, match=message):
        plan_of(changed(GOOD_PLAN, path, value))


def test_optional_steps_may_be_left_out() -> None:
    step = {"prompt": "open the drawer", "ends": "end"}
    handle = {"prompt": "grasp the handle of the drawer", "ends": "contact_on"}
    answer = {"task": "drawer-open", "explanation": "x"}
    assert [s.optional for s in plan_of({**answer, "steps": [step]}, instruction="open the drawer").schema.steps] == [False]
    both = plan_of({**answer, "steps": [handle, step]}, instruction="open the drawer").schema.steps
    assert [s.optional for s in both] == [True, False]


def test_a_compound_of_no_schema() -> None:
    steps = [
        {"prompt": "turn on the stove", "ends": "contact_off"},
        {"prompt": "pick up the moka pot", "ends": "contact_on"},
        {"prompt": "place the moka pot on the stove", "ends": "end"},
    ]
    answer = {"task": "none", "steps": steps, "explanation": "x"}
    plan = plan_of(answer, instruction="turn on the stove and put the moka pot on it")
    assert plan.task is None and len(plan.prompts) == 3


TABLE = load_schemas()


@pytest.mark.parametrize("instruction", [text for suite in TABLE.suites for text in suite.instructions.values()])
def test_what_the_rules_understand_is_a_good_plan(instruction: str) -> None:
    row = RuleBasedPlanner().understand(instruction)
    steps = [{"prompt": s.prompt, "ends": s.ends} for s in row.steps]
    answer = {"task": "none" if "+" in row.task else row.task, "steps": steps, "explanation": "x"}
    assert plan_of(answer, instruction=instruction).schema.steps == row.steps
    invented = [*steps[:-1], {**steps[-1], "ends": "contact_off"}, {"prompt": "push the plate", "ends": "end"}]
    with pytest.raises(AnswerRejectedError):
        plan_of({**answer, "steps": invented}, instruction=instruction)


SHAKE = "carefully pick up the jar and gently shake it over the sink, then return it"


@pytest.mark.parametrize(
    ("instruction", "prompts", "undone"),
    [
        (SHAKE, ["pick up the jar", "shake the jar over the sink", "return the jar"], ""),
        (SHAKE, ["open the jar", "grasp the jar", "shake it", "shake the jar", "return the jar"], ""),
        (SHAKE, ["pick up the jar", "return the jar"], "shake the jar over the sink"),
        (SHAKE, ["shake the jar", "pick up the jar", "return the jar"], "shake the jar over the sink"),
        (SHAKE, ["pick up the sink", "shake the jar", "return the jar"], "pick up the jar"),
        ("bring the cup to the sink", ["pick up the cup", "place the cup in the sink"], ""),
        ("bring the cup to the sink", ["pick up the cup"], "bring the cup to the sink"),
        ("stir the soup", ["reach the soup"], "stir the soup"),
        ("tidy the table", ["pick up the table", "push the table"], ""),  # no verb of ours: nothing can be said
    ],
)
def test_an_instruction_that_no_row_knows_is_done_whole_and_in_order(instruction: str, prompts: list[str], undone: str) -> None:
    steps = [{"prompt": p, "ends": "contact_off"} for p in prompts]
    answer = {"task": "none", "steps": [*steps[:-1], {**steps[-1], "ends": "end"}], "explanation": "x"}
    if not undone:
        assert list(plan_of(answer, instruction=instruction).prompts) == prompts
        return
    with pytest.raises(AnswerRejectedError, match=f"steps: none does '{undone}', or not in the instruction's order"):
        plan_of(answer, instruction=instruction)


def test_a_bad_instruction_is_refused_before_anything_is_asked() -> None:
    complete = Scripted()
    with pytest.raises(ValueError, match="instruction: is empty"):
        LLMPlanner(Asker(complete)).plan(" ")
    assert complete.asked == []


# -- alignments --------------------------------------------------------------------------------------------------------


def test_a_good_alignment_keeps_reasons_and_explanation() -> None:
    found = alignment_of(GOOD_ALIGNMENT)
    assert found.ends == (10, 20, 30, 50) and found.discarded is None
    assert found.reasons[0] == "'pick a' ends at frame 10: first closure"
    assert found.notes == ("aligner: 22 comes too soon after 20",)


def test_a_server_that_holds_answers_to_their_schema_can_name_only_what_was_given() -> None:
    complete = Scripted(GOOD_PLAN, GOOD_ALIGNMENT)
    LLMPlanner(Asker(complete)).plan(PICK)
    LLMAligner(Asker(complete)).align(EVENTS, TWICE, 50)
    plan, alignment = complete.schemas
    assert plan["properties"]["task"]["enum"] == [*(r.task for r in load_schemas().tasks), "none"]
    fields, boundary = alignment["properties"], alignment["$defs"]["Boundary"]["properties"]
    assert boundary["index"] == {"type": "integer", "enum": [10, 20, 22, 24, 30]}
    assert boundary["step"] == alignment["$defs"]["Missing"]["properties"]["step"] == {"type": "integer", "enum": [0, 1, 2]}
    assert fields["boundaries"]["maxItems"] == fields["missing"]["maxItems"] == 3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("boundaries.1.index", 21, r"boundaries\[1\].index: 21 was not given; given are \[10, 20, 22, 24, 30\]"),
        ("boundaries.0.index", 20, "20 is a contact_off, step 0 ends at contact_on"),
        ("boundaries.2.index", 10, "wrong order, 10 does not come after 20"),
        ("boundaries.2.index", 22, "22 is too close to 20"),
        ("boundaries", GOOD_ALIGNMENT["boundaries"][:2], "wrong count, 2 given, 3 needed"),
        ("boundaries", GOOD_ALIGNMENT["boundaries"][::-1], "wrong order, 2 given, 0 expected"),
        ("boundaries.0.index", "10", "boundaries.0.index: Input should be a valid integer"),
        ("boundaries.0.index", 10.0, "boundaries.0.index: Input should be a valid integer"),
        ("boundaries.0.reason", "", "boundaries.0.reason: String should have at least 1"),
        ("boundaries", {}, "boundaries: Input should be a valid list"),
        ("missing", [{"step": 9, "reason": "x"}], "missing.0.step: 9 is no position"),
        ("missing", [{"step": 3, "reason": "x"}], "step 3 ends with the episode"),
        ("missing", [{"step": 0, "reason": "x"}], "wrong count, 3 given, 2 needed"),
        ("explanation", "", "explanation: String should have at least 1"),
    ],
)
def test_bad_alignments_are_rejected_and_the_episode_discarded(path: str, value: Any, message: str) -> None:
    found = alignment_of(changed(GOOD_ALIGNMENT, path, value))
    assert found.ends == () and found.discarded is not None
    assert re.search(f"^no alignment: 1 answers were rejected, .*{message}", found.discarded), found.discarded


def test_a_missing_step_discards_the_episode_with_its_reason() -> None:
    answer = {**GOOD_ALIGNMENT, "boundaries": GOOD_ALIGNMENT["boundaries"][:2], "missing": [{"step": 2, "reason": "no closure"}]}
    found = alignment_of(answer)
    assert found.discarded == "step missing: 'pick b': no closure" and found.notes == ("aligner: 22 comes too soon after 20",)


def test_a_missing_optional_step_does_not() -> None:
    schema = TaskSchema("open", (Step("grasp the handle", "contact_on", True), Step("open", "end")))
    found = alignment_of({"boundaries": [], "missing": [{"step": 0, "reason": "pushed"}], "explanation": "x"}, schema=schema)
    assert [s.prompt for s in found.steps] == ["open"] and found.ends == (50,)


def test_nothing_is_asked_where_nothing_can_be_chosen() -> None:
    complete = Scripted()
    aligner = LLMAligner(Asker(complete))
    assert aligner.align(EVENTS, TaskSchema("t", (Step("reach", "end"),)), 50).ends == (50,)
    discarded = aligner.align([], TWICE, 50).discarded
    assert discarded is not None and "step missing" in discarded and complete.asked == []


@given(st.lists(st.tuples(st.integers(-1, 4), st.sampled_from([0, 10, 20, 22, 24, 30, 50])), max_size=5))
def test_only_given_indices_in_order_pass(rows: list[tuple[int, int]]) -> None:
    answer = {**GOOD_ALIGNMENT, "boundaries": [{"step": s, "index": i, "reason": "r"} for s, i in rows]}
    found = alignment_of(answer)
    right = rows in ([(0, 10), (1, 20), (2, 30)], [(0, 10), (1, 24), (2, 30)])
    assert (found.discarded is None) == right


# -- asking again, remembering, replaying ------------------------------------------------------------------------------


def test_a_rejected_answer_is_asked_for_again_with_what_was_wrong() -> None:
    complete = Scripted("Sure!", changed(GOOD_PLAN, "steps.0.prompt", "pick up the banana"), GOOD_PLAN)
    records: list[dict[str, Any]] = []
    plan = LLMPlanner(Asker(complete, model="m", log=records.append)).plan(PICK)
    assert plan.prompts[0] == "pick up the milk"
    assert [len(a) for a in complete.asked] == [2, 4, 6]
    assert "nothing around it" in complete.asked[1][3]["content"] and complete.asked[1][2]["content"] == "Sure!"
    assert "'banana' is neither" in complete.asked[2][5]["content"]
    assert [bool(r["rejected"]) for r in records] == [True, True, False] and json.loads(json.dumps(records)) == records


def test_attempts_are_bounded() -> None:
    complete = Scripted(*["no"] * 5)
    with pytest.raises(AnswerRejectedError, match="3 answers were rejected, the last one because answer: must be one"):
        LLMPlanner(Asker(complete, attempts=3)).plan(PICK)
    assert len(complete.asked) == 3


def test_a_question_given_up_is_not_paid_for_again_where_that_is_wished() -> None:
    complete = Scripted(*["no"] * 6)
    planner = LLMPlanner(Asker(complete, attempts=3, refused={}))
    reasons = []
    for instruction in (PICK, PICK, "open the drawer"):
        with pytest.raises(AnswerRejectedError) as found:
            planner.plan(instruction)
        reasons.append(str(found.value))
    assert len(complete.asked) == 6 and reasons[0] == reasons[1]


def test_a_truncated_answer_is_rejected_even_where_it_parses() -> None:
    plan = plan_of(Completion(json.dumps(GOOD_PLAN), truncated=True), GOOD_PLAN)
    assert plan.task == "pick-place"
    with pytest.raises(AnswerRejectedError, match="cut off at the token limit"):
        plan_of(Completion(json.dumps(GOOD_PLAN), truncated=True))


def test_accepted_answers_are_remembered_by_question_and_model() -> None:
    memory = InProcess()
    first = Scripted("no", GOOD_PLAN)
    LLMPlanner(Asker(first, model="a", memory=memory)).plan(PICK)
    assert len(memory) == 1
    again = Scripted()
    assert LLMPlanner(Asker(again, model="a", memory=memory)).plan(PICK).task == "pick-place" and again.asked == []
    other = Scripted(GOOD_PLAN, {**GOOD_PLAN, "explanation": "y"})
    LLMPlanner(Asker(other, model="b", memory=memory)).plan(PICK)
    LLMPlanner(Asker(other, model="a", memory=memory)).plan(f"{PICK}!")
    assert len(other.asked) == 2 and len(memory) == 3


def test_a_remembered_answer_is_checked_again() -> None:
    memory = InProcess()
    LLMPlanner(Asker(Scripted(GOOD_PLAN), memory=memory)).plan(PICK)
    (key,) = memory
    memory[key] = json.dumps(changed(GOOD_PLAN, "steps.0.prompt", "pick up the banana"))
    complete = Scripted(GOOD_PLAN)
    assert LLMPlanner(Asker(complete, memory=memory)).plan(PICK).prompts[0] == "pick up the milk"
    assert len(complete.asked) == 1 and "banana" not in memory[key]


def widths() -> np.ndarray:
    """One grasp, then an empty closure that only an LLM would have to explain."""
    return np.r_[np.full(20, 0.08), np.full(20, 0.03), np.full(21, 0.08)]


def test_a_whole_episode_and_its_replay() -> None:
    hand = load_schemas().calibration("panda")
    alignment = {"boundaries": [{"step": 0, "index": 20, "reason": "closes"}], "missing": [], "explanation": "one grasp"}
    records: list[dict[str, Any]] = []
    asker = Asker(Scripted("hm", GOOD_PLAN, alignment), model="m", log=records.append)
    found = segment_series(widths(), PICK, calibration=hand, planner=LLMPlanner(asker), aligner=LLMAligner(asker))
    assert [(s.start, s.end) for s in found.skills] == [(0, 20), (20, 60)]
    assert found.skills[0].reason == "'pick up the milk' ends at frame 20: closes" and "aligner: one grasp" in found.reasons

    tape = Asker(replay(json.loads(json.dumps(records)), "m"), model="m")
    again = segment_series(widths(), PICK, calibration=hand, planner=LLMPlanner(tape), aligner=LLMAligner(tape))
    assert again == found
    with pytest.raises(ReplayError, match="the log has no answer"):
        LLMPlanner(tape).plan("open the drawer")


def test_an_episode_without_a_valid_plan_is_discarded() -> None:
    planner = LLMPlanner(Asker(Scripted("no", "no", "no")))
    found = segment_series(widths(), PICK, calibration=load_schemas().calibration("panda"), planner=planner)
    assert found.discarded is not None and found.discarded.startswith("no plan: 3 answers were rejected")
    assert found.skills == () and len(found.events) == 1 and found.length == 60


def test_what_the_model_cannot_do_is_no_rejection() -> None:
    """Only answers are rejected; a model that cannot be asked is an error of its own."""

    def complete(messages: Messages, schema: Mapping[str, Any]) -> Completion:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        segment_series(widths(), PICK, planner=LLMPlanner(Asker(complete)))
