"""What the doors accept: strict (no unknown field, no silent conversion), every number with its limits."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from services.runtime.jobs import Job
from world2act.segmentation.events import check_widths
from world2act.segmentation.schemas import check_instruction
from world2act.splits import INDICES_PER_SPLIT, parse_split

NAMESPACE = r"^[A-Za-z0-9_-]{1,80}$"


class Body(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    def params(self) -> dict[str, Any]:
        """What goes to the job: only what the client set, so that defaults stay with whoever runs it."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


class SegmentRequest(Body):
    """An instruction alone, an instruction with gripper widths, or an episode file in the data folder."""

    model_config = ConfigDict(extra="forbid", strict=True)  # NaN is refused by the series' own check, which says where

    instruction: str | None = Field(None, description="1 to 500 characters")
    gripper_width_m: list[float] | None = Field(None, description="opening in metres at each frame, at most 0.5")
    commanded_width_m: list[float] | None = Field(None, description="commanded opening, a second cue; as long as the series")
    task: str | None = Field(None, min_length=1, max_length=100, description="task schema; else the one that the text matches")
    embodiment: str | None = Field(
        None, min_length=1, max_length=100, description="gripper calibration; else the data's robot's, or Meta-World's"
    )
    frames: int | None = Field(None, ge=1, le=1_000_000, description="frames of the episode, where known: must match the series")
    planner: Literal["rule", "llm"] | None = Field(None, description="llm: by the segmenter's language model; else by schemas")
    episode: str | None = Field(
        None, min_length=1, max_length=1000, description="demonstrations in the data folder: an HDF5 file, or a data set's folder"
    )
    demo: str | None = Field(
        None,
        max_length=1000,
        pattern=r"^[^\x00-\x1f]+$",
        description="one of them: demo_3, episode_000003, a clip's name; else all",
    )
    gripper: list[int] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="columns of a LeRobot state whose absolute values add up to the gripper's width in metres; else as it says",
    )

    @field_validator("instruction")
    @classmethod
    def _instruction(cls, value: str | None) -> str | None:
        return None if value is None else _said("instruction", check_instruction, value)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.episode is None) == (self.instruction is None):
            raise ValueError("instruction: give either instruction (with or without gripper_width_m) or episode")
        for name in ("demo", "gripper"):
            if getattr(self, name) is not None and self.episode is None:
                raise ValueError(f"{name}: belongs to episode, which is missing")
        if self.frames is not None and self.gripper_width_m is None:
            raise ValueError("frames: belongs to gripper_width_m, which is missing")
        if self.gripper_width_m is not None:
            if self.episode is not None:
                raise ValueError("gripper_width_m: an episode file brings its own")
            check_widths(self.gripper_width_m, self.frames)
        if self.commanded_width_m is not None:
            if self.gripper_width_m is None:
                raise ValueError("commanded_width_m: belongs to gripper_width_m, which is missing")
            check_widths(self.commanded_width_m, len(self.gripper_width_m), "commanded_width_m")
        return self


def _said(field: str, check: Any, value: Any) -> Any:
    """Run a library check; its sentence without the field's name, which pydantic adds."""
    try:
        return check(value)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{field}: ")) from None


def _check_tasks(tasks: list[str] | None) -> list[str] | None:
    if tasks is not None and len(set(tasks)) != len(tasks):
        raise ValueError("a task is listed twice")
    return tasks


class Scenes(Body):
    """Which initial states of which split."""

    split: str = Field("posttrain", description="base, worldmodel, validation, posttrain, tuning or evaluation")

    @field_validator("split")
    @classmethod
    def _split(cls, value: str) -> str:
        return str(_said("split", parse_split, value).value)


class RolloutRequest(Scenes):
    """Imagine a task from initial states, execute it, or both."""

    task: str = Field(min_length=1, max_length=80)
    indices: list[int] = Field(
        min_length=1,
        max_length=64,
        validation_alias=AliasChoices("indices", "seeds"),
        description="initial states within the split, 1 to 64 of [0, 1,000,000); `seeds` means the same",
    )
    mode: Literal["imagine", "execute", "both"] = "both"
    namespace: str = Field("default", pattern=NAMESPACE, description="policies of a post-training job: its id")
    version: int = Field(-1, ge=-1, le=1_000_000, description="residual version; 0: the base alone; -1: the newest")
    seed: int = Field(0, ge=0, lt=2**31, description="noise of the world model")
    video: bool = Field(True, description="store an mp4 of each")

    @field_validator("indices")
    @classmethod
    def _indices(cls, value: list[int]) -> list[int]:
        for i, index in enumerate(value):
            if not 0 <= index < INDICES_PER_SPLIT:
                raise ValueError(f"[{i}] is {index}, outside [0, {INDICES_PER_SPLIT})")
        return value


class Skill(Body):
    """One skill to imagine: its prompt and how many action chunks long."""

    prompt: str = Field(min_length=1, max_length=500)
    chunks: int = Field(ge=1, le=32)


class ImagineRequest(Scenes):
    """Imagine skills from one initial state: as given, or planned from an instruction, or the task's own."""

    task: str = Field(min_length=1, max_length=80)
    index: int = Field(0, ge=0, lt=INDICES_PER_SPLIT)
    instruction: str | None = Field(None, description="1 to 500 characters; planned into skills")
    skills: list[Skill] | None = Field(None, min_length=1, max_length=32)
    seed: int = Field(0, ge=0, lt=2**31)
    video: bool = True

    @field_validator("instruction")
    @classmethod
    def _instruction(cls, value: str | None) -> str | None:
        return None if value is None else _said("instruction", check_instruction, value)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.instruction is not None and self.skills is not None:
            raise ValueError("skills: give instruction or skills, not both")
        return self


class PosttrainRequest(Body):
    """Post-train the base policy without rewards: imagine, execute and optimise. What is left out comes from the preset."""

    preset: Literal["default", "paper"] = "default"
    tasks: list[str] = Field(min_length=1, max_length=64)
    mode: Literal["serial", "synchronous", "asynchronous"] = "asynchronous"
    eta: int | None = Field(None, ge=0, le=100, description="asynchronous: versions that the acting policy may be behind, >= 1")
    rounds: int | None = Field(None, ge=0, le=100, description="on-policy rounds after the first")
    episodes: int | None = Field(None, ge=1, le=10_000, description="initial states a task and round")
    steps: int | None = Field(None, ge=1, le=1_000_000, description="optimiser steps a round")
    seed: int = Field(0, ge=0, lt=2**31)
    namespace: str | None = Field(None, pattern=NAMESPACE, description="where versions are published; else the job's id")
    settings: dict[str, bool | int | float | str] | None = Field(
        None,
        max_length=32,
        description='other fields of Stage 2 by dotted name, as in docs/method.md: {"closed_loop_every": 4}; the job checks them',
    )

    _tasks = field_validator("tasks")(_check_tasks)

    @model_validator(mode="after")
    def _bound_fits_mode(self) -> Self:
        if self.mode == "asynchronous" and self.eta == 0:
            raise ValueError("eta: asynchronous needs at least 1; eta 0 is mode synchronous")
        if self.mode != "asynchronous" and self.eta:
            raise ValueError(f"eta: mode {self.mode} means 0, got {self.eta}")
        return self


class PolicyRef(Body):
    """A policy: `version` of `namespace`; 0 is the base alone, -1 the newest."""

    namespace: str = Field("default", pattern=NAMESPACE)
    version: int = Field(-1, ge=-1, le=1_000_000)


class EvaluateRequest(Body):
    """Success of policies on the same held-out initial states; without `versions`: the base against namespace and version."""

    tasks: list[str] = Field(min_length=1, max_length=64)
    episodes: int = Field(20, ge=1, le=10_000, description="initial states a task")
    first_index: int = Field(0, ge=0, lt=INDICES_PER_SPLIT)
    versions: list[PolicyRef] | None = Field(None, min_length=1, max_length=16, description="policies, the reference first")
    namespace: str = Field("default", pattern=NAMESPACE)
    version: int = Field(-1, ge=-1, le=1_000_000)
    split: Literal["evaluation", "tuning"] = "evaluation"
    seed: int = Field(0, ge=0, lt=2**31)

    _tasks = field_validator("tasks")(_check_tasks)


class Stage1Request(Body):
    """Train the adapters (Stage 1) on demonstrations in the data folder."""

    preset: Literal["default", "paper"] = "default"
    demos: str = Field(".", min_length=1, max_length=500, description="folder of demonstrations, relative to the data folder")
    steps: int | None = Field(None, ge=1, le=1_000_000)
    seed: int = Field(0, ge=0, lt=2**31)


class JobAccepted(BaseModel):
    """202: where to look."""

    id: str
    kind: str
    status: str
    job: str = Field(description="GET this for the state")
    events: str = Field(description="GET this for progress as server-sent events")

    @classmethod
    def of(cls, job: Job) -> JobAccepted:
        return cls(id=job.id, kind=job.kind, status=job.status, job=f"/jobs/{job.id}", events=f"/jobs/{job.id}/events")


EXAMPLES: dict[str, dict[str, Any]] = {
    "segment": {
        "an instruction alone": {"value": {"instruction": "pick up the puck and place it at the goal"}},
        "an instruction and gripper widths": {
            "value": {
                "instruction": "pick up the puck and place it at the goal",
                "gripper_width_m": [0.1] * 10 + [0.04] * 10 + [0.1] * 5,
            }
        },
        "an episode of the data folder": {"value": {"episode": "validation/pick-place.hdf5", "demo": "demo_0"}},
    },
    "rollout": {
        "imagined and executed": {
            "value": {"task": "drawer-open", "split": "posttrain", "indices": [0, 1], "mode": "both", "version": 0, "video": True}
        }
    },
    "imagine": {"the task's own skills": {"value": {"task": "drawer-open", "split": "posttrain", "index": 0}}},
    "posttrain": {
        "asynchronous": {"value": {"preset": "default", "tasks": ["drawer-open", "door-open"], "mode": "asynchronous", "eta": 1}}
    },
    "evaluate": {"base against newest": {"value": {"tasks": ["drawer-open"], "episodes": 20, "namespace": "default"}}},
    "stage1": {"default": {"value": {"preset": "default"}}},
}
