"""Ways of segmenting compared on one episode whose truth is known (truth.py): what schemas, a language model or film are worth.

All of them get the instruction alone, those by events also the cues that the tool uses (`segment_episode`); the truth's prompts
come from the schema of the simulator's task. So a label is wrong where the instruction was understood wrongly, where a boundary
is off, and everywhere in an episode that was discarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from world2act.segmentation.alignment import Aligner, candidates_of
from world2act.segmentation.events import ContactEvent, GripperCalibration
from world2act.segmentation.planner import Planner, split_phrases
from world2act.segmentation.schemas import load_schemas
from world2act.segmentation.scoring import Score, score
from world2act.segmentation.segment import default_planner, segment_episode, segment_film
from world2act.segmentation.truth import true_skills
from world2act.segmentation.visual import pixel_features
from world2act.types import Episode, Skill

EVENTS, SCHEMA, MODEL, FILM = "events only", "events + schema", "events + LLM", "film + schema"
METHODS = (EVENTS, SCHEMA, MODEL, FILM)


def by_events(events: Sequence[ContactEvent], instruction: str, actions: int) -> tuple[Skill, ...]:
    """Skills without any schema: every end of a contact cuts; the instruction's verb phrases are the prompts where there are as
    many of them as pieces, otherwise the pieces have none ("")."""
    ends = [*sorted({c.index for c in candidates_of(events) if 0 < c.index < actions}), actions]
    phrases = split_phrases(instruction, load_schemas())
    prompts = phrases if len(phrases) == len(ends) else [""] * len(ends)
    return tuple(Skill(p, start, end) for p, start, end in zip(prompts, [0, *ends], ends, strict=False))


def compare(
    episode: Episode,
    calibration: GripperCalibration | None,
    tolerances: Sequence[int],
    model: tuple[Planner, Aligner] | None = None,
) -> dict[str, Score]:
    """Method -> score of an episode, as far as it has what the method needs: a calibrated gripper, a model, images.

    tolerances: in frames. Empty where the truth is not known, or where a step that must occur did not.
    """
    actions = len(episode.actions)
    if episode.truth is None:
        return {}
    true = true_skills(episode.truth, default_planner().plan(episode.instruction, episode.task).schema, actions)
    if true is None:
        return {}
    found: dict[str, Sequence[Skill]] = {}
    if calibration is not None and np.isfinite(episode.widths).all():
        unnamed = replace(episode, task="")
        plain = segment_episode(unnamed, calibration=calibration)
        found = {EVENTS: by_events(plain.events, episode.instruction, actions), SCHEMA: plain.skills}
        if model is not None:
            planner, aligner = model
            found[MODEL] = segment_episode(unnamed, calibration=calibration, planner=planner, aligner=aligner).skills
    if episode.images:
        view = next(iter(episode.images.values()))
        found[FILM] = segment_film(pixel_features(view), episode.instruction).skills
    return {method: score(skills, true, tolerances) for method, skills in found.items()}
