"""Skill segmentation: gripper events, task schemas, planning, alignment, statistics (METHOD section 1). numpy only."""

from world2act.segmentation.alignment import AnswerRejectedError, Candidate, align, candidates_of, validate_answer
from world2act.segmentation.events import ContactEvent, GripperCalibration, check_widths, contact_events
from world2act.segmentation.online import OnlineSkill, skill_index_online
from world2act.segmentation.planner import Plan, Planner, RuleBasedPlanner
from world2act.segmentation.schemas import SchemaTable, Step, TaskSchema, load_schemas, parse_schemas
from world2act.segmentation.segment import Segmentation, default_planner, segment_episode, segment_series
from world2act.segmentation.statistics import Statistics, summarise

__all__ = [
    "AnswerRejectedError",
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
    "align",
    "candidates_of",
    "check_widths",
    "contact_events",
    "default_planner",
    "load_schemas",
    "parse_schemas",
    "segment_episode",
    "segment_series",
    "skill_index_online",
    "summarise",
    "validate_answer",
]
