"""Alignment of events with steps, cutting into whole chunks, the online skill, statistics."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from world2act.segmentation import (
    AnswerRejectedError,
    ContactEvent,
    GripperCalibration,
    OnlineSkill,
    Segmentation,
    Step,
    TaskSchema,
    align,
    candidates_of,
    default_planner,
    load_schemas,
    segment_episode,
    segment_series,
    skill_index_online,
    summarise,
    validate_answer,
)
from world2act.segmentation.segment import snap
from world2act.segmentation.statistics import density_at_median
from world2act.types import Episode, M

OPEN, PUCK, EMPTY = 0.0883, 0.035, 0.017
PICK = "pick up the puck and place it at the goal"
PICK_ONCE = TaskSchema("pick", (Step("pick", "contact_on"), Step("place", "end")))
HAND = load_schemas().calibration("metaworld")
TWICE = TaskSchema(
    "two", (Step("pick a", "contact_on"), Step("place a", "contact_off"), Step("pick b", "contact_on"), Step("place b", "end"))
)


def series(*parts: tuple[int, float]) -> np.ndarray:
    return np.concatenate([np.full(n, w) for n, w in parts])


def event(onset: int, offset: int | None, width: float = PUCK) -> ContactEvent:
    return ContactEvent(onset, offset, width, width)


def cuts(segmentation: Segmentation) -> list[tuple[str, int, int]]:
    return [(s.prompt, s.start, s.end) for s in segmentation.skills]


# -- alignment ---------------------------------------------------------------------------------------------------------


def test_alignment_gives_a_reason_per_boundary() -> None:
    found = align([event(20, None)], PICK_ONCE, 40)
    assert found.ends == (20, 40) and found.discarded is None
    assert found.reasons == ("'pick' ends at contact_on, frame 20, 0.035 m", "'place' ends with the episode")


@pytest.mark.parametrize(
    ("events", "ends", "note"),
    [
        ([event(3, 6), event(20, None)], (20, 40), "closes before frame 8"),
        ([event(10, 15, EMPTY), event(20, None)], (20, 40), "closes to 0.0170 m (< 0.0205), nothing is held"),
        ([event(20, 25), event(27, None)], (20, 40), "2 frames after the last one (< 4)"),
        ([event(12, 18), event(26, None)], (26, 40), "contact_on at 12 not used"),  # dropped and grasped again: the last counts
        ([event(20, 35)], (20, 40), "contact_off at 35 not used"),
    ],
)
def test_false_positives_are_filtered_with_a_note(events: list[ContactEvent], ends: tuple[int, int], note: str) -> None:
    found = align(events, PICK_ONCE, 40, HAND)
    assert found.ends == ends
    assert any(note in n for n in found.notes), found.notes


def test_missing_step_discards() -> None:
    for events in ([], [event(2, None)], [event(20, None, EMPTY)]):
        found = align(events, PICK_ONCE, 40, HAND)
        assert found.discarded is not None and found.discarded.startswith("step missing: ") and "'pick'" in found.discarded
        assert found.ends == ()


def test_several_grasps_need_the_exact_count() -> None:
    assert align([event(10, 20), event(30, None)], TWICE, 50).ends == (10, 20, 30, 50)
    assert align([event(10, 20), event(30, 40)], TWICE, 50).ends == (10, 20, 30, 50)  # letting go at the end is no step
    for events, count in (([event(10, 20)], 2), ([event(5, 9), event(15, 20), event(30, None)], 5)):
        discarded = align(events, TWICE, 50).discarded
        assert discarded is not None and f"{count} contact boundaries found, 3 needed" in discarded


def test_optional_steps_are_used_if_events_provide_for_them() -> None:
    plan = default_planner().plan("open the drawer")
    assert [s.prompt for s in align([event(20, None)], plan.schema, 40).steps] == [
        "grasp the handle of the drawer",
        "open the drawer",
    ]
    assert [s.prompt for s in align([], plan.schema, 40).steps] == ["open the drawer"]


def test_steps_that_end_with_the_episode_need_no_contact() -> None:
    """Experts of drawer-close and door-open close the empty gripper from the first frame: no grasp, one skill."""
    found = align([event(5, None, EMPTY)], default_planner().plan("close the drawer").schema, 44, HAND)
    assert found.ends == (44,) and found.notes == ("contact_on at 5 not used: no step ends there",)


# -- an external answer ------------------------------------------------------------------------------------------------

GIVEN = candidates_of([event(10, 20), event(30, None)])
RIGHT = [
    {"step": 0, "index": 10, "reason": "a"},
    {"step": 1, "index": 20, "reason": "b"},
    {"step": 2, "index": 30, "reason": "c"},
]


def changed(position: int, **fields: Any) -> list[dict[str, Any]]:
    return [{**r, **fields} if i == position else r for i, r in enumerate(RIGHT)]


def test_candidates() -> None:
    assert [(c.index, c.kind) for c in GIVEN] == [(10, "contact_on"), (20, "contact_off"), (30, "contact_on")]


def test_right_answer_is_taken() -> None:
    assert validate_answer({"boundaries": RIGHT}, TWICE.steps, GIVEN) == ((10, "a"), (20, "b"), (30, "c"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "must be an object"),
        ({"boundaries": "10"}, "must be an object with a list"),
        ({"boundaries": RIGHT[:2]}, "wrong count, 2 given, 3 needed"),
        ({"boundaries": [*RIGHT, RIGHT[0]]}, "wrong count, 4 given"),
        ({"boundaries": changed(1, index=21)}, r"boundaries\[1\].index: 21 was not given; given are \[10, 20, 30\]"),
        ({"boundaries": changed(2, index=10)}, r"boundaries\[2\].index: wrong order, 10 does not come after 20"),
        ({"boundaries": [RIGHT[1], RIGHT[0], RIGHT[2]]}, r"boundaries\[0\].step: wrong order, 1 given, 0 expected"),
        ({"boundaries": changed(0, index=20)}, "20 is a contact_off, step 0 ends at contact_on"),
        ({"boundaries": changed(0, index=True)}, "integers"),
        ({"boundaries": changed(0, index=10.0)}, "integers"),
        ({"boundaries": [7, *RIGHT[1:]]}, "integers"),
        ({"boundaries": changed(0, reason="")}, "reason"),
        ({"boundaries": changed(0, reason="x" * 501)}, "reason"),
    ],
)
def test_wrong_answers_are_rejected_with_a_reason(answer: Any, message: str) -> None:
    with pytest.raises(AnswerRejectedError, match=message):
        validate_answer(answer, TWICE.steps, GIVEN)


@given(st.permutations([10, 20, 30]), st.lists(st.integers(0, 40), min_size=3, max_size=3))
def test_only_the_right_answer_passes(order: list[int], indices: list[int]) -> None:
    for chosen in (order, indices):
        rows = [{"step": i, "index": index, "reason": "r"} for i, index in enumerate(chosen)]
        if chosen == [10, 20, 30]:
            validate_answer({"boundaries": rows}, TWICE.steps, GIVEN)
        else:
            with pytest.raises(AnswerRejectedError):
                validate_answer({"boundaries": rows}, TWICE.steps, GIVEN)


# -- cutting -----------------------------------------------------------------------------------------------------------


def test_known_series_of_every_task() -> None:
    """The shapes of Meta-World's experts, 40 actions each."""
    still = series((41, OPEN))
    grasp = np.r_[np.full(17, OPEN), np.linspace(OPEN, 0.026, 6), np.full(18, PUCK)]  # below 0.0433 m from frame 21
    fist = np.r_[np.linspace(OPEN, EMPTY, 8), np.full(33, EMPTY)]
    squeezed = np.r_[np.full(30, OPEN), np.full(11, 0.058)]
    for instruction, widths, expected in (
        ("reach the green goal", still, [("reach the green goal", 0, 40)]),
        ("push the puck to the goal", grasp, [("grasp the puck", 0, 24), ("push the puck to the goal", 24, 40)]),
        (PICK, grasp, [("pick up the puck", 0, 24), ("place the puck at the goal", 24, 40)]),
        ("open the drawer", still, [("open the drawer", 0, 40)]),
        ("close the drawer", fist, [("close the drawer", 0, 40)]),
        ("press the red button", squeezed, [("press the red button", 0, 40)]),
        ("open the door", fist, [("open the door", 0, 40)]),
    ):
        assert cuts(segment_series(widths, instruction)) == expected


@given(st.integers(9, 60), st.integers(1, 60), st.integers(0, 3))
def test_skills_are_whole_chunks_that_cover_the_episode(onset: int, held: int, rest: int) -> None:
    widths = series((onset, OPEN), (held + rest, PUCK))
    segmentation = segment_series(widths, PICK)
    actions = widths.size - 1
    if segmentation.discarded is not None:
        assert segmentation.skills == () and (held + rest < 3 or snap(onset, 0) + M > actions // M * M)
        return
    pick, place = segmentation.skills
    assert (pick.start, pick.end, place.end) == (0, place.start, actions // M * M)
    assert (pick.end - pick.start) % M == 0 and (place.end - place.start) % M == 0 and place.end > place.start
    assert 0 <= pick.end - onset < M  # moved up, by less than a chunk
    assert len(segmentation.reasons) >= 2 and all(s.reason for s in segmentation.skills)


@pytest.mark.parametrize(
    ("widths", "reason"),
    [
        (series((40, OPEN)), "step missing"),
        (series((37, OPEN), (4, PUCK)), "step 'place the puck at the goal' has less than one chunk of 4 actions"),
        (series((3, OPEN)), "fewer than one chunk"),
    ],
)
def test_discarded_with_a_reason(widths: np.ndarray, reason: str) -> None:
    segmentation = segment_series(widths, PICK if widths.size > 3 else "open the door")
    assert segmentation.discarded is not None and reason in segmentation.discarded and segmentation.skills == ()


def test_bad_input_names_the_field() -> None:
    for arguments, message in (
        (([], PICK), "gripper_width_m: is empty"),
        (([80.0], PICK), "millimetres"),
        (([0.1], ""), "instruction: is empty"),
        (([0.1], "x" * 501), "the limit is 500"),
    ):
        with pytest.raises(ValueError, match=message):
            segment_series(*arguments)
    with pytest.raises(ValueError, match="has 3 values, but the episode has 9 frames"):
        segment_series([0.1] * 3, PICK, frames=9)


def test_json_round_trip() -> None:
    for widths in (series((20, OPEN), (21, PUCK)), series((41, OPEN))):
        segmentation = segment_series(widths, PICK)
        assert Segmentation.from_json(json.loads(json.dumps(segmentation.to_json()))) == segmentation


def episode(widths: np.ndarray, actions: int) -> Episode:
    return Episode(
        task="pick-place",
        split="worldmodel",
        index=0,
        instruction="do it",
        images={},
        states=np.zeros((actions + 1, 4), np.float32),
        widths=widths.astype(np.float32),
        actions=np.zeros((actions, 4), np.float32),
        success=True,
    )


def test_episode() -> None:
    assert cuts(segment_episode(episode(series((20, OPEN), (21, PUCK)), 40))) == [
        ("pick up the puck", 0, 20),
        ("place the puck at the goal", 20, 40),
    ]
    with pytest.raises(ValueError, match="has 40 values, but the episode has 41 frames"):
        segment_episode(episode(series((20, OPEN), (20, PUCK)), 40))


# -- online ------------------------------------------------------------------------------------------------------------


@given(st.integers(9, 50), st.integers(7, 40), st.sampled_from([1, M]))
def test_online_agrees_with_the_cut_at_every_chunk_start(onset: int, held: int, stride: int) -> None:
    widths = series((onset, OPEN), (held, PUCK))
    segmentation = segment_series(widths, PICK)
    if segmentation.discarded is not None:
        return
    plan = default_planner().plan(PICK)
    for start in range(0, segmentation.skills[-1].end, M):
        seen = widths[: start + 1 : stride]
        expected = next(i for i, s in enumerate(segmentation.skills) if s.start <= start < s.end)
        assert skill_index_online(seen, plan, stride=stride) == expected, start


@given(st.lists(st.floats(0, 0.0883), min_size=1, max_size=60), st.integers(1, 59))
def test_online_is_causal_and_incremental(widths: list[float], cut: int) -> None:
    plan = default_planner().plan(PICK)
    online = OnlineSkill(plan)
    prompts = [online.update(w) for w in widths]
    whole = OnlineSkill(plan)
    whole.update(widths[:cut])
    assert plan.schema.steps[skill_index_online(widths[:cut], plan)].prompt == whole.prompt == prompts[: len(widths[:cut])][-1]


def test_online_falls_back() -> None:
    online = OnlineSkill(default_planner().plan(PICK))
    pick, place = "pick up the puck", "place the puck at the goal"
    assert online.update(series((12, OPEN))) == pick
    assert online.update(series((3, 0.04))) == place
    assert online.update(series((2, EMPTY))) == pick  # closed on nothing
    assert online.update(series((6, 0.03))) == pick  # pushed apart, but still nothing was grasped
    assert online.update(series((3, OPEN), (4, PUCK))) == place  # opened and grasped again
    assert online.update(series((1, OPEN))) == pick  # let go
    assert online.update([PUCK] * 3) == place
    online.reset()
    assert online.update(OPEN) == pick and online.index == 0


def test_online_ignores_a_closure_at_the_start_until_it_opens() -> None:
    online = OnlineSkill(default_planner().plan(PICK))
    assert online.update(series((2, OPEN), (30, PUCK))) == "pick up the puck"
    assert online.update(series((4, OPEN), (2, PUCK))) == "place the puck at the goal"


def test_online_through_several_grasps() -> None:
    hand = GripperCalibration(0.1, 0.05, 0.03)
    widths = series((10, 0.1), (10, 0.04), (10, 0.1), (10, 0.04), (5, 0.1))
    seen = [skill_index_online(widths[: t + 1], TWICE, hand) for t in range(widths.size)]
    assert [seen[t] for t in (9, 10, 19, 20, 29, 30, 39)] == [0, 1, 1, 2, 2, 3, 3]


def test_optional_steps_are_never_active_online() -> None:
    online = OnlineSkill(default_planner().plan("open the drawer"))
    assert online.update(OPEN) == "open the drawer" and online.index == 1
    assert online.update(series((20, PUCK))) == "open the drawer"


def test_online_bad_input() -> None:
    plan = default_planner().plan(PICK)
    with pytest.raises(ValueError, match="stride: 0 must be at least 1"):
        OnlineSkill(plan, stride=0)
    with pytest.raises(ValueError, match=r"gripper_width_m: .*millimetres"):
        OnlineSkill(plan).update(80.0)


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics() -> None:
    good, bad = segment_series(series((20, OPEN), (21, PUCK)), PICK), segment_series(series((41, OPEN)), PICK)
    found = summarise([good, good, bad, segment_series(series((33, OPEN)), "open the door")])
    assert (found.episodes, found.synced, found.clips, found.sync_rate) == (4, 3, 5, 0.75)
    assert found.sync_rate_by_task == {"door-open": 1.0, "pick-place": pytest.approx(2 / 3)}
    assert list(found.discard_reasons.values()) == [1] and "step missing" in next(iter(found.discard_reasons))
    assert (found.median_before, found.median_after) == (40.0, 20.0)
    assert found.density_gain == pytest.approx(found.density_after / found.density_before - 1)
    assert json.loads(json.dumps(found.to_json()))["clips"] == 5


def test_density() -> None:
    assert density_at_median([]) == (0.0, 0.0)
    median, sharp = density_at_median([20] * 10)
    assert median == 20 and sharp == pytest.approx(1 / (M * np.sqrt(2 * np.pi)))
    assert density_at_median(range(0, 400, 4))[1] < sharp / 5
    assert summarise([]).sync_rate == 0.0
