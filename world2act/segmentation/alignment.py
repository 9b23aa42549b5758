"""Contact events aligned with the steps of a schema (METHOD: paper section 3, alignment; supplement E).

Rules that hold for our own alignment and for any answer from outside (an LLM): boundaries are indices that were given, in time
order, one per step that ends at a contact. An answer that breaks a rule is rejected with its reason, never repaired.
An episode that lacks a step is discarded, with its reason.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

from world2act.segmentation.events import ContactEvent, GripperCalibration
from world2act.segmentation.schemas import Step, TaskSchema
from world2act.types import M

MIN_SEPARATION = M
"""Frames between the end of a contact and the next one; a closer one is the same grasp (bounce, noise)."""


class AnswerRejectedError(ValueError):
    """An external alignment names an index that was not given, breaks the order, or has the wrong count."""


@dataclass(frozen=True)
class Candidate:
    """A frame at which a step may end. kind: contact_on (first frame of a contact) or contact_off (first frame after it), and
    likewise touch_on and touch_off where something was pushed, not grasped."""

    index: int
    kind: str
    width_m: float


@dataclass(frozen=True)
class Alignment:
    """ends[i] is the frame at which steps[i] ends, its reason in reasons[i]; discarded says why there are none."""

    steps: tuple[Step, ...]
    ends: tuple[int, ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    discarded: str | None = None


class Aligner(Protocol):
    """Anything that finds where the steps end; `align` is the one that needs no LLM."""

    def align(
        self, events: Sequence[ContactEvent], schema: TaskSchema, actions: int, hand: GripperCalibration | None = None
    ) -> Alignment:
        """See `align`."""
        ...


def candidates_of(events: Sequence[ContactEvent]) -> tuple[Candidate, ...]:
    """Both ends of every event, in time order; a contact that lasts to the end has no contact_off."""
    found = []
    for e in events:
        kind = "contact" if e.kind == "grasp" else "touch"
        found.append(Candidate(e.onset, f"{kind}_on", e.width_m))
        if e.offset is not None:
            found.append(Candidate(e.offset, f"{kind}_off", e.width_m))
    return tuple(sorted(found, key=lambda c: c.index))


def filter_events(
    events: Sequence[ContactEvent], schema: TaskSchema, hand: GripperCalibration | None = None
) -> tuple[tuple[ContactEvent, ...], tuple[str, ...]]:
    """Events without false positives, and one note per event dropped: at the start, empty-handed, too close to the last one.

    A schema without a grasp keeps all of them: none of its steps ends at one. Touches are not judged by the hand's width.
    """
    if not any(s.ends in ("contact_on", "contact_off") for s in schema.steps):
        return tuple(events), ()
    start, thinnest = (hand.start_frames, hand.min_object_width_m) if hand else (0, 0.0)
    kept: list[ContactEvent] = []
    notes = []
    for e in events:
        before = next((k.offset for k in reversed(kept) if k.kind == e.kind), None)
        if e.kind == "grasp" and e.onset < start:
            notes.append(f"contact at {e.onset} ignored: closes before frame {start}, no grasp")
        elif e.kind == "grasp" and e.low_m < thinnest:
            notes.append(f"contact at {e.onset} ignored: closes to {e.low_m:.4f} m (< {thinnest:g}), nothing is held")
        elif before is not None and e.onset - before < MIN_SEPARATION:
            notes.append(f"contact at {e.onset} ignored: {e.onset - before} frames after the last one (< {MIN_SEPARATION})")
        else:
            kept.append(e)
    return tuple(kept), tuple(notes)


def _match(kinds: list[str], given: Sequence[Candidate]) -> tuple[list[Candidate], str]:
    """Candidates for steps that end at `kinds`, and '' ; or [] and why not."""
    if not kinds:
        return [], ""
    if kinds == ["contact_on"]:
        # One grasp in the whole task: earlier contacts were attempts (the object slipped), the last one counts.
        contacts = [c for c in given if c.kind == "contact_on"]
        return (contacts[-1:], "") if contacts else ([], "no contact that holds something")
    useful = [c for c in given if c.kind in kinds]
    if len(useful) == len(kinds) + 1 and useful[-1].kind == "contact_off":
        useful = useful[:-1]  # letting go after the last step is no step
    if len(useful) != len(kinds):
        return [], f"{len(useful)} contact boundaries found, {len(kinds)} needed"
    if any(c.kind != kind for c, kind in zip(useful, kinds, strict=True)):
        return [], f"boundaries come as {', '.join(c.kind for c in useful)}, needed {', '.join(kinds)}"
    return useful, ""


def align(events: Sequence[ContactEvent], schema: TaskSchema, actions: int, hand: GripperCalibration | None = None) -> Alignment:
    """Steps of `schema` (prompts filled) with the frames at which they end, for an episode of `actions` actions.

    hand: says which closures hold nothing; None: all of them hold something.
    Optional steps are used if the events provide for them: all of them first, then fewer.
    """
    kept, notes = filter_events(events, schema, hand)
    given = candidates_of(kept)
    optional = [i for i, s in enumerate(schema.steps) if s.optional]
    why = ""
    for n in range(len(optional), -1, -1):
        for present in combinations(optional, n):
            steps = [s for i, s in enumerate(schema.steps) if not s.optional or i in present]
            chosen, why = _match([s.ends for s in steps if s.ends != "end"], given)
            if why:
                continue
            it = iter(chosen)
            ends, reasons = [], []
            for s in steps:
                c = None if s.ends == "end" else next(it)
                ends.append(actions if c is None else c.index)
                text = "ends with the episode" if c is None else f"ends at {c.kind}, frame {c.index}, {c.width_m:.3f} m"
                reasons.append(f"{s.prompt!r} {text}")
            used = {c.index for c in chosen}
            spare = tuple(f"{c.kind} at {c.index} not used: no step ends there" for c in given if c.index not in used)
            return Alignment(tuple(steps), tuple(ends), tuple(reasons), notes + spare)
    missing = next((s.prompt for s in schema.steps if s.ends != "end" and not s.optional), "")
    return Alignment((), (), (), notes, f"step missing: {why}, so where {missing!r} ends is unknown")


def validate_answer(
    answer: Any, steps: Sequence[Step], given: Sequence[Candidate], missing: Container[int] = ()
) -> tuple[tuple[int, str], ...]:
    """An external alignment, checked: ((index, reason), ...) for the steps that end at a contact and are not `missing`.

    answer: {"boundaries": [{"step": position in `steps`, "index": a given index, "reason": text}]}, one per such step.
    Raises AnswerRejectedError saying what is wrong; the caller asks again or discards the episode.
    """
    needed = [i for i, s in enumerate(steps) if s.ends != "end" and i not in missing]
    if not isinstance(answer, Mapping) or not isinstance(answer.get("boundaries"), list):
        raise AnswerRejectedError("answer: must be an object with a list 'boundaries'")
    rows = answer["boundaries"]
    if len(rows) != len(needed):
        raise AnswerRejectedError(f"boundaries: wrong count, {len(rows)} given, {len(needed)} needed")
    kinds = {c.index: c.kind for c in given}
    last = -1
    checked: list[tuple[int, str]] = []
    for i, (row, step) in enumerate(zip(rows, needed, strict=True)):
        if not isinstance(row, Mapping) or type(row.get("index")) is not int or type(row.get("step")) is not int:
            raise AnswerRejectedError(f"boundaries[{i}]: integers 'step' and 'index' are needed")
        if row["step"] != step:
            raise AnswerRejectedError(f"boundaries[{i}].step: wrong order, {row['step']} given, {step} expected")
        index = row["index"]
        if index not in kinds:
            raise AnswerRejectedError(f"boundaries[{i}].index: {index} was not given; given are {sorted(kinds)}")
        if index <= last:
            raise AnswerRejectedError(f"boundaries[{i}].index: wrong order, {index} does not come after {last}")
        if checked and index - last < MIN_SEPARATION:
            raise AnswerRejectedError(f"boundaries[{i}].index: {index} is too close to {last} (< {MIN_SEPARATION} frames)")
        if kinds[index] != steps[step].ends:
            raise AnswerRejectedError(
                f"boundaries[{i}].index: {index} is a {kinds[index]}, step {step} ends at {steps[step].ends}"
            )
        reason = row.get("reason")
        if not isinstance(reason, str) or not 1 <= len(reason.strip()) <= 500:
            raise AnswerRejectedError(f"boundaries[{i}].reason: a text of 1 to 500 characters is needed")
        last = index
        checked.append((index, reason.strip()))
    return tuple(checked)
