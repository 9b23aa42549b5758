"""Settings of the world-model service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from services.runtime.settings import CommonSettings


class WorldModelSettings(CommonSettings):
    """Both halves of the service: Triton (`triton`) and the imagination worker (`worker`)."""

    backbone: str = Field("small", description="world model that Triton serves: a name in services/worldmodel/backbones")
    backbone_model: str = Field(
        "",
        description="its weights: a folder in the diffusers layout, or a hub's id (owner/name); small: a file, empty: the zoo's",
    )
    backbone_size: str = Field(
        "", description="HEIGHTxWIDTH of its frames; empty: what the folder was fine-tuned at, else the model's own"
    )
    backbone_frames: int = Field(0, ge=0, description="frames of its longest clip; 0: as for the size")
    backbone_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on a CPU"
    )
    backbone_compile: bool = Field(False, description="torch.compile its transformer")
    backbone_cache: float = Field(
        0.0, ge=0, le=1, description="step caching: skip a step after two whose predictions differ by less than this; 0: never"
    )
    backbone_layout: Literal["auto", "none", "robocasa", "libero", "metaworld"] = Field(
        "auto", description="camera layout told before each prompt; auto: the one that the folder was fine-tuned with, else none"
    )
    guardrail: bool = Field(
        True, description="NVIDIA's guardrail for cosmos_predict2, which its licence requires; off: own weights"
    )
    triton_root: Path | None = Field(
        None, description="Triton's folder (bin, backends, caches), as in NVIDIA's image; default: the nvidia-pytriton wheel"
    )
    imagine_batch: int = Field(
        16, ge=1, le=256, description="requests that the imagination worker takes at once and batches together"
    )
    imagine_timeout: float = Field(300.0, gt=0, description="seconds after which a call to Triton counts as failed")
    video_fps: int = Field(10, ge=1, le=60, description="frames per second of stored mp4 files")

    @field_validator("backbone_size")
    @classmethod
    def _size(cls, value: str) -> str:
        height, x, width = value.partition("x")
        if value and not (x and height.isdecimal() and width.isdecimal() and 0 < int(height) <= 8192 and 0 < int(width) <= 8192):
            raise ValueError(f"must be HEIGHTxWIDTH in pixels, such as 480x832, got {value[:40]!r}")
        return value

    def size(self) -> tuple[int, int] | None:
        """(height, width) of backbone_size, None where it is empty."""
        height, _, width = self.backbone_size.partition("x")
        return (int(height), int(width)) if self.backbone_size else None
