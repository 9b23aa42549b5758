"""One request -> one result, both JSON: what the Celery task does, without Celery.

Request, one of
  {"instruction", "gripper_width_m": [metres, one per frame], "task"?, "embodiment"?, "commanded_width_m"?, "planner"?}
  {"episode_uri": name of an HDF5 artifact, "demo": "demo_0" | null for all, "embodiment"?, "planner"?}
  {"instruction", "task"?, "planner"?}            skills only
planner: "rule" (default) or "llm", which plans and aligns by the language model of the settings.
Result: {"task", "skills": prompts (null with a file), "episodes": [...], "statistics"}, an episode being {"demo", "task",
"instruction", "skills": [{"prompt", "start", "end", "reason"}], "discarded", "reasons", "events", "length", "gripper_width_m",
"width_stride"}; its widths are every width_stride-th value, at most 256. With planner llm, "llm" says what that took.
A bad request gives {"error": sentence that names the field and the limit} instead; it is no failure of the task.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.runtime.artifacts import ArtifactError, ArtifactStore
from services.runtime.llm import BudgetExceededError, LLMClient, make_asker
from services.segmenter.episodes import read_widths
from services.segmenter.settings import SegmenterSettings
from world2act.segmentation import (
    Aligner,
    AnswerRejectedError,
    Planner,
    Segmentation,
    default_planner,
    load_schemas,
    segment_series,
    summarise,
)
from world2act.segmentation.events import MAX_FRAMES, WidthArray, check_widths
from world2act.segmentation.events import as_json as events_json
from world2act.segmentation.llm import LLMAligner, LLMPlanner
from world2act.segmentation.schemas import DEFAULT_EMBODIMENT

WIDTHS_SHOWN = 256

Widths = Annotated[list[float], Field(max_length=MAX_FRAMES)]


class SegmentRequest(BaseModel):
    """See the module's text. Lengths and units are checked by the library, whose messages name the field and the limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instruction: str | None = None
    gripper_width_m: Widths | None = None
    commanded_width_m: Widths | None = None
    task: str | None = Field(None, max_length=100)
    embodiment: str = Field(DEFAULT_EMBODIMENT, max_length=100)
    episode_uri: str | None = Field(None, max_length=200)
    demo: str | None = Field(None, max_length=100)
    planner: Literal["rule", "llm"] = "rule"


@dataclass(frozen=True)
class Cutter:
    """How a request is planned and aligned; client: what it asks through, None for the rules."""

    planner: Planner
    aligner: Aligner | None = None
    client: LLMClient | None = None

    @classmethod
    def rules(cls) -> Cutter:
        """Schemas and verb phrases, no network."""
        return cls(default_planner())

    @classmethod
    def of_model(cls, settings: SegmenterSettings, store: ArtifactStore) -> Cutter | None:
        """By the language model of the settings, its answers kept in the store; None where there is none."""
        if not settings.llm_configured:
            return None
        asker, client = make_asker(settings, store)
        return cls(LLMPlanner(asker), LLMAligner(asker), client)

    def used(self) -> dict[str, float]:
        """What was asked and spent so far."""
        c = self.client
        if c is None:
            return {}
        return {
            "requests": c.requests,
            "prompt_tokens": c.prompt_tokens,
            "completion_tokens": c.completion_tokens,
            "usd": round(c.usd, 6),
        }


def describe(error: ValidationError) -> str:
    """The first problem that pydantic found, as 'field: what is wrong'."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(p) for p in first['loc']) or 'request'}: {first['msg']}"


def run_request(content: Any, settings: SegmenterSettings, store: ArtifactStore, model: Cutter | None = None) -> dict[str, Any]:
    """The result of one request; {"error": ...} for a bad one, with "again": true where it may be good later (the model's).

    model: what planner llm means, None where no model is configured.
    Raises only what is to be tried again: where the artifact store fails (OSError) or the model (LLMUnavailableError).
    """
    try:
        request = SegmentRequest.model_validate(content)
        if request.planner == "rule":
            return _run(request, settings, store, Cutter.rules())
        if model is None or model.client is None:
            raise ValueError("planner: no language model is configured (W2A_LLM_KEY or W2A_LLM_BASE_URL); use planner rule")
        before = model.used()
        # The rest of the time belongs to those who wait for this task after its worker died.
        model.client.deadline = time.monotonic() + 0.8 * settings.segment_visibility_seconds
        result = _run(request, settings, store, model)
        return {**result, "llm": {name: round(value - before[name], 6) for name, value in model.used().items()}}
    except (BudgetExceededError, AnswerRejectedError) as e:
        return {"error": f"planner: {e}", "again": True}
    except ValidationError as e:
        return {"error": describe(e)}
    except ValueError as e:  # the library's and the store's, each names its field
        return {"error": str(e)}


def _run(request: SegmentRequest, settings: SegmenterSettings, store: ArtifactStore, cutter: Cutter) -> dict[str, Any]:
    load_schemas().calibration(request.embodiment)
    if request.episode_uri is not None:
        if request.instruction is not None or request.gripper_width_m is not None:
            raise ValueError("episode_uri: give either an episode, or an instruction and widths, not both")
        found = list(_of_file(request, settings, store, cutter))
        return {"task": found[0][0].task, "skills": None, **_result(found)}
    if request.demo is not None:
        raise ValueError("demo: names a demonstration of a file; episode_uri is missing")
    if request.instruction is None:
        raise ValueError("instruction: is missing; give an instruction, widths with an instruction, or episode_uri")
    plan = cutter.planner.plan(request.instruction, request.task)
    head = {"task": plan.task, "skills": list(plan.prompts)}
    if request.gripper_width_m is None:
        return {**head, "episodes": [], "statistics": None}
    widths = check_widths(request.gripper_width_m)
    segmentation = segment_series(
        widths,
        request.instruction,
        task=request.task,
        calibration=load_schemas().calibration(request.embodiment),
        commanded=request.commanded_width_m,
        planner=cutter.planner,
        aligner=cutter.aligner,
    )
    return {**head, **_result([(segmentation, None, request.instruction, widths)])}


Found = tuple[Segmentation, str | None, str, WidthArray]


def _of_file(request: SegmentRequest, settings: SegmenterSettings, store: ArtifactStore, cutter: Cutter) -> Iterator[Found]:
    """Segmentations of the demonstrations of an artifact."""
    name = str(request.episode_uri)
    path = store.path(name)
    if store.exists(name) and (size := int(store.fs.size(path))) > settings.segment_max_bytes:
        raise ArtifactError(f"episode_uri: the file has {size} bytes, the limit is {settings.segment_max_bytes}")
    base = load_schemas().calibration(request.embodiment)
    limit = settings.segment_max_demos if cutter.client is None else settings.segment_llm_max_demos
    for series in read_widths(store.get(name), request.demo, limit):
        calibration = base if series.open_width_m is None else replace(base, open_width_m=series.open_width_m)
        try:
            segmentation = segment_series(
                series.widths,
                series.instruction,
                task=series.task,
                frames=series.frames,
                calibration=calibration,
                planner=cutter.planner,
                aligner=cutter.aligner,
            )
        except ValueError as e:
            raise ValueError(f"{series.demo}: {e}") from None
        yield segmentation, series.demo, series.instruction, series.widths


def _result(found: list[Found]) -> dict[str, Any]:
    return {"episodes": [_episode(*f) for f in found], "statistics": summarise(f[0] for f in found).to_json()}


def _episode(segmentation: Segmentation, demo: str | None, instruction: str, widths: WidthArray) -> dict[str, Any]:
    stride = -(-widths.size // WIDTHS_SHOWN)
    return {
        "demo": demo,
        "task": segmentation.task,
        "instruction": instruction,
        "skills": [{"prompt": s.prompt, "start": s.start, "end": s.end, "reason": s.reason} for s in segmentation.skills],
        "discarded": segmentation.discarded,
        "reasons": list(segmentation.reasons),
        "events": events_json(segmentation.events),
        "length": segmentation.length,
        "gripper_width_m": [round(float(w), 5) for w in widths[::stride]],
        "width_stride": stride,
    }
