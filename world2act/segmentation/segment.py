"""An episode cut into skills: events -> plan -> alignment -> whole chunks (METHOD: paper section 3).

Whole chunks. A skill's clip is 1 + M*n frames with n chunks of M actions, counted from the skill's own start, as the causal
VAE needs. The first skill starts at frame 0, and a boundary found at frame b moves *up* to the next multiple of M actions after
the skill's start. Up, because a running policy can switch skills only at the next chunk start after it sees the contact:
so the clip it was trained on and the skill it is given agree. An incomplete last chunk of the episode is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from world2act.segmentation.alignment import Aligner, Alignment, AnswerRejectedError, align
from world2act.segmentation.cues import episode_touches, merge_events
from world2act.segmentation.events import ContactEvent, GripperCalibration, check_widths, commanded_widths, contact_events
from world2act.segmentation.planner import Plan, Planner, RuleBasedPlanner
from world2act.segmentation.schemas import DEFAULT_EMBODIMENT, load_schemas
from world2act.segmentation.visual import change_points
from world2act.types import Episode, M, Skill


@dataclass(frozen=True)
class Segmentation:
    """Skills of one episode, or why there are none. reasons: one per skill, then notes on events that were not used.

    length: actions in the episode; task: the schema's name, None for an instruction no schema knows.
    """

    skills: tuple[Skill, ...]
    discarded: str | None
    events: tuple[ContactEvent, ...]
    reasons: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    task: str | None = None
    length: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the field names of this class."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Segmentation:
        """The inverse of `to_json`, also after a trip through JSON text."""
        skills = tuple(Skill(**s) for s in content["skills"])
        events = tuple(ContactEvent(**e) for e in content["events"])
        rest = {"reasons": tuple(content["reasons"]), "prompts": tuple(content["prompts"])}
        return cls(skills, content["discarded"], events, task=content["task"], length=content["length"], **rest)


@lru_cache(maxsize=1)
def default_planner() -> RuleBasedPlanner:
    """The planner used where none is given: one per process, so that its cache serves every episode."""
    return RuleBasedPlanner()


def snap(frame: int, start: int) -> int:
    """The first frame at or after `frame` that is whole chunks of M actions after `start`."""
    return start + -(-(frame - start) // M) * M


def _cut(plan: Plan, found: Alignment, events: tuple[ContactEvent, ...], actions: int) -> Segmentation:
    """Skills from aligned events; discards with a reason what the schema does not explain or what is shorter than a chunk."""
    usable = actions // M * M
    skills: list[Skill] = []
    discarded, start = found.discarded, 0
    if discarded is None and usable == 0:
        discarded = f"episode has {actions} actions, fewer than one chunk of {M}"
    for step, end, reason in zip(found.steps, found.ends, found.reasons, strict=True):
        stop = usable if step.ends == "end" else snap(end, start)
        if discarded is None and (stop - start < M or stop > usable):
            discarded = f"step {step.prompt!r} has less than one chunk of {M} actions (actions {start} to {min(stop, usable)})"
        moved = f", cut at {stop}" if stop != end else ""
        skills.append(Skill(step.prompt, start, stop, reason + moved))
        start = stop
    if discarded is not None:
        return Segmentation((), discarded, events, found.notes, plan.prompts, plan.task, actions)
    reasons = tuple(s.reason for s in skills) + found.notes
    return Segmentation(tuple(skills), None, events, reasons, plan.prompts, plan.task, actions)


def segment_series(
    widths: npt.ArrayLike,
    instruction: str,
    *,
    task: str | None = None,
    frames: int | None = None,
    calibration: GripperCalibration | None = None,
    commanded: npt.ArrayLike | None = None,
    touches: Sequence[ContactEvent] = (),
    planner: Planner | None = None,
    aligner: Aligner | None = None,
) -> Segmentation:
    """Skills from gripper widths (F,) in metres, one per frame: F frames are F - 1 actions.

    task: the simulator's task name where known (else the instruction decides); frames: how many frames the episode has, to
    check the length against; calibration: default Meta-World's; commanded: (F,) commanded widths, the second cue; touches:
    pushes that the source knows of (`touch_events`); planner, aligner: default the rules, without a network.
    Raises ValueError naming the field and the limit for bad widths or a bad instruction. A *readable* episode that does not
    show its steps is no error: it comes back discarded, with its reason; so does one whose planner gave no valid plan.
    """
    w = check_widths(widths, frames)
    calibration = calibration or load_schemas().calibration(DEFAULT_EMBODIMENT)
    events = merge_events(contact_events(w, calibration, commanded=commanded), touches)
    try:
        plan = (planner or default_planner()).plan(instruction, task)
    except AnswerRejectedError as e:
        return Segmentation((), f"no plan: {e}", events, (), length=w.size - 1)
    found = (aligner.align if aligner else align)(events, plan.schema, w.size - 1, calibration)
    return _cut(plan, found, events, w.size - 1)


def segment_film(
    embeddings: npt.ArrayLike,
    instruction: str,
    *,
    task: str | None = None,
    planner: Planner | None = None,
    min_interval: int = 18,
) -> Segmentation:
    """Skills of an episode without a gripper signal, cut where its film changes; embeddings (F, E), see `change_points`.

    Each step that must occur ends at a change point, in order; another number of them discards the episode. Weaker than
    `segment_series`: nothing says *what* happened there. Raises ValueError naming the field.
    """
    points = change_points(embeddings, min_interval=min_interval)
    actions = len(np.asarray(embeddings)) - 1
    plan = (planner or default_planner()).plan(instruction, task)
    steps = tuple(s for s in plan.schema.steps if not s.optional)
    if len(points) != len(steps) - 1:
        reason = f"step missing: {len(points)} visual change points found, {len(steps) - 1} needed"
        return _cut(plan, Alignment((), (), (), (), reason), (), actions)
    steps = (*(replace(s, ends="contact_off") for s in steps[:-1]), replace(steps[-1], ends="end"))
    reasons = [f"{s.prompt!r} ends at a visual change point, frame {p}" for s, p in zip(steps, points, strict=False)]
    ends = (*points, actions)
    return _cut(plan, Alignment(steps, ends, (*reasons, f"{steps[-1].prompt!r} ends with the episode"), ()), (), actions)


def hand_of(episode: Episode, robot: str | None = None) -> GripperCalibration:
    """The calibration of the hand of an episode, the one that a running policy of its robot has.

    robot: by default the one that its meta names; Meta-World's hand where none is named. How wide it opens is what the file says,
    or else the calibration, or else, of an unknown robot, the widths (where there are none, any hand will do). Raises ValueError
    where the file's is no number.
    """
    table, robot = load_schemas(), robot or episode.meta.get("robot", DEFAULT_EMBODIMENT)
    said = json.loads(episode.meta.get("env_args", "{}")).get("gripper_open_width")
    hand = table.hand(robot)
    if said is None and (hand or np.isnan(episode.widths).all()):
        return table.calibration(hand or DEFAULT_EMBODIMENT)
    if not isinstance(said, int | float | None):
        raise ValueError(f"env_args.gripper_open_width: must be a number, metres, got {str(said)[:40]!r}")
    return table.calibration_of(robot, float(np.nanmax(episode.widths) if said is None else said))


def segment_episode(
    episode: Episode,
    *,
    calibration: GripperCalibration | None = None,
    planner: Planner | None = None,
    aligner: Aligner | None = None,
) -> Segmentation:
    """Skills of a recorded episode; see `segment_series`. Skill indices count its actions (frames start .. end).

    calibration: by default that of the episode's robot (`hand_of`).
    Its cues are used where it has them: gripper commands (the commanded-versus-actual gap) and pushes. Without widths (all NaN)
    an episode whose instruction is one step is that skill, such as a clip that was cut before; another is discarded.
    """
    if np.isnan(episode.widths).all():
        return _without_widths(episode, planner or default_planner())
    calibration = calibration or hand_of(episode)
    command = episode.cues.get("command")
    return segment_series(
        episode.widths,
        episode.instruction,
        task=episode.task or None,
        frames=len(episode.actions) + 1,
        calibration=calibration,
        commanded=None if command is None else commanded_widths(command, calibration),
        touches=episode_touches(episode),
        planner=planner,
        aligner=aligner,
    )


def _without_widths(episode: Episode, planner: Planner) -> Segmentation:
    """By the instruction alone: what it names is one step, or nothing says where its steps end."""
    actions = len(episode.actions)
    try:
        plan = planner.plan(episode.instruction)
    except AnswerRejectedError as e:
        return Segmentation((), f"no plan: {e}", (), (), length=actions)
    steps = [s for s in plan.schema.steps if not s.optional]
    if len(steps) > 1:
        reason = f"no gripper signal: the source has no widths, so where {steps[0].prompt!r} ends is unknown"
        return _cut(plan, Alignment((), (), (), (), reason), (), actions)
    reasons = (f"{steps[0].prompt!r} is all of it: one step",)
    return _cut(plan, Alignment((replace(steps[0], ends="end"),), (actions,), reasons, ()), (), actions)
