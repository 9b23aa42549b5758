"""Settings of both trainer processes (environment variables `W2A_*`)."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from services.runtime.settings import CommonSettings, read_secret
from world2act.signature import private_key
from world2act.types import Device


class TrainerSettings(CommonSettings):
    """Shared settings plus what rollouts and jobs need."""

    rollout_workers: int = Field(2, ge=1, le=64, description="episodes that one rollout coordinator executes at once")
    rollout_claim_seconds: float = Field(
        30.0, ge=1, description="an episode that its coordinator left alone this long is taken over"
    )
    rollout_patience: float = Field(600.0, ge=1, description="seconds an episode waits for a simulator or policy that is away")
    environment_wait: float = Field(10.0, ge=0, description="seconds to wait for a free environment before asking again")
    action_std: float = Field(
        0.0, ge=0, le=1, description="unit of rollout noise on every axis; 0: the adapters' action statistics in the zoo"
    )
    imagine_steps: int = Field(0, ge=0, le=100, description="denoising steps of Stage 2 targets; 0: the world model's own")
    imagine_guidance: float = Field(0.0, ge=0, le=20, description="guidance of Stage 2 targets; 0: the world model's own")
    video_fps: int = Field(10, ge=1, le=60, description="frames (one per action) per second of stored mp4 files")
    trainer_device: Device = Field("auto", description="trains the residual: cpu, cuda, or auto, the GPU where torch sees one")
    job_workers: int = Field(2, ge=1, le=16, description="jobs that run at once")
    job_claim_seconds: float = Field(15.0, ge=1, description="a job that its trainer left alone this long is taken over")
    in_flight: int = Field(8, ge=1, le=1024, description="episodes of one job that are requested and not yet back")
    imagine_patience: float = Field(240.0, ge=1, description="seconds until a target that does not come is asked for again")
    data_root: Path = Field(Path("data"), description="the only folder that a stage1 job may read demonstrations from")
    trainer_signing_key_file: Path | None = Field(
        None, description="Ed25519 private key (PEM) that the bundle of every round is signed with, for a vla with trusted keys"
    )
    metrics_every: int = Field(20, ge=1, description="Stage 2 updates between two metrics events")

    def signer(self) -> Ed25519PrivateKey | None:
        """The key that bundles are signed with, or None. Raises ValueError naming `trainer_signing_key_file` for a bad one."""
        file = self.trainer_signing_key_file
        field = "trainer_signing_key_file"
        return None if file is None else private_key(read_secret(file, field), field)
