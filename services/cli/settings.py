"""Settings of the command line and of the services that it starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import redis
from pydantic import Field, SecretStr

from services.runtime.settings import METRICS_PORTS, CommonSettings, read_secret
from services.runtime.streams import connect

PORTS = {
    "gateway": ("gateway_port",),
    "triton": ("triton_http_port", "triton_grpc_port", "triton_metrics_port"),
    "vla": ("vla_port", "vla_openpi_port", "vla_gr00t_port"),
    "simulator": ("simulator_port",),
    "prometheus": ("prometheus_port",),
}
"""The doors' ports by service, 0 for a door that is off; metrics ports are METRICS_PORTS."""


class CliSettings(CommonSettings):
    """Where the gateway is, and by how much the ports of this instance are shifted."""

    gateway_url: str = Field("", description="gateway to talk to; empty: http://host:gateway_port")
    gateway_token: SecretStr = Field(SecretStr(""), description="bearer token of the gateway, if it wants one")
    gateway_token_file: Path | None = Field(None, description="file that holds the token instead")
    signing_key: SecretStr = Field(SecretStr(""), description="Ed25519 private key (PEM) that `world2act export` signs with")
    signing_key_file: Path | None = Field(None, description="file that holds the signing key instead")
    simulator_name: str = Field("metaworld", description="which simulator: a name in services/simulator/envs")
    vla_openpi_port: int = Field(0, description="the policy server's openpi door, if any")
    vla_gr00t_port: int = Field(0, description="the policy server's GR00T door, if any")
    prometheus_port: int = Field(9090, description="where `world2act prometheus` serves")
    port_offset: int = Field(0, ge=0, le=15_000, description="`world2act` adds this to every default port, so that two can run")
    start_timeout_s: float = Field(300.0, gt=0, description="`world2act up` gives up when a service is not ready within this")

    @classmethod
    def load(cls) -> Self:
        """From the environment, with the offset applied to every port that was not set by hand."""
        return cls().shifted()

    def shifted(self) -> Self:
        """A copy whose door ports and embedded Redis have their final ports."""
        names = [name for group in PORTS.values() for name in group if name not in self.model_fields_set and getattr(self, name)]
        changes: dict[str, object] = {name: getattr(self, name) + self.port_offset for name in names}
        if "redis_url" not in self.model_fields_set and self.port_offset:
            changes["redis_url"] = f"redis://{self.host}:{6379 + self.port_offset}/0"
        return self.model_copy(update=changes)

    def metrics(self, service: str) -> int:
        """The metrics port that `service` gets."""
        return METRICS_PORTS[service] + self.port_offset

    def gateway(self) -> str:
        return self.gateway_url.rstrip("/") or f"http://{self.host}:{self.gateway_port}"

    def token(self) -> str:
        """The gateway's token, or "". Raises ValueError when its file cannot be read."""
        return self._secret("gateway_token")

    def signing(self) -> str:
        """The private key that exports are signed with, or "". Raises ValueError when its file cannot be read."""
        return self._secret("signing_key")

    def _secret(self, name: str) -> str:
        file: Path | None = getattr(self, f"{name}_file")
        return str(getattr(self, name).get_secret_value()) if file is None else read_secret(file, f"{name}_file")

    def redis_address(self) -> tuple[str, int]:
        parts = urlsplit(self.redis_url)
        return parts.hostname or "127.0.0.1", parts.port or 6379

    def embeds_redis(self) -> bool:
        """Whether `up` starts the Valkey of the wheel: not when W2A_REDIS_URL names another machine, or a Redis that answers."""
        if self.redis_address()[0] not in ("127.0.0.1", "localhost", "::1"):
            return False
        if "redis_url" not in self.model_fields_set or (self.port_offset and "W2A_REDIS_URL" not in os.environ):
            return True
        try:
            return not connect(self.redis_url, patient=False).ping()
        except redis.exceptions.RedisError:
            return True

    def environment(self, service: str) -> dict[str, str]:
        """The environment of a child: these settings, written out, and the caller's own."""
        shared = {
            f"W2A_{name.upper()}": str(getattr(self, name)) for name in CommonSettings.model_fields if name != "metrics_port"
        }
        metrics = {"W2A_METRICS_PORT": str(self.metrics(service))} if service in METRICS_PORTS else {}
        threads = str(self.torch_threads)
        mine = {name: value for name, value in os.environ.items() if name != "W2A_SIGNING_KEY"}  # not theirs
        return {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"} | mine | shared | metrics
