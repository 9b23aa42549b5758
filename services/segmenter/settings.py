"""Settings of the segmenter; environment variables W2A_SEGMENT_* and W2A_LLM_*."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from services.runtime.llm import LLMSettings


class SegmenterSettings(LLMSettings):
    """What the segmenter knows beyond what every service knows."""

    segment_visibility_seconds: int = Field(
        300, ge=1, le=3600, description="a task whose worker died is given to another after this; longer than any task"
    )
    segment_result_seconds: int = Field(24 * 3600, ge=60, description="how long results are kept")
    segment_attempts: int = Field(3, ge=1, le=20, description="starts of one task before it goes to the dead letters")
    segment_max_demos: int = Field(10_000, ge=1, description="demonstrations read from one file")
    segment_llm_max_demos: int = Field(200, ge=1, description="demonstrations of one file with planner llm (seconds each)")
    segment_max_bytes: int = Field(4 * 1024**3, ge=1, description="largest uploaded file, bytes")
    data_root: Path = Field(Path("data"), description="the only folder that an episode's path may lead to; the gateway's")
