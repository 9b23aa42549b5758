"""Settings of the policy service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from services.runtime.settings import CommonSettings


class VlaSettings(CommonSettings):
    """Relative weights files are looked up in `zoo`."""

    vla_policy: str = Field(
        "tiny",
        description="base policy: tiny, gr00t, openpi, openvla_oft, cosmos_policy, lerobot, remote (services/vla/policies/)",
    )
    vla_base: str = Field("base.safetensors", description="weights of the base policy; for lerobot, its folder")
    vla_remote: str = Field("", description="address of a base policy that runs elsewhere, host:port or a URL")
    vla_remote_token: SecretStr = Field(SecretStr(""), description="what that server wants to let us in")
    vla_remote_timeout: float = Field(
        30.0, gt=0.0, le=3600.0, description="seconds for one answer of it, a first one that compiles included"
    )
    vla_remote_horizon: int = Field(
        0, ge=0, le=1000, description="actions used of one answer before asking again; 0: the layout's"
    )
    vla_remote_model: str = Field(
        "", description="name and revision of its weights: part of the base's hash, to which residuals are bound"
    )
    vla_layout: str = Field(
        "libero", description="table between its cameras, state and actions and ours: libero, robocasa, ..., or a .json file"
    )
    vla_image_size: int = Field(64, ge=8, le=1024, description="pixels a side of each camera of the simulator it acts in")
    vla_gr00t_wrapper: bool = Field(False, description="the GR00T server runs with --use-sim-policy-wrapper (flat keys)")
    vla_device: str = Field("cpu", description="where lerobot's policy runs: cpu, cuda, cuda:1, mps")
    vla_openpi_port: int = Field(0, ge=0, le=65535, description="openpi WebSocket door for robots' clients; 0: off")
    vla_gr00t_port: int = Field(0, ge=0, le=65535, description="GR00T ZeroMQ door for robots' clients; 0: off")
    vla_door_host: str = Field("127.0.0.1", description="address that these two doors bind")
    vla_door_token: SecretStr = Field(
        SecretStr(""), description="token that their clients show; needed where the address is not loopback"
    )
    vla_door_layout: str = Field("metaworld", description="the table that their clients speak, as vla_layout")
    vla_door_namespace: str = Field("default", description="namespace whose newest residual answers them")
    vla_door_version: int = Field(-1, ge=-1, description="residual version that answers them: -1 the newest, 0 the base alone")
    vla_worldmodel: str = Field("worldmodel.safetensors", description="world model whose VAE encodes what a residual sees")
    vla_adapters: str = Field(
        "adapters.safetensors", description="Stage 1 adapters that bundles must be made with; empty: bundles of any adapters load"
    )
    vla_bundle: Path | None = Field(
        None, description="residual bundle loaded at the start, under its own version, into namespace default"
    )
    vla_trusted_keys: str = Field(
        "", description="comma-separated PEM files of Ed25519 public keys: only bundles that one of them signed load; empty: any"
    )
    vla_max_bound: float = Field(
        0.0, ge=0.0, description="largest bound of a residual that loads, in standard deviations of the actions; 0: any"
    )
    vla_unseen: Literal["base", "residual"] = Field(
        "base",
        description="what acts on instructions of tasks that a residual was not post-trained on: the base alone or the residual",
    )
    vla_max_batch: int = Field(32, ge=1, le=1024, description="observations in one request, and in one batch across clients")
    vla_max_wait_ms: float = Field(5.0, ge=0.0, le=1000.0, description="a request waits at most this long for others to join")
    vla_block: int = Field(
        4, ge=1, le=1024, description="rows per network call; always full, so that actions do not depend on the batch"
    )
    vla_keep_versions: int = Field(8, ge=1, description="residual versions kept in memory per namespace")
    vla_keep_namespaces: int = Field(16, ge=1, description="namespaces kept in memory")
    vla_workers: int = Field(64, ge=2, description="requests handled at once; more wait in gRPC")

    def weights(self, name: str) -> Path:
        """Where a weights file lies."""
        return self.zoo / name  # an absolute name stands for itself
