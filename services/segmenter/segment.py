"""One request -> one result, both JSON: what the Celery task does, without Celery.

Request, one of
  {"instruction", "gripper_width_m": [metres, one per frame], "task"?, "embodiment"?, "commanded_width_m"?}
  {"episode_uri": name of an HDF5 artifact, "demo": "demo_0" | null for all, "embodiment"?}
  {"instruction", "task"?}                        skills only
Result: {"task", "skills": prompts (null with a file), "episodes": [...], "statistics"}, an episode being {"demo", "task",
"instruction", "skills": [{"prompt", "start", "end", "reason"}], "discarded", "reasons", "events", "length", "gripper_width_m",
"width_stride"}; its widths are every width_stride-th value, at most 256.
A bad request gives {"error": sentence that names the field and the limit} instead; it is no failure of the task.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.runtime.artifacts import ArtifactError, ArtifactStore
from services.segmenter.episodes import read_widths
from services.segmenter.settings import SegmenterSettings
from world2act.segmentation import Segmentation, default_planner, load_schemas, segment_series, summarise
from world2act.segmentation.events import MAX_FRAMES, WidthArray, check_widths
from world2act.segmentation.events import as_json as events_json
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


def describe(error: ValidationError) -> str:
    """The first problem that pydantic found, as 'field: what is wrong'."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(p) for p in first['loc']) or 'request'}: {first['msg']}"


def run_request(content: Any, settings: SegmenterSettings, store: ArtifactStore) -> dict[str, Any]:
    """The result of one request; {"error": ...} for a bad one. Raises only where the artifact store fails (to be tried again)."""
    try:
        request = SegmentRequest.model_validate(content)
        return _run(request, settings, store)
    except ValidationError as e:
        return {"error": describe(e)}
    except ValueError as e:  # the library's and the store's, each names its field
        return {"error": str(e)}


def _run(request: SegmentRequest, settings: SegmenterSettings, store: ArtifactStore) -> dict[str, Any]:
    load_schemas().calibration(request.embodiment)
    if request.episode_uri is not None:
        if request.instruction is not None or request.gripper_width_m is not None:
            raise ValueError("episode_uri: give either an episode, or an instruction and widths, not both")
        found = list(_of_file(request, settings, store))
        return {"task": found[0][0].task, "skills": None, **_result(found)}
    if request.demo is not None:
        raise ValueError("demo: names a demonstration of a file; episode_uri is missing")
    if request.instruction is None:
        raise ValueError("instruction: is missing; give an instruction, widths with an instruction, or episode_uri")
    plan = default_planner().plan(request.instruction, request.task)
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
    )
    return {**head, **_result([(segmentation, None, request.instruction, widths)])}


Found = tuple[Segmentation, str | None, str, WidthArray]


def _of_file(request: SegmentRequest, settings: SegmenterSettings, store: ArtifactStore) -> Iterator[Found]:
    """Segmentations of the demonstrations of an artifact."""
    name = str(request.episode_uri)
    path = store.path(name)
    if store.exists(name) and (size := int(store.fs.size(path))) > settings.segment_max_bytes:
        raise ArtifactError(f"episode_uri: the file has {size} bytes, the limit is {settings.segment_max_bytes}")
    base = load_schemas().calibration(request.embodiment)
    for series in read_widths(store.get(name), request.demo, settings.segment_max_demos):
        calibration = base if series.open_width_m is None else replace(base, open_width_m=series.open_width_m)
        try:
            segmentation = segment_series(
                series.widths, series.instruction, task=series.task, frames=series.frames, calibration=calibration
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
