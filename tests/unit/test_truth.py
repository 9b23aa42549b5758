"""What a simulator knew, as skills; and ways of segmenting scored against it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from world2act.segmentation import Step, TaskSchema, load_schemas
from world2act.segmentation.comparison import EVENTS, FILM, MODEL, SCHEMA, compare
from world2act.segmentation.planner import Plan, RuleBasedPlanner
from world2act.segmentation.scoring import Score
from world2act.segmentation.truth import true_changes, true_skills
from world2act.types import Episode, FloatArray, Skill

FRAMES = 41
PICK = TaskSchema("pick-place", (Step("pick it up", "contact_on"), Step("place it", "end")))
PUSH = TaskSchema("drawer-close", (Step("reach it", "touch_on", optional=True), Step("close it", "end")))


def series(*spans: tuple[int, int, float], rest: float = 0.0) -> FloatArray:
    """(F,) of `rest`, but a value in each span [start, end)."""
    values = np.full(FRAMES, rest, np.float32)
    for start, end, value in spans:
        values[start:end] = value
    return values


def lifted(start: int) -> FloatArray:
    return np.maximum(0, np.arange(FRAMES) - start).astype(np.float32) * 0.01


def test_the_last_grasp_that_moves_something_ends_the_pick() -> None:
    """One finger, then a slip, then the grasp with a flicker; another thing is pinched without moving."""
    touch = series((8, 10, 1), (10, 13, 2), (20, 22, 2), (24, 41, 2))
    truth = {"touch/can": touch, "height/can": lifted(22), "touch/box": series((30, 34, 2)), "height/box": series()}
    assert (20, "contact_on") in true_changes(truth) and not any(kind == "contact_off" for _, kind in true_changes(truth))
    assert true_skills(truth, PICK, 40) == (Skill("pick it up", 0, 20), Skill("place it", 20, 40))


def test_a_drawer_is_pushed_from_when_it_moves_whatever_part_of_the_arm_does_it() -> None:
    closing = np.clip((np.arange(FRAMES) - 15) * 0.01, 0, 0.15).astype(np.float32) - 0.15
    truth = {"touch/drawer": series((28, 41, 1)), "joint/drawer": closing}
    assert true_skills(truth, PUSH, 40) == (Skill("reach it", 0, 16), Skill("close it", 16, 40))
    plate = {"touch/plate": series((12, 13, 1), (20, 41, 1)), "height/plate": series()}
    assert true_skills(plate, PUSH, 40) == (Skill("reach it", 0, 20), Skill("close it", 20, 40))
    assert true_skills({"touch/drawer": series(), "joint/drawer": series()}, PUSH, 40) == (Skill("close it", 0, 40),)


def test_no_truth_where_a_step_did_not_happen() -> None:
    assert true_skills({"touch/can": series(), "height/can": series()}, PICK, 40) is None
    with pytest.raises(ValueError, match="truth: has no touch"):
        true_changes({"height/can": series()})


def episode() -> Episode:
    rng = np.random.default_rng(0)
    return Episode(
        task="libero_object-pick",
        split="worldmodel",
        index=0,
        instruction="pick up the milk and place it in the basket",
        images={"primary": rng.integers(0, 255, (FRAMES, 16, 16, 3), np.uint8)},
        states=np.zeros((FRAMES, 2), np.float32),
        widths=series((18, 36, 0.04), rest=0.08),
        actions=np.zeros((40, 2), np.float32),
        success=True,
        truth={"touch/milk": series((19, 37, 2)), "height/milk": lifted(20)},
    )


def test_methods_are_scored_on_the_same_truth() -> None:
    hand = load_schemas().calibration("panda")
    found = compare(episode(), hand, (1, 4))
    assert set(found) == {EVENTS, SCHEMA, FILM}, "no model was given"
    # Contact from 18 to 36: the schema cuts once, at 20 (the next chunk); events alone also where it is let go.
    at_1, at_4 = found[SCHEMA].boundaries
    assert (at_1.hits, at_1.found, at_1.true, at_1.error) == (1, 1, 1, 1) and at_4.f1 == 1.0
    assert found[SCHEMA].label_accuracy == 39 / 40
    assert found[EVENTS].boundaries[1].f1 == pytest.approx(2 / 3) and found[EVENTS].label_accuracy == 0.0, (
        "three pieces, two phrases"
    )
    both = found[SCHEMA] + found[SCHEMA]
    assert both.episodes == 2 and both.boundaries[0].hits == 2 and Score.from_json(both.to_json()) == both
    kept = compare(replace(episode(), widths=series((18, 41, 0.04), rest=0.08)), hand, (1,))
    assert kept[EVENTS].label_accuracy == 39 / 40, "two pieces, two phrases"
    assert set(compare(replace(episode(), images={}), None, (1,))) == set()
    assert compare(replace(episode(), truth=None), hand, (1,)) == {}
    assert compare(replace(episode(), truth={"touch/milk": series()}), hand, (1,)) == {}, "no grasp, no truth"


def test_what_is_scored_is_cut_by_the_cues_that_the_tool_uses() -> None:
    """Fingers that a box holds 72 mm apart: only the command shows it."""
    hand = load_schemas().calibration("panda")
    wide = replace(episode(), widths=series((18, 41, 0.072), rest=0.08))
    told = replace(wide, cues={"command": series((18, 41, 1.0), rest=-1.0)})
    assert [compare(e, hand, (4,))[SCHEMA].cut for e in (wide, told)] == [0, 1]
    assert compare(told, hand, (4,))[SCHEMA].boundaries[0].f1 == 1.0


def test_a_model_is_scored_by_what_it_answers() -> None:
    class Wrong:
        """Understands something else, and aligns as the rules do."""

        def plan(self, instruction: str, task: str | None = None) -> Plan:
            assert task is None, "methods get the instruction alone"
            return RuleBasedPlanner().plan("pick up the soup and place it in the basket")

        def align(self, events, schema, actions, hand=None):  # type: ignore[no-untyped-def]
            from world2act.segmentation.alignment import align

            return align(events, schema, actions, hand)

    found = compare(episode(), load_schemas().calibration("panda"), (4,), (Wrong(), Wrong()))
    assert found[MODEL].boundaries[0].f1 == 1.0 and found[MODEL].label_accuracy == 0.0


def test_scores_of_another_version_are_refused_in_a_sentence() -> None:
    whole = Score(2, 1, (), 3, 4).to_json()
    assert Score.from_json(whole) == Score(2, 1, (), 3, 4)
    for other in ({k: v for k, v in whole.items() if k != "cut"}, {**whole, "boundaries": [{"hit": 1}]}, {"episodes": 1}):
        with pytest.raises(ValueError, match="scores: are of another version"):
            Score.from_json(other)
