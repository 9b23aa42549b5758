"""What each kind of job takes. The gateway checks too; here is the check that counts, because jobs can come from any producer."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from services.runtime.messages import SkillPrompt
from world2act.presets import STAGE2, changed
from world2act.splits import INDICES_PER_SPLIT, Split

TASK = re.compile(r"^[A-Za-z0-9_.-]{1,80}$")
Namespace = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]
Index = Annotated[int, Field(ge=0, lt=INDICES_PER_SPLIT)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _task(name: str) -> str:
    if not TASK.match(name):
        raise ValueError(f"{name[:40]!r} is no task's name: letters, digits, '_', '.' and '-', at most 80")
    return name


def _distinct(tasks: list[str]) -> list[str]:
    if len(set(tasks)) != len(tasks):
        raise ValueError("a task is listed twice")
    return tasks


TaskName = Annotated[str, AfterValidator(_task)]
TaskNames = Annotated[list[TaskName], Field(min_length=1, max_length=64), AfterValidator(_distinct)]
MODES = {"sync": "synchronous", "async": "asynchronous"}


class Params(BaseModel):
    """Base: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RolloutParams(Params):
    """Imagine a task from initial states, execute it, or both."""

    task: TaskName
    indices: list[Index] = Field(min_length=1, max_length=64)
    split: Split = Split.POSTTRAIN
    mode: Literal["imagine", "execute", "both"] = "both"
    namespace: Namespace = "default"
    version: int = Field(-1, ge=-1)
    seed: Seed = 0
    video: bool = True


class ImagineParams(Params):
    """Imagine skills from one initial state: `skills` as given, or planned from `instruction`, or from the task's own."""

    task: TaskName
    index: Index = 0
    split: Split = Split.POSTTRAIN
    instruction: str | None = Field(None, min_length=1, max_length=500)
    skills: list[SkillPrompt] | None = Field(None, min_length=1, max_length=32)
    seed: Seed = 0
    video: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.instruction is not None and self.skills is not None:
            raise ValueError("instruction, skills: give one of them, not both")
        return self


class PolicyRef(Params):
    """A policy: `version` of `namespace`; 0 is the base alone, -1 the newest."""

    namespace: Namespace = "default"
    version: int = Field(-1, ge=-1)


def _policy_pair(value: Any) -> Any:
    """A policy may also be written [namespace, version]."""
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"namespace": value[0], "version": value[1]}
    return value


class EvaluateParams(Params):
    """Success of several policies on the same initial states. Without `versions`: the base against namespace and version."""

    tasks: TaskNames
    episodes: int = Field(20, ge=1, le=10_000)
    first_index: Index = 0
    split: Literal[Split.EVALUATION, Split.TUNING] = Split.EVALUATION
    versions: list[Annotated[PolicyRef, BeforeValidator(_policy_pair)]] | None = Field(None, min_length=1, max_length=16)
    namespace: Namespace = "default"
    version: int = Field(-1, ge=-1)
    seed: Seed = 0

    def policies(self) -> list[PolicyRef]:
        """What is compared, the reference first."""
        if self.versions is not None:
            return list(self.versions)
        return [PolicyRef(namespace=self.namespace, version=0), PolicyRef(namespace=self.namespace, version=self.version)]

    @model_validator(mode="after")
    def _indices_exist(self) -> Self:
        if self.first_index + self.episodes > INDICES_PER_SPLIT:
            raise ValueError(f"first_index, episodes: their sum exceeds the {INDICES_PER_SPLIT} initial states of a split")
        return self


class PosttrainParams(Params):
    """Stage 2. What is None comes from the preset; `episodes` and `steps` are per task and round, and per round.

    eta: versions that the acting policy may be behind the learner; serial and synchronous mean 0. settings: any other fields of
    Stage 2 by dotted name (docs/method.md lists them), such as {"closed_loop_every": 4, "contrastive.form": "single"}.
    """

    preset: Literal["default", "paper"] = "default"
    tasks: TaskNames
    mode: Annotated[
        Literal["serial", "synchronous", "asynchronous"],
        BeforeValidator(lambda v: MODES.get(v, v) if isinstance(v, str) else v),
    ] = "asynchronous"
    eta: int | None = Field(None, ge=0, le=100)
    rounds: int | None = Field(None, ge=0, le=100, description="on-policy rounds after the first")
    episodes: int | None = Field(None, ge=1, le=10_000)
    steps: int | None = Field(None, ge=1, le=1_000_000)
    seed: Seed = 0
    namespace: Namespace | None = Field(None, description="where versions are published; the job's id if None")
    split: Literal[Split.POSTTRAIN] = Split.POSTTRAIN
    settings: dict[str, bool | int | float | str] = Field(default_factory=dict, max_length=32)

    @field_validator("settings")
    @classmethod
    def _settings_exist(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "preset" in info.data:
            changed(STAGE2[info.data["preset"]], value)
        return value

    @model_validator(mode="after")
    def _bound_fits_mode(self) -> Self:
        if self.mode == "asynchronous" and self.eta == 0:
            raise ValueError("eta: asynchronous needs eta >= 1; eta 0 is mode synchronous")
        if self.mode != "asynchronous" and self.eta:
            raise ValueError(f"eta: mode {self.mode} means 0, got {self.eta}")
        return self

    def staleness_bound(self) -> int:
        """eta, with its default."""
        return (1 if self.eta is None else self.eta) if self.mode == "asynchronous" else 0


class Stage1Params(Params):
    """Train the adapters on demonstrations in the data folder; `demos` is relative to it."""

    preset: Literal["default", "paper"] = "default"
    demos: str = Field(".", min_length=1, max_length=500)
    steps: int | None = Field(None, ge=1, le=1_000_000)
    seed: Seed = 0


PARAMS: dict[str, type[Params]] = {
    "rollout": RolloutParams,
    "imagine": ImagineParams,
    "evaluate": EvaluateParams,
    "posttrain": PosttrainParams,
    "stage1": Stage1Params,
}


def parse(kind: str, params: dict[str, Any]) -> Params:
    """`params` of a job of `kind`. Raises ValueError naming each wrong field and its limit, one sentence a field."""
    try:
        return PARAMS[kind].model_validate(params)
    except ValidationError as error:
        parts = []
        for e in error.errors(include_url=False, include_context=False)[:5]:
            field = ".".join(str(p) for p in e["loc"]) or "params"
            parts.append(f"{field}: {e['msg'].removeprefix('Value error, ')}")
        raise ValueError("; ".join(parts)) from None
