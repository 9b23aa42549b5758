"""Settings of the world-model service."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from services.runtime.settings import CommonSettings


class WorldModelSettings(CommonSettings):
    """Both halves of the service: Triton (`triton`) and the imagination worker (`worker`)."""

    backbone: str = Field("small", description="world model that Triton serves: a name in services/worldmodel/backbones")
    triton_root: Path | None = Field(
        None, description="Triton's folder (bin, backends, caches), as in NVIDIA's image; default: the nvidia-pytriton wheel"
    )
    imagine_batch: int = Field(
        16, ge=1, le=256, description="requests that the imagination worker takes at once and batches together"
    )
    imagine_timeout: float = Field(300.0, gt=0, description="seconds after which a call to Triton counts as failed")
    video_fps: int = Field(10, ge=1, le=60, description="frames per second of stored mp4 files")
