"""Settings of the policy service."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from services.runtime.settings import CommonSettings


class VlaSettings(CommonSettings):
    """Relative weights files are looked up in `zoo`."""

    vla_policy: str = Field("tiny", description="base policy: a name registered in services/vla/policies/base.py")
    vla_base: str = Field("base.safetensors", description="weights of the base policy")
    vla_worldmodel: str = Field("worldmodel.safetensors", description="world model whose VAE encodes what a residual sees")
    vla_adapters: str = Field(
        "adapters.safetensors", description="Stage 1 adapters that bundles must be made with; empty: bundles of any adapters load"
    )
    vla_bundle: Path | None = Field(None, description="residual bundle that is version 1 of the default namespace from the start")
    vla_trusted_keys: str = Field(
        "", description="comma-separated PEM files of Ed25519 public keys: only bundles that one of them signed load; empty: any"
    )
    vla_max_bound: float = Field(
        0.0, ge=0.0, description="largest bound of a residual that loads, in standard deviations of the actions; 0: any"
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
