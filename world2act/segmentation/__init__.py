"""Skill segmentation: gripper events, task schemas, planning, alignment, statistics (METHOD section 1). numpy only."""

from world2act.segmentation.alignment import (
    Aligner,
    Alignment,
    AnswerRejectedError,
    Candidate,
    align,
    candidates_of,
    validate_answer,
)
from world2act.segmentation.cues import TouchCalibration, episode_touches, merge_events, touch_events
from world2act.segmentation.events import (
    ContactEvent,
    GripperCalibration,
    calibrated,
    check_widths,
    commanded_widths,
    contact_events,
)
from world2act.segmentation.online import OnlineSkill, skill_index_online
from world2act.segmentation.planner import Plan, Planner, RuleBasedPlanner, check_suites
from world2act.segmentation.schemas import SchemaTable, Step, TaskSchema, load_schemas, parse_schemas
from world2act.segmentation.scoring import BoundaryScore, boundaries, boundary_score, label_accuracy
from world2act.segmentation.segment import Segmentation, default_planner, hand_of, segment_episode, segment_film, segment_series
from world2act.segmentation.statistics import Statistics, summarise
from world2act.segmentation.visual import change_points, pixel_features

__all__ = [
    "Aligner",
    "Alignment",
    "AnswerRejectedError",
    "BoundaryScore",
    "Candidate",
    "ContactEvent",
    "GripperCalibration",
    "OnlineSkill",
    "Plan",
    "Planner",
    "RuleBasedPlanner",
    "SchemaTable",
    "Segmentation",
    "Statistics",
    "Step",
    "TaskSchema",
    "TouchCalibration",
    "align",
    "boundaries",
    "boundary_score",
    "calibrated",
    "candidates_of",
    "change_points",
    "check_suites",
    "check_widths",
    "commanded_widths",
    "contact_events",
    "default_planner",
    "episode_touches",
    "hand_of",
    "label_accuracy",
    "load_schemas",
    "merge_events",
    "parse_schemas",
    "pixel_features",
    "segment_episode",
    "segment_film",
    "segment_series",
    "skill_index_online",
    "summarise",
    "touch_events",
    "validate_answer",
]
