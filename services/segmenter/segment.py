"""One request -> one result, both JSON: what the Celery task does, without Celery.

Request, one of
  {"instruction", "gripper_width_m": [metres, one per frame], "task"?, "embodiment"?, "commanded_width_m"?, "planner"?}
  {"episode_uri": name of an HDF5 artifact, or "episode_path": file or folder below the data folder, "episode_stamp"?,
   "demo": name of one | null for all, "embodiment"?, "gripper"?: columns of a LeRobot state that add up to the width in metres,
   "planner"?}; episode_stamp: anything that changes when the data does
  {"instruction", "task"?, "planner"?}            skills only
planner: "rule" (default) or "llm", which plans and aligns by the language model of the settings.
Result: {"task", "skills": prompts (null with episodes of data), "episodes": [...], "statistics"}, an episode being {"demo",
"task", "instruction", "skills": [{"prompt", "start", "end", "reason", "start_s"?, "end_s"?}], "discarded", "reasons", "events",
"length", "fps", "gripper_width_m", "width_stride"}; its widths are every width_stride-th value, at most 256, none where there are
none. Of data also "format", and "skipped": [{"demo", "reason"}], what could not be read. With planner llm also "llm".
A bad request gives {"error": sentence that names the field and the limit} instead; it is no failure of the task.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.runtime.artifacts import ArtifactError, ArtifactStore
from services.runtime.llm import BudgetExceededError, LLMClient, make_asker
from services.runtime.paths import below
from services.segmenter.episodes import open_episodes, read_episodes
from services.segmenter.settings import SegmenterSettings
from world2act.data.formats import FormatError, Skipped
from world2act.segmentation import (
    Aligner,
    AnswerRejectedError,
    Planner,
    Segmentation,
    default_planner,
    load_schemas,
    segment_episode,
    segment_series,
    summarise,
)
from world2act.segmentation.events import MAX_FRAMES, check_widths
from world2act.segmentation.events import as_json as events_json
from world2act.segmentation.llm import LLMAligner, LLMPlanner
from world2act.segmentation.schemas import DEFAULT_EMBODIMENT
from world2act.skillset import hand_of_source

WIDTHS_SHOWN = 256

Widths = Annotated[list[float], Field(max_length=MAX_FRAMES)]


class SegmentRequest(BaseModel):
    """See the module's text. Lengths and units are checked by the library, whose messages name the field and the limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    instruction: str | None = None
    gripper_width_m: Widths | None = None
    commanded_width_m: Widths | None = None
    task: str | None = Field(None, max_length=100)
    embodiment: str | None = Field(None, max_length=100)
    episode_uri: str | None = Field(None, max_length=200)
    episode_path: str | None = Field(None, max_length=1000)
    episode_stamp: str | None = Field(None, max_length=100)
    demo: str | None = Field(None, max_length=1000)
    gripper: list[int] | None = Field(None, max_length=16)
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
    calibration = load_schemas().calibration(request.embodiment or DEFAULT_EMBODIMENT)
    if request.episode_uri is not None or request.episode_path is not None:
        if request.instruction is not None or request.gripper_width_m is not None:
            raise ValueError("episode_uri: give either an episode, or an instruction and widths, not both")
        with _data(request, settings, store) as path:
            return _of_data(path, request, settings, cutter)
    if request.demo is not None:
        raise ValueError("demo: names a demonstration of a file; episode_uri is missing")
    if request.gripper is not None:
        raise ValueError("gripper: names columns of a data set's state; episode_path is missing")
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
        calibration=calibration,
        commanded=request.commanded_width_m,
        planner=cutter.planner,
        aligner=cutter.aligner,
    )
    episode = _episode(segmentation, None, request.instruction, widths, None)
    return {**head, "episodes": [episode], "statistics": summarise([segmentation]).to_json()}


@contextmanager
def _data(request: SegmentRequest, settings: SegmenterSettings, store: ArtifactStore) -> Iterator[Path]:
    """The request's file or folder on this machine."""
    if request.episode_uri is None:
        path = below(settings.data_root, str(request.episode_path), "episode", "W2A_DATA_ROOT")
        if not path.exists():
            raise ValueError(
                f"episode: {str(request.episode_path)[:200]!r} is not in the segmenter's data folder (W2A_DATA_ROOT)"
            )
        for inner in path.rglob("*"):
            if inner.is_symlink():
                below(settings.data_root, str(inner), "episode", "W2A_DATA_ROOT")  # a data set's own links stay inside, too
        yield path
        return
    name = request.episode_uri
    if store.exists(name) and (size := int(store.fs.size(store.path(name)))) > settings.segment_max_bytes:
        raise ArtifactError(f"episode_uri: the file has {size} bytes, the limit is {settings.segment_max_bytes}")
    with store.local(name) as path:
        yield path


def _of_data(path: Path, request: SegmentRequest, settings: SegmenterSettings, cutter: Cutter) -> dict[str, Any]:
    """Segmentations of the demonstrations at `path`. What cannot be read is skipped; ValueError where nothing can."""
    limit = settings.segment_max_demos if cutter.client is None else settings.segment_llm_max_demos
    plain = (lambda text: text.replace(path.name, "the file")) if request.episode_uri else str  # an artifact's name says nothing
    try:
        source = open_episodes(path, **({"gripper": request.gripper} if request.gripper else {}))
        _, hand = hand_of_source(source, request.embodiment) or (None, None)
        cut: list[Segmentation] = []
        shown: list[dict[str, Any]] = []
        skipped: list[dict[str, str]] = []
        for name, episode in read_episodes(source, request.demo, limit):
            if isinstance(episode, Skipped):
                skipped.append({"demo": plain(name), "reason": plain(episode.reason)})
                continue
            try:
                found = segment_episode(episode, calibration=hand, planner=cutter.planner, aligner=cutter.aligner)
            except AnswerRejectedError:
                raise  # of the model, which may do better
            except ValueError as e:
                skipped.append({"demo": name, "reason": str(e)})
                continue
            cut.append(found)
            shown.append(_episode(found, name, episode.instruction, episode.widths, float(episode.meta["fps"])))
    except FormatError as e:
        raise ValueError(f"episode: {plain(str(e))}") from None
    if not cut:
        raise ValueError(f"episode: {skipped[0]['demo']}: {skipped[0]['reason']}")
    head = {"task": cut[0].task, "skills": None, "format": source.name}
    return {**head, "episodes": shown, "skipped": skipped, "statistics": summarise(cut).to_json()}


def _episode(
    segmentation: Segmentation, demo: str | None, instruction: str, widths: npt.NDArray[Any], fps: float | None
) -> dict[str, Any]:
    shown = widths if np.isfinite(widths).all() else widths[:0]
    stride = max(1, -(-shown.size // WIDTHS_SHOWN))
    skills = [{"prompt": s.prompt, "start": s.start, "end": s.end, "reason": s.reason} for s in segmentation.skills]
    if fps is not None:
        times = [{"start_s": round(s.start / fps, 3), "end_s": round(s.end / fps, 3)} for s in segmentation.skills]
        skills = [{**skill, **time_} for skill, time_ in zip(skills, times, strict=True)]
    return {
        "demo": demo,
        "task": segmentation.task,
        "instruction": instruction,
        "skills": skills,
        "discarded": segmentation.discarded,
        "reasons": list(segmentation.reasons),
        "events": events_json(segmentation.events),
        "length": segmentation.length,
        "fps": fps,
        "gripper_width_m": [round(float(w), 5) for w in shown[::stride]],
        "width_stride": stride,
    }
