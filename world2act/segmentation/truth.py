"""What a simulator knew about an episode, as the skills that really happened: the truth that segmentations are scored against.

Nothing here looks at the gripper's width. A thing is grasped while both fingers touch it, in the last span in which it also
moves (its height, or its drawer or knob): spans before it were slips, or the hand closed on something that stayed. It is let go
where that span ends. A thing that stands freely is pushed from its first lasting touch by a finger on; one on a joint (a drawer,
a button) from the frame at which its joint has left its start, whatever part of the arm pushes it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from world2act.segmentation.events import spans
from world2act.segmentation.schemas import TaskSchema
from world2act.types import FloatArray, Skill

LEAST_FRAMES = 3
LONGEST_FLICKER = 6
"""Contacts come and go for some frames while a thing settles between the fingers."""
LIFTED_M = 0.005
TURNED = 0.01
"""Metres or radians from a joint's start; less is settling, or play."""

Change = tuple[int, str]
"""A frame, and the kind of ending that it is (contact_on, ...)."""


def true_changes(truth: Mapping[str, FloatArray]) -> list[Change]:
    """When things were grasped, let go, and pushed, in time order. truth: see Episode.truth. ValueError without touches."""
    bodies = [name.removeprefix("touch/") for name in truth if name.startswith("touch/")]
    if not bodies:
        raise ValueError("truth: has no touch/<body>")
    found: list[Change] = []
    for body in bodies:
        fingers, joint = truth[f"touch/{body}"], truth.get(f"joint/{body}")
        grasps = [s for s in _lasting(fingers >= 2) if _moves(truth, body, *s)]
        pushes = _lasting(fingers >= 1 if joint is None else np.abs(joint - joint[0]) >= TURNED)
        for kind, span in (("contact", grasps[-1:]), ("touch", pushes[:1])):
            for start, end in span:
                found.append((start, f"{kind}_on"))
                if end < len(fingers):
                    found.append((end, f"{kind}_off"))
    return sorted(found)


def true_skills(truth: Mapping[str, FloatArray], schema: TaskSchema, actions: int) -> tuple[Skill, ...] | None:
    """The steps of `schema` as they happened in an episode of `actions` actions; None where a step that must occur did not.

    Each step ends at the first change of its kind after the step before; an optional one that has none was left out.
    """
    changes = true_changes(truth)
    skills: list[Skill] = []
    start = 0
    for step in schema.steps:
        end = actions if step.ends == "end" else next((t for t, kind in changes if kind == step.ends and t > start), None)
        if end is None and step.optional:
            continue
        if end is None or not start < end <= actions:
            return None
        skills.append(Skill(step.prompt, start, end))
        start = end
    return tuple(skills)


def _lasting(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    return spans(mask, LEAST_FRAMES, LONGEST_FLICKER)


def _moves(truth: Mapping[str, FloatArray], body: str, start: int, end: int) -> bool:
    """Whether the body moves in frames start .. end-1, by what is known of it."""
    known = ((truth.get(f"height/{body}"), LIFTED_M), (truth.get(f"joint/{body}"), TURNED))
    return any(values is not None and np.ptp(values[start:end]) >= least for values, least in known)
