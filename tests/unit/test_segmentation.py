"""Gripper events, task schemas and the planner. Synthetic series have known truth; bad input names field and limit."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from world2act.segmentation import (
    GripperCalibration,
    RuleBasedPlanner,
    check_widths,
    contact_events,
    hand_of,
    load_schemas,
    parse_schemas,
)
from world2act.segmentation.events import MAX_FRAMES, as_json
from world2act.segmentation.schemas import with_determiner
from world2act.types import Episode

HAND = GripperCalibration(open_width_m=0.1, delta_on_m=0.05, delta_off_m=0.03, min_frames=3, min_gap_frames=3)
PLANNER = RuleBasedPlanner()


def spans(widths: Any, calibration: GripperCalibration = HAND, **kwargs: Any) -> list[tuple[int, int | None]]:
    return [(e.onset, e.offset) for e in contact_events(widths, calibration, **kwargs)]


def series(*parts: tuple[int, float]) -> np.ndarray:
    """(frames, width) pairs, one after the other."""
    return np.concatenate([np.full(n, w) for n, w in parts])


# -- events ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        (series((10, 0.1)), []),
        (series((10, 0.1), (10, 0.04)), [(10, None)]),
        (series((10, 0.1), (10, 0.04), (10, 0.1)), [(10, 20)]),
        (series((5, 0.02)), [(0, None)]),
        (series((10, 0.1), (2, 0.04), (10, 0.1)), []),  # shorter than min_frames
        (series((10, 0.1), (3, 0.04), (10, 0.1)), [(10, 13)]),
        (series((10, 0.1), (5, 0.04), (2, 0.1), (5, 0.04), (9, 0.1)), [(10, 22)]),  # gap shorter than min_gap_frames
        (series((10, 0.1), (1, 0.04), (1, 0.1), (1, 0.04), (9, 0.1)), []),  # two spikes, one frame of gap
        (series((10, 0.1), (5, 0.04), (3, 0.1), (5, 0.04), (9, 0.1)), [(10, 15), (18, 23)]),
        (series((10, 0.1), (5, 0.04), (9, 0.065), (5, 0.1)), [(10, 24)]),  # hysteresis: 0.065 keeps a contact ...
        (series((10, 0.1), (9, 0.065), (5, 0.1)), []),  # ... but starts none
        (series((9, 0.065), (5, 0.04)), [(9, None)]),  # undecided at the start counts as open
        (series((10, 0.1), (4, 0.05)), [(10, None)]),  # exactly the threshold
    ],
)
def test_events(widths: np.ndarray, expected: list[tuple[int, int | None]]) -> None:
    assert spans(widths) == expected


def test_event_widths() -> None:
    (event,) = contact_events(series((10, 0.1), (1, 0.03), (9, 0.045)), HAND)
    assert event.width_m == pytest.approx(0.045) and event.low_m == pytest.approx(0.03)
    row = {"onset": 10, "offset": None, "width_m": 0.045, "low_m": 0.03, "kind": "grasp"}
    assert json.loads(json.dumps(as_json([event])))[0] == row
    (event,) = contact_events(series((10, 0.1), (5, 0.045), (2, 0.0), (5, 0.045)), HAND)
    assert event.low_m == pytest.approx(0.045), "two frames without a reading are no missed grasp"
    slip = [0.1] * 10 + [0.04, 0.035, 0.033, 0.024, 0.018, 0.019, 0.024, 0.03, 0.04]
    assert contact_events(slip, HAND)[0].low_m == pytest.approx(0.018), "fingers that slip off are real, however short"


def test_thirty_noisy_series_with_known_truth() -> None:
    """Open, close on an object at a known frame, open again: both ends found within the ramp, nothing else."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        onset, held, tail = (int(n) for n in rng.integers((12, 8, 6), (40, 60, 30)))
        grasp = float(rng.uniform(0.02, 0.04))
        ramp = int(rng.integers(1, 6))
        clean = np.r_[
            np.full(onset, 0.1),
            np.linspace(0.1, grasp, ramp + 2),
            np.full(held, grasp),
            np.linspace(grasp, 0.1, 4),
            np.full(tail, 0.1),
        ]
        noisy = np.clip(clean + rng.normal(0, 0.002, clean.size), 0, None)
        spikes = rng.integers(0, onset - 2, 2)  # a finger that jumps for one frame
        noisy[spikes] -= 0.06
        found = spans(np.clip(noisy, 0, None))
        crossing = onset + int(np.argmax(clean[onset:] <= 0.05))
        opened = crossing + int(np.argmax(clean[crossing:] > 0.07))
        assert len(found) == 1, (seed, found)
        assert abs(found[0][0] - crossing) <= 1 and found[0][1] is not None and abs(found[0][1] - opened) <= 1, (seed, found)


def test_commanded_gap_finds_a_wide_object() -> None:
    """Fingers stop at 0.06 m, never at delta_on; the command to close shows that something holds them apart."""
    widths = np.r_[np.full(10, 0.1), np.linspace(0.1, 0.06, 6), np.full(14, 0.06), np.linspace(0.06, 0.1, 4), np.full(6, 0.1)]
    commanded = np.where(np.arange(widths.size) < 10, 0.1, np.where(np.arange(widths.size) < 30, 0.0, 0.1))
    assert spans(widths) == []
    ((onset, offset),) = spans(widths, commanded=commanded)
    assert 15 <= onset <= 17 and offset is not None and 30 <= offset <= 33
    # Lag is no object: an empty hand that is still moving after its command.
    moving = np.r_[np.full(10, 0.1), np.linspace(0.1, 0.052, 12), np.full(2, 0.1)]
    assert spans(moving, commanded=np.r_[np.full(10, 0.1), np.zeros(12), np.full(2, 0.1)]) == []


@given(st.lists(st.floats(0, 0.12), min_size=1, max_size=120))
def test_events_are_ordered_apart_and_long_enough(widths: list[float]) -> None:
    events = contact_events(widths, HAND)
    for e in events:
        end = len(widths) if e.offset is None else e.offset
        assert 0 <= e.onset < end <= len(widths) and end - e.onset >= HAND.min_frames
        assert 0.1 - widths[e.onset] >= HAND.delta_on_m and e.low_m <= e.width_m
    for a, b in itertools.pairwise(events):
        assert a.offset is not None and b.onset - a.offset >= HAND.min_gap_frames


@given(st.lists(st.floats(0, 0.12), min_size=1, max_size=80))
def test_events_match_a_frame_by_frame_hysteresis(widths: list[float]) -> None:
    hand = GripperCalibration(0.1, 0.05, 0.03, 1, 1)
    state, expected = False, []
    for w in widths:
        state = True if 0.1 - w >= 0.05 else False if 0.1 - w < 0.03 else state
        expected.append(state)
    found = np.zeros(len(widths), bool)
    for e in contact_events(widths, hand):
        found[e.onset : e.offset] = True
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("widths", "frames", "message"),
    [
        ([], None, "gripper_width_m: is empty"),
        ([0.1, float("nan")], None, "gripper_width_m: value 1 is NaN or infinite"),
        ([float("inf")], None, "gripper_width_m: value 0 is NaN or infinite"),
        ([0.1, -0.01], None, "gripper_width_m: value 1 is -0.01; a width is at least 0 m"),
        ([80.0, 40.0], None, "more than 0.5 m: this looks like millimetres"),
        ([0.1] * 9, 10, "gripper_width_m: has 9 values, but the episode has 10 frames"),
        ([[0.1, 0.1]], None, r"gripper_width_m: must have one dimension .* got shape \(1, 2\)"),
        (0.1, None, "must have one dimension"),
        (["a"], None, "gripper_width_m: must be a list of numbers"),
        ([None], None, "gripper_width_m: "),
        (np.zeros(MAX_FRAMES + 1), None, f"the limit is {MAX_FRAMES}"),
    ],
)
def test_bad_widths(widths: Any, frames: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_events(widths, HAND, frames=frames)


def test_bad_commanded_widths_name_their_own_field() -> None:
    with pytest.raises(ValueError, match="commanded_width_m: has 2 values, but the episode has 3 frames"):
        contact_events([0.1] * 3, HAND, commanded=[0.1] * 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 0.05, 0.03), "open_width_m"),
        ((80, 50, 30), "open_width_m"),
        ((0.1, 0.03, 0.05), "delta_off_m <= delta_on_m"),
        ((0.1, 0.2, 0.05), "delta_on_m"),
        ((0.1, 0.05, 0.03, 0), "min_frames"),
        ((0.1, 0.05, 0.03, 1, 0), "min_gap_frames"),
        ((0.1, 0.05, 0.03, 1, 1, -1), "gap_m"),
        ((0.1, 0.05, 0.03, 1, 1, 0.01, 0.01, 0.1), "min_object_width_m"),
        ((0.1, 0.05, 0.03, 1, 1, 0.01, 0.01, 0.0, -1), "start_frames"),
    ],
)
def test_bad_calibrations(values: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GripperCalibration(*values)  # type: ignore[arg-type]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=20))
def test_any_series_is_taken_or_refused_with_its_field(widths: list[float]) -> None:
    try:
        assert check_widths(widths).shape == (len(widths),)
    except ValueError as e:
        assert str(e).startswith("gripper_width_m: ")


# -- schemas and planner -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "task", "prompts"),
    [
        ("reach the green goal", "reach", ("reach the green goal",)),
        ("move the hand to the goal", "reach", ("reach the goal",)),
        ("push the puck to the green goal", "push", ("grasp the puck", "push the puck to the green goal")),
        ("push the puck", "push", ("grasp the puck", "push the puck to the goal")),
        (
            "pick up the puck and place it at the green goal",
            "pick-place",
            ("pick up the puck", "place the puck at the green goal"),
        ),
        (
            "Pick up the red puck, then put it on the shelf.",
            "pick-place",
            ("pick up the red puck", "place the red puck on the shelf"),
        ),
        ("pick the puck up and place it on the goal", "pick-place", ("pick up the puck", "place the puck on the goal")),
        ("pick up the puck, place it at the goal", "pick-place", ("pick up the puck", "place the puck at the goal")),
        ("pick-and-place the puck in box", "pick-place", ("pick up the puck", "place the puck in the box")),
        ("pick_place", "pick-place", ("pick up the puck", "place the puck at the goal")),
        ("open the drawer", "drawer-open", ("open the drawer",)),
        ("Please open top drawer!", "drawer-open", ("open the top drawer",)),
        ("close the drawer", "drawer-close", ("close the drawer",)),
        ("press the red button", "button-press", ("press the red button",)),
        ("open the door", "door-open", ("open the door",)),
    ],
)
def test_known_instructions(instruction: str, task: str, prompts: tuple[str, ...]) -> None:
    plan = PLANNER.plan(instruction)
    assert (plan.task, plan.prompts) == (task, prompts)


@pytest.mark.parametrize(
    ("instruction", "prompts"),
    [
        ("open the drawer and close the door", ("open the drawer", "close the door")),
        ("wipe the table and then go home, turn off the light", ("wipe the table", "go home", "turn off the light")),
        ("pick up the red cup from the shelf then wash it", ("pick up the red cup from the shelf", "wash the red cup")),
        ("put the salt and pepper in the box", ("put the salt and pepper in the box",)),
        ("juggle three balls then juggle four", ("juggle three balls", "juggle four")),
        ("pick up the cup and jump", ("pick up the cup and jump",)),
        ("then", ("then",)),
        ("打开 抽屉", ("打开 抽屉",)),
    ],
)
def test_unknown_instructions_become_verb_phrases(instruction: str, prompts: tuple[str, ...]) -> None:
    plan = PLANNER.plan(instruction)
    assert plan.task is None and plan.prompts == prompts


def test_endings_of_verb_phrases() -> None:
    """Picking ends at contact, other steps at the end of contact, the last with the episode (the paper's action cycle)."""
    plan = PLANNER.plan("grab the mug then put the mug on the rack then wipe the table")
    assert [s.ends for s in plan.schema.steps] == ["contact_on", "contact_off", "end"]


def test_the_simulators_task_name_decides() -> None:
    assert PLANNER.plan("do the usual", "drawer-open").prompts == ("open the drawer",)
    assert PLANNER.plan("press the red button", "button-press").prompts == ("press the red button",)
    assert PLANNER.plan("open the door", "no-such-task").task == "door-open"


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("", "instruction: is empty"),
        (" \n\t", "instruction: is empty"),
        ("?!_", "instruction: is empty"),
        ("x" * 501, "instruction: has 501 characters, the limit is 500"),
        ("x" * 10_000, "instruction: has 10000 characters, the limit is 500"),
        (7, "instruction: must be text, got int"),
        (" then ".join(["go"] * 60), "instruction: has 60 steps, the limit is 32"),
    ],
)
def test_bad_instructions(instruction: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PLANNER.plan(instruction)


@given(st.text(max_size=500))
def test_any_text_is_planned_or_refused(text: str) -> None:
    try:
        plan = PLANNER.plan(text)
    except ValueError as e:
        assert str(e).startswith("instruction: ")
    else:
        assert plan.prompts and all(p.strip() for p in plan.prompts)


@given(
    st.lists(
        st.sampled_from(["pick", "up", "the puck", "and", "place", "it", "at goal", "then", "open", "drawer", ","]), max_size=60
    )
)
def test_long_almost_matching_texts_are_quick(words: list[str]) -> None:
    """No pattern may need exponential time; the time limit of the test run would tell."""
    load_schemas().match(" ".join(words)[:500])


def test_determiners() -> None:
    assert with_determiner("on shelf") == "on the shelf"
    assert with_determiner("a red cup") == "a red cup"


HANDS = {"hand": {"open_width_m": 0.1, "delta_on_m": 0.05, "delta_off_m": 0.03}}


def row(**changes: Any) -> dict[str, Any]:
    return {"task": "t", "steps": [{"prompt": "open {object}", "ends": "end"}], "slots": {"object": "it"}, **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "schemas: must be an object"),
        ({"tasks": [{}]}, r"schemas.tasks\[0\].task: a name"),
        ({"tasks": [row(), row()]}, "'t' occurs twice"),
        ({"tasks": [row(colour=1)]}, r"schemas.tasks\[0\]: unknown field 'colour'"),
        ({"tasks": [row(steps=[])]}, "1 to 32 steps"),
        ({"tasks": [row(steps=["open"])]}, r"steps\[0\]: must be an object"),
        ({"tasks": [row(steps=[{"prompt": "x", "ends": "never"}])]}, r"steps\[0\].ends: 'never' must be one of contact_on"),
        ({"tasks": [row(steps=[{"prompt": "x", "ends": "end"}] * 2)]}, r"steps\[0\].ends: only the last step"),
        ({"tasks": [row(steps=[{"prompt": "", "ends": "end"}])]}, r"steps\[0\].prompt: text"),
        ({"tasks": [row(slots={})]}, r"steps\[0\].prompt: slot 'object' has no default"),
        ({"tasks": [row(steps=[{"prompt": "x", "ends": "end", "optional": True}])]}, "must not be optional"),
        ({"tasks": [row(min_object_width_m=-1)]}, "min_object_width_m"),
        ({"tasks": [row(patterns=["("])]}, "is no regular expression"),
        ({"tasks": [row()], "calibrations": {"hand": {"open": 1}}}, "schemas.calibrations.hand"),
        ({"tasks": [row()], "calibrations": {"hand": {"open_width_m": 9, "delta_on_m": 1, "delta_off_m": 1}}}, "open_width_m"),
        ({"tasks": [row()], "suite": {}}, "schemas: unknown field 'suite'; there are about, calibrations, suites, tasks, verbs"),
        ({"tasks": [row(patterns=[5])]}, r"schemas.tasks\[0\].patterns: must be a list of texts"),
        ({"tasks": [row(patterns="open")]}, r"schemas.tasks\[0\].patterns: must be a list of texts"),
        ({"tasks": [row(slots=[])]}, r"schemas.tasks\[0\].slots: must be an object, got list"),
        ({"tasks": [row(slots={"object": 5})]}, r"schemas.tasks\[0\].slots.object: must be text, got 5"),
        ({"tasks": [row(steps=[{"prompt": "x", "ends": []}])]}, r"steps\[0\].ends: \[\] must be one of"),
        ({"tasks": [row(steps=[{"prompt": "x", "ends": "end", "optional": "no"}])]}, "optional: must be true or false, got 'no'"),
        *(
            ({"tasks": [row(steps=[{"prompt": prompt, "ends": "end"}])]}, r"tasks\[0\].steps\[0\].prompt: 'go .* has braces")
            for prompt in ("go {object.x}", "go {object", "go object}", "go {}", "go {0}", "go {object!r}", "go {object:>9}")
        ),
        ({"tasks": [row()], "calibrations": []}, "schemas.calibrations: must be an object, got list"),
        ({"tasks": [row()], "calibrations": {"hand": []}}, "schemas.calibrations.hand: must be an object, got list"),
        ({"tasks": [row()], "calibrations": {"hand": {"open_width_m": "a"}}}, "calibrations.hand.open_width_m: 'a' is no number"),
        ({"tasks": [row()], "calibrations": {"hand": {"min_frames": 2.5}}}, "hand.min_frames: 2.5 is no whole number"),
        ({"tasks": [row()], "verbs": []}, "schemas.verbs: must be an object, got list"),
        ({"tasks": [row()], "verbs": {"other": "go"}}, "schemas.verbs.other: must be a list of texts"),
        ({"tasks": [row()], "verbs": {"others": ["go"]}}, "schemas.verbs: unknown field 'others'"),
        ({"tasks": [row()], "suites": []}, "schemas.suites: must be an object, got list"),
        ({"tasks": [row()], "suites": {"s": {"embodiment": [], "tasks": ["x"]}}}, r"schemas.suites.s.embodiment: \[\] has no"),
        (
            {"tasks": [row()], "calibrations": HANDS, "suites": {"s": {"embodiment": "hand", "tasks": {"a": " "}}}},
            "schemas.suites.s.tasks.a: instruction: is empty",
        ),
    ],
)
def test_bad_schemas(content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_schemas(content)


def test_schemas_of_ones_own(tmp_path: Path) -> None:
    """A new simulator is rows in a file."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"tasks": [row(task="jar-open", patterns=["unscrew <object:jar>"])], "calibrations": {}}))
    plan = RuleBasedPlanner(load_schemas(path)).plan("unscrew small jar")
    assert (plan.task, plan.prompts) == ("jar-open", ("open the small jar",))
    path.with_name("bad.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_schemas(path.with_name("bad.json"))
    path.with_name("bad.json").write_text(f'{{"tasks": [{"9" * 5000}]}}')
    with pytest.raises(ValueError, match="schemas: not JSON"):
        load_schemas(path.with_name("bad.json"))


def test_shipped_schemas() -> None:
    table = load_schemas()
    rows = {r.task for r in table.tasks}
    assert rows >= {"reach", "push", "pick-place", "drawer-open", "drawer-close", "button-press", "door-open"}
    assert len(table.task("pick-place").steps) == 2  # the paper: exactly pick and place
    with pytest.raises(ValueError, match="task: 'fly' has no schema; there are pick-place"):
        table.task("fly")
    with pytest.raises(ValueError, match="embodiment: 'octopus' is unknown; choose one of metaworld"):
        table.calibration("octopus")


def test_the_hand_of_an_episode_opens_as_wide_as_its_file_says() -> None:
    def told(robot: str, **env_args: object) -> Episode:
        meta = {"robot": robot, **({"env_args": json.dumps(env_args)} if env_args else {})}
        widths = np.linspace(0.01, 0.06, 9, dtype=np.float32)
        nothing = np.zeros((8, 4), np.float32)
        states = np.zeros((9, 4), np.float32)
        return Episode("reach", "worldmodel", 0, "reach the goal", {}, states, widths, nothing, True, meta=meta)

    table = load_schemas()
    panda = table.calibration("panda")
    assert hand_of(told("libero")) == panda
    told_width = hand_of(told("libero", gripper_open_width=0.0775))
    assert told_width == replace(panda, open_width_m=0.0775)
    assert told_width == table.calibration_of("libero", 0.0775), "as a running policy has it"
    assert hand_of(told("octopus")) == table.calibration_of("octopus", float(np.float32(0.06)))
    assert hand_of(told("octopus"), "panda") == panda
    assert hand_of(replace(told("octopus"), widths=np.full(9, np.nan, np.float32))) == table.calibration("metaworld")
    with pytest.raises(ValueError, match=r"env_args\.gripper_open_width: must be a number, metres, got 'wide'"):
        hand_of(told("libero", gripper_open_width="wide"))
