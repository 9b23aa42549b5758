"""Noisy series, pushes, films and scores: synthetic, with known truth."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from world2act.segmentation import (
    BoundaryScore,
    TouchCalibration,
    align,
    boundaries,
    boundary_score,
    calibrated,
    change_points,
    commanded_widths,
    contact_events,
    label_accuracy,
    load_schemas,
    pixel_features,
    segment_film,
    segment_series,
    touch_events,
)
from world2act.types import M, Skill

HAND = load_schemas().calibration("panda")
OPEN = HAND.open_width_m
TWO = "put both the alphabet soup and the tomato sauce in the basket"
ONE = "pick up the milk and place it in the basket"

# -- thirty noisy series -----------------------------------------------------------------------------------------------

Series = tuple[np.ndarray, list[int], str]


def grasp(rng: np.random.Generator, width: float, held: int) -> tuple[np.ndarray, int]:
    """Closing on an object `width` wide, holding it, opening: the widths, and the frame at which closure reaches delta_on."""
    closing = np.linspace(OPEN, width, int(rng.integers(4, 8)))
    on = int(np.argmax(OPEN - closing >= HAND.delta_on_m))
    return np.r_[closing, np.full(held, width), np.linspace(width, OPEN, 4)], on


def noisy(rng: np.random.Generator, clean: np.ndarray) -> np.ndarray:
    return np.clip(clean + rng.normal(0, 0.0007, clean.size), 0, None)


def one_grasp(rng: np.random.Generator, tail: int = 10) -> tuple[np.ndarray, int]:
    wait = int(rng.integers(15, 50))
    part, on = grasp(rng, float(rng.uniform(0.02, 0.06)), int(rng.integers(20, 40)))
    return np.r_[np.full(wait, OPEN), part, np.full(tail, OPEN)], wait + on


def dropouts(rng: np.random.Generator) -> Series:
    """The sensor reads 0 for one or two frames, four times, at least four frames apart from the boundary."""
    clean, on = one_grasp(rng)
    w = noisy(rng, clean)
    far = [t for t in range(4, w.size - 4) if abs(t - on) > 4]
    for t in rng.choice(far[::6], 4, replace=False):  # apart: each one is a dropout of its own
        w[t : t + int(rng.integers(1, 3))] = 0.0
    return w, [on], ONE


def chatter(rng: np.random.Generator) -> Series:
    """While it holds, the hand lets go for one or two frames, three times; open, it twitches."""
    clean, on = one_grasp(rng)
    w = noisy(rng, clean)
    for t in (on + 6, on + 11, on + 16):
        w[t : t + int(rng.integers(1, 3))] = OPEN
    w[5:7] -= HAND.delta_on_m
    return w, [on], ONE


def partial_closure(rng: np.random.Generator) -> Series:
    """The hand closes to between the two thresholds, long before it grasps: no contact."""
    clean, on = one_grasp(rng)
    pause = np.r_[np.full(10, OPEN), np.full(12, OPEN - 0.8 * HAND.delta_on_m), np.full(8, OPEN)]
    return noisy(rng, np.r_[pause, clean]), [on + pause.size], ONE


def regrasp(rng: np.random.Generator) -> Series:
    """The object slips, the hand closes on nothing, opens and grasps again: the last grasp counts."""
    first, _ = one_grasp(rng, tail=0)
    slip = np.r_[first[:-20], np.linspace(first[-21], 0.0, 5), np.zeros(6), np.linspace(0, OPEN, 5), np.full(10, OPEN)]
    second, on = one_grasp(rng)
    return noisy(rng, np.r_[slip, second]), [on + slip.size], ONE


def never_opens(rng: np.random.Generator) -> Series:
    """The episode ends with the object in hand."""
    clean, on = one_grasp(rng, tail=0)
    return noisy(rng, clean[:-8]), [on], ONE


def two_objects(rng: np.random.Generator) -> Series:
    """Two objects one after the other, with a missed grasp in between: three boundaries."""
    first, on = one_grasp(rng, tail=int(rng.integers(8, 15)))
    off = int(np.flatnonzero(OPEN - first >= HAND.delta_off_m)[-1]) + 1
    missed, _ = grasp(rng, 0.0, 6)
    second, again = one_grasp(rng)
    return noisy(rng, np.r_[first, missed, second]), [on, off, first.size + missed.size + again], TWO


KINDS = (dropouts, chatter, partial_closure, regrasp, never_opens, two_objects)


def found_boundaries(series: Series) -> list[int]:
    """Where events and schema say that steps end, before whole chunks are made of them."""
    widths, _, instruction = series
    plan = segment_series(widths, instruction, calibration=HAND)
    assert plan.discarded is None, plan.discarded
    steps = load_schemas().match(instruction)
    assert steps is not None
    return list(align(plan.events, steps, widths.size - 1, HAND).ends[:-1])


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_thirty_noisy_series(kind: Callable[[np.random.Generator], Series]) -> None:
    """Five seeds of six kinds: boundary F1 at two frames is 1 for each, and the cut skills are within a chunk of the truth."""
    total = BoundaryScore()
    for seed in range(5):
        made = kind(np.random.default_rng(seed))
        score = boundary_score(found_boundaries(made), made[1], tolerance=2)
        assert score.f1 == 1.0, (seed, found_boundaries(made), made[1])
        total += score
        skills = segment_series(made[0], made[2], calibration=HAND).skills
        assert boundary_score(boundaries(skills), made[1], tolerance=M + 2).f1 == 1.0
    print(f"{kind.__name__}: boundary F1 {total.f1:.3f}, mean error {total.mean_error:.2f} frames")


def test_a_hand_that_never_opens_is_no_grasp() -> None:
    """Closed from the first frame (robosuite starts half closed): discarded, with the reason."""
    found = segment_series(np.full(60, 0.04), ONE, calibration=HAND)
    assert found.discarded is not None and "step missing" in found.discarded
    assert any("closes before frame 8" in r for r in found.reasons) and found.events[0].offset is None


def test_a_hand_calibrated_from_its_episodes() -> None:
    spike = np.r_[np.full(30, 0.077), [0.2], np.full(20, 0.03)]
    shut = np.full(40, 0.03)
    found = calibrated(HAND, [spike, np.r_[np.full(9, 0.078), shut], shut])
    assert found.open_width_m == pytest.approx(0.077) and found.delta_on_m == HAND.delta_on_m
    with pytest.raises(ValueError, match="at least one is needed"):
        calibrated(HAND, [])
    for never_opens in (0.0, 0.005):
        assert calibrated(HAND, [np.full(9, never_opens)]) == HAND


def test_commands_as_widths() -> None:
    assert commanded_widths([-1, 0, 1], HAND) == pytest.approx([0.08, 0.04, 0.0])
    for bad in ([2.0], [float("nan")], [[0.0]]):
        with pytest.raises(ValueError, match="gripper command: must be one number in"):
            commanded_widths(bad, HAND)
    # A box nearly as wide as the hand closes it by 8 mm only: the command tells.
    widths = np.r_[np.full(12, 0.08), np.full(20, 0.072), np.full(8, 0.08)]
    command = commanded_widths(np.r_[np.full(12, -1), np.full(20, 1), np.full(8, -1)], HAND)
    assert contact_events(widths, HAND) == ()
    ((onset, offset),) = [(e.onset, e.offset) for e in contact_events(widths, HAND, commanded=command)]
    assert 12 <= onset <= 14 and offset == 32


# -- pushes ------------------------------------------------------------------------------------------------------------


def push(frames: int = 60, start: int = 20, stop: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """The hand moves along x all the time, 4 mm a frame; a door moves with it from `start` to `stop`."""
    hand = np.zeros((frames, 3))
    hand[:, 0] = 0.004 * np.arange(frames)
    door = np.zeros((frames, 3))
    door[:, 0] = np.clip(hand[:, 0] - hand[start, 0], 0, hand[stop, 0] - hand[start, 0])
    return hand, door


def test_a_pushed_door_is_a_touch() -> None:
    hand, door = push()
    (event,) = touch_events(hand, np.full(60, OPEN), objects=door)
    assert (event.kind, event.onset, event.offset) == ("touch", 21, 41)
    assert touch_events(hand, np.full(60, OPEN), objects=-door) == (), "it moves the other way: nobody pushes it"
    still = np.zeros_like(hand)
    assert touch_events(still, np.full(60, OPEN), objects=door) == (), "it moves by itself"
    noise = np.random.default_rng(0).normal(0, 0.0001, door.shape)
    (event,) = touch_events(hand, np.full(60, OPEN), objects=door + noise)
    assert abs(event.onset - 21) <= 1 and event.offset is not None and abs(event.offset - 41) <= 1


def test_a_force_against_the_motion_is_a_touch() -> None:
    hand, _ = push()
    force = np.zeros((60, 3))
    force[20:40, 0] = -8.0
    force[30, 0] = -1.5  # between the thresholds
    (event,) = touch_events(hand, np.full(60, OPEN), force=force)
    assert (event.onset, event.offset) == (20, 40)
    assert touch_events(hand, np.full(60, OPEN), force=-force) == (), "it pulls along"


def test_pushes_become_steps_where_the_schema_knows_them() -> None:
    hand, door = push()
    widths = np.full(60, OPEN)
    touches = touch_events(hand, widths, objects=door)
    alone = segment_series(widths, "close the cabinet door", calibration=HAND)
    assert [s.prompt for s in alone.skills] == ["close the cabinet door"]
    both = segment_series(widths, "close the cabinet door", calibration=HAND, touches=touches)
    assert [(s.prompt, s.start, s.end) for s in both.skills] == [
        ("reach the cabinet door", 0, 24),
        ("close the cabinet door", 24, 56),
    ]


def test_what_is_held_is_not_pushed() -> None:
    """An object that moves with the hand because it is held: the grasp tells, the touch is dropped."""
    hand, door = push(start=24, stop=50)
    widths = np.r_[np.full(18, OPEN), np.full(38, 0.03), np.full(4, OPEN)]
    touches = touch_events(hand, widths, objects=door)
    assert len(touches) == 1
    found = segment_series(widths, ONE, calibration=HAND, touches=touches)
    assert [e.kind for e in found.events] == ["grasp"] and found.discarded is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": None}, "objects, force: one of them is needed"),
        ({"objects": np.zeros((9, 3))}, "objects: has 9 rows, but the episode has 10 frames"),
        ({"objects": np.zeros(10)}, r"objects: must have shape \(frames, 3\)"),
        ({"hand": np.full((10, 3), np.nan)}, "hand: row 0 is NaN or infinite"),
        ({"force": np.zeros((10, 2))}, r"force: must have shape"),
        ({"force": "x"}, "force: must be numbers"),
    ],
)
def test_bad_touch_input(change: dict[str, object], message: str) -> None:
    given_ = {"hand": np.zeros((10, 3)), "widths": np.full(10, OPEN), "objects": np.zeros((10, 3)), **change}
    with pytest.raises(ValueError, match=message):
        touch_events(**given_)  # type: ignore[arg-type]


def test_bad_touch_calibration() -> None:
    for values, message in (
        ({"object_off_m": 1.0}, "object_off_m <= object_on_m"),
        ({"force_on_n": 0.5}, "force_off_n <= force_on_n"),
        ({"alignment": 2.0}, "alignment: 2.0 is a cosine"),
        ({"min_frames": 0}, "min_frames"),
    ):
        with pytest.raises(ValueError, match=message):
            TouchCalibration(**values)  # type: ignore[arg-type]


# -- films -------------------------------------------------------------------------------------------------------------


def film(corners: list[tuple[float, float]], frames: int, noise: float, seed: int) -> np.ndarray:
    """A bright square that travels from corner to corner of a 48x48 picture, `frames` frames a leg: uint8 (F, 48, 48, 3)."""
    rng = np.random.default_rng(seed)
    legs = [np.linspace(a, b, frames, endpoint=False) for a, b in itertools.pairwise(np.array(corners))]
    images = []
    for x, y in np.r_[np.concatenate(legs), [corners[-1]]]:
        image = rng.normal(40, noise, (48, 48, 3))
        image[int(y) : int(y) + 14, int(x) : int(x) + 14] += 180
        images.append(np.clip(image, 0, 255).astype(np.uint8))
    return np.array(images)


def test_change_points_of_a_film_with_known_turns() -> None:
    """The square zigzags down, so each leg leads back towards an earlier place: both turns, within 6 frames, from pixels."""
    total = BoundaryScore()
    for seed in range(5):
        frames = film([(0, 0), (34, 0), (0, 17), (34, 34)], 40, 8.0, seed)
        total += boundary_score(change_points(pixel_features(frames)), [40, 80], tolerance=6)
    print(f"visual change points: F1 {total.f1:.3f}, mean error {total.mean_error:.1f} frames")
    assert total.f1 >= 0.9


def test_a_still_or_steady_film_has_no_change_point() -> None:
    assert change_points(np.ones((100, 4))) == []
    assert change_points(np.c_[np.arange(100.0)]) == []
    assert change_points(np.zeros((1, 4))) == []


def test_change_points_keep_their_distance() -> None:
    zigzag = np.abs(np.arange(200) % 20 - 10.0)[:, None]
    points = change_points(zigzag, min_interval=30)
    assert all(b - a > 30 or b - a >= 30 for a, b in itertools.pairwise([0, *points, 199]))


def test_a_film_is_cut_where_the_plan_has_as_many_steps() -> None:
    there_and_back = np.r_[np.linspace(0, 1, 41), np.linspace(1, 0.2, 40)][:, None]
    found = segment_film(there_and_back, ONE)
    assert [(s.prompt, s.start) for s in found.skills] == [
        ("pick up the milk", 0),
        ("place the milk in the basket", found.skills[1].start),
    ]
    assert abs(found.skills[1].start - 40) <= M + 2 and "visual change point" in found.skills[0].reason
    discarded = segment_film(there_and_back, "open the drawer").discarded
    assert discarded == "step missing: 1 visual change points found, 0 needed"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(4), "embeddings: must be finite numbers"),
        (np.full((4, 2), np.nan), "embeddings: must be finite"),
        (np.zeros((5001, 1)), "1 to 5000 frames"),
    ],
)
def test_bad_films(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change_points(values)
    with pytest.raises(ValueError, match="frames: must be uint8"):
        pixel_features(np.zeros((4, 20, 20, 3)))  # type: ignore[arg-type]


def test_pixel_features_are_spreads_of_colour() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    features = pixel_features(frames, side=8).reshape(3, 2, 8, 3)
    assert features[1, 0, 2] == pytest.approx(frames[1, :6].sum((0, 1)) / (255 * 16 * 24))
    assert features[1, 1, 5] == pytest.approx(frames[1, :, :18].sum((0, 1)) / (255 * 16 * 24))
    far = [np.linalg.norm(np.diff(pixel_features(film([(0, 0), (x, 0)], 1, 0.0, 0)), axis=0)) for x in (5, 15, 30)]
    assert far[0] < far[1] < far[2]


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "true", "tolerance", "expected"),
    [
        ([10, 20], [10, 20], 0, (2, 2, 2, 0)),
        ([12, 20], [10, 20], 1, (1, 2, 2, 0)),
        ([12, 20], [10, 20], 2, (2, 2, 2, 2)),
        ([9, 11], [10], 1, (1, 2, 1, 1)),  # one true boundary is found once
        ([], [10], 5, (0, 0, 1, 0)),
        ([10], [], 5, (0, 1, 0, 0)),
        ([4, 8], [6, 10], 2, (2, 2, 2, 4)),  # matched in order, although 8 is as near to 6
    ],
)
def test_boundary_scores(found: list[int], true: list[int], tolerance: int, expected: tuple[int, ...]) -> None:
    score = boundary_score(found, true, tolerance)
    assert (score.hits, score.found, score.true, score.error) == expected


def test_scores_add_up_and_empty_ones_are_right() -> None:
    assert boundary_score([], [], 3).f1 == 1.0 and BoundaryScore().precision == BoundaryScore().recall == 1.0
    total = sum([boundary_score([5], [5], 0), boundary_score([5], [9], 0)], BoundaryScore())
    assert (total.precision, total.recall, total.f1) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="tolerance: -1"):
        boundary_score([], [], -1)


@given(st.lists(st.integers(0, 40), max_size=6), st.lists(st.integers(0, 40), max_size=6), st.integers(0, 6))
def test_no_matching_is_larger(found: list[int], true: list[int], tolerance: int) -> None:
    """Against all assignments, by brute force."""
    fits = np.array([[abs(a - b) <= tolerance for b in true] for a in found], dtype=float).reshape(len(found), len(true))
    rows, columns = linear_sum_assignment(-fits)
    assert boundary_score(found, true, tolerance).hits == int(fits[rows, columns].sum())


def test_label_accuracy() -> None:
    true = [Skill("pick up the cup", 0, 8), Skill("place the cup", 8, 20)]
    assert label_accuracy(true, true) == 1.0
    assert label_accuracy([Skill("Pick up the cup.", 0, 12), Skill("place the cup", 12, 20)], true) == 0.8
    assert label_accuracy([], true) == 0.0
    with pytest.raises(ValueError, match="found: action 5 belongs to two skills"):
        label_accuracy([Skill("a", 0, 6), Skill("b", 5, 9)], true)
    with pytest.raises(ValueError, match="true: has no actions"):
        label_accuracy(true, [])
