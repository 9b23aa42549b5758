"""IF and PA of imagined clips by a judge model (METHOD section 2): any OpenAI-compatible server that takes images.

IF (instruction following): is the skill in the prompt done at the end? PA (physical adherence): does what happens obey physics?
Each clip is two questions over frames evenly spaced in time, each answered yes or no (binary), or from 1 to 5 (graded). The score
is the mean over clips in percent: yes is 100, a grade g is 25 (g - 1). The paper asked Qwen-VL and VideoCon-Physics; another
judge gives another scale, so compare rows of one judge only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from services.runtime.llm import BudgetExceededError, LLMClient, LLMSettings, make_asker
from services.worldmodel.backbones import Frames
from services.worldmodel.quality import Imagined
from world2act.data.grid import letterbox
from world2act.evaluation import wilson
from world2act.segmentation.alignment import AnswerRejectedError
from world2act.segmentation.llm import InProcess, Memory

Kind = Literal["binary", "graded"]
IMAGES = 8
"""Frames of a clip that the judge sees."""
PIXELS = 256
"""Longest side of what it sees."""
SYSTEM = (
    "You judge short videos of a robot arm, made by a computer. You see frames in the order of time. Black areas are padding. "
    "Judge by what the frames show and nothing else. Answer with one JSON object."
)
QUESTIONS = {
    ("IF", "binary"): "The robot was told: {prompt!r}. Does it do that, to the end, in these frames?",
    ("IF", "graded"): "The robot was told: {prompt!r}. How much of it is done in these frames? 1: nothing of it, 5: all of it.",
    ("PA", "binary"): "Do objects and robot move as in the real world: solid, none appearing, vanishing, or moving untouched?",
    ("PA", "graded"): (
        "How well do objects and robot obey physics: solid, none appearing, vanishing, moving untouched? 1: not at all, 5: fully."
    ),
}


class BinaryAnswer(BaseModel):
    """Yes or no."""

    model_config = ConfigDict(extra="forbid", strict=True)
    answer: Literal["yes", "no"]
    reason: str = Field(min_length=1, max_length=500)


class GradedAnswer(BaseModel):
    """1 to 5."""

    model_config = ConfigDict(extra="forbid", strict=True)
    grade: int = Field(ge=1, le=5)
    reason: str = Field(min_length=1, max_length=500)


@dataclass(frozen=True)
class Verdict:
    """Scores in percent over the clips that were judged, with Wilson's 95 % interval where answers are binary; unjudged: clips
    without an acceptable answer; stopped: why the judge was asked no further, or ''."""

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    clips: int
    unjudged: int
    stopped: str = ""


def jpeg(frame: Frames) -> bytes:
    """A frame (H, W, 3) as JPEG."""
    height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
    codec: Any = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = width, height, "yuvj420p", Fraction(1)
    packets = codec.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24"))
    return b"".join(bytes(packet) for packet in [*packets, *codec.encode(None)])


def question(what: str, kind: Kind, prompt: str, frames: Frames) -> list[dict[str, Any]]:
    """The messages of one question about frames (T, H, W, 3)."""
    at = np.linspace(0, len(frames) - 1, min(IMAGES, len(frames))).round().astype(int)
    scale = min(1.0, PIXELS / max(frames.shape[1:3]))
    size = (round(frames.shape[1] * scale), round(frames.shape[2] * scale))
    images = [base64.b64encode(jpeg(letterbox(frames[i], *size))).decode() for i in at]
    parts: list[dict[str, Any]] = [{"type": "text", "text": QUESTIONS[what, kind].format(prompt=prompt)}]
    parts += [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}} for image in images]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}]


def without_images(record: dict[str, Any]) -> dict[str, Any]:
    """A log record with the hash of each image in its place."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        if isinstance(value, list):
            return [short(v) for v in value]
        if isinstance(value, str) and value.startswith("data:image/"):
            return f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"
        return value

    return dict(short(record))


class Judge:
    """Asks the model of W2A_LLM_*; its budget, retries, time-outs and prompt log are those of the segmenter's planner."""

    def __init__(self, settings: LLMSettings, kind: Kind = "binary", memory: Memory | None = None) -> None:
        asker, self.client = make_asker(settings, InProcess() if memory is None else memory)
        log = asker.log
        self.asker = replace(asker, log=lambda record: log(without_images(record)))
        self.kind: Kind = kind

    def score(self, what: str, prompt: str, frames: Frames) -> float:
        """0 to 100. Raises AnswerRejectedError where no answer was acceptable, and what the client raises."""
        messages: Any = question(what, self.kind, prompt, frames)
        if self.kind == "binary":
            return 100.0 * (self.asker.ask(messages, BinaryAnswer, lambda a: str(a.answer)) == "yes")
        return 25.0 * (self.asker.ask(messages, GradedAnswer, lambda a: int(a.grade)) - 1)

    def judge(self, imagined: Sequence[Imagined]) -> Verdict:
        """IF and PA over clips; a clip counts when both questions were answered. A spent budget ends it with what there is."""
        found: dict[str, list[float]] = {"IF": [], "PA": []}
        unjudged, stopped = 0, ""
        for clip in imagined:
            try:
                pair = {what: self.score(what, clip.clip.prompt, clip.frames) for what in found}
            except AnswerRejectedError:
                unjudged += 1
                continue
            except BudgetExceededError as error:
                stopped = str(error)
                break
            for what, value in pair.items():
                found[what].append(value)
        count = len(found["IF"])
        intervals = {}
        if self.kind == "binary" and count:
            for what, values in found.items():
                rate = wilson(round(sum(values) / 100), count)
                intervals[what] = (100 * rate.low, 100 * rate.high)
        scores = {what: float(np.mean(values)) for what, values in found.items() if values}
        return Verdict(scores, intervals, count, unjudged, stopped)

    def used(self) -> str:
        """What it has cost, in words."""
        client: LLMClient = self.client
        return json.dumps(
            {
                "requests": client.requests,
                "prompt_tokens": client.prompt_tokens,
                "answer_tokens": client.completion_tokens,
                "usd": client.usd,
            }
        )
