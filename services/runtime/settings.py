"""Settings that every service shares. Each service subclasses `CommonSettings`; docs/settings.md lists them all.

Sources, strongest first: constructor arguments (flags), environment variables `W2A_*`, the file named by `W2A_ENV_FILE`.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class CommonSettings(BaseSettings):
    """What every service knows."""

    model_config = SettingsConfigDict(env_prefix="W2A_", env_file=os.environ.get("W2A_ENV_FILE"), extra="ignore", frozen=True)

    redis_url: str = Field("redis://127.0.0.1:6379/0", description="Redis or Valkey >= 7")
    artifacts_url: str = Field("file://.world2act/artifacts", description="fsspec URL of the artifact store (file, s3, ...)")
    zoo: Path = Field(Path("zoo"), description="folder of the shipped weights")
    run_dir: Path = Field(Path(".world2act"), description="logs, process ids and the embedded Redis' files")
    host: str = Field("127.0.0.1", description="address that doors bind")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")
    log_json: bool = Field(False, description="log one JSON object a line")
    instance: str = Field("0", description="name of this replica, part of consumer and heartbeat names; empty: the host's name")
    torch_threads: int = Field(1, ge=1, description="CPU threads for torch")
    gateway_port: int = 8080
    triton_http_port: int = 8000
    triton_grpc_port: int = 8001
    triton_metrics_port: int = 8002
    vla_port: int = 50051
    simulator_port: int = 50061
    vla_address: str = Field("", description="policy door; empty: host:vla_port")
    simulator_addresses: str = Field(
        "", description="simulator doors, comma separated, a name stands for all its replicas; empty: host:simulator_port"
    )
    triton_address: str = Field("", description="Triton gRPC; empty: host:triton_grpc_port")
    metrics_port: int = Field(0, description="/metrics, /healthz and /readyz; 0: the service's default (9100 and up)")

    @field_validator("instance")
    @classmethod
    def _own_name(cls, value: str) -> str:
        return value or socket.gethostname()

    def vla(self) -> str:
        return self.vla_address or f"{self.host}:{self.vla_port}"

    def simulators(self) -> list[str]:
        return [a.strip() for a in self.simulator_addresses.split(",") if a.strip()] or [f"{self.host}:{self.simulator_port}"]

    def triton(self) -> str:
        return self.triton_address or f"{self.host}:{self.triton_grpc_port}"


def read_secret(file: Path, field: str) -> str:
    """What a file holds, stripped. Raises ValueError naming `field` when it cannot be read; the text is in no error."""
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{field}: cannot read {file}: {getattr(error, 'strerror', 'it is no text')}") from None


METRICS_PORTS = {
    "gateway": 9100,
    "segmenter": 9101,
    "worldmodel": 9102,
    "vla": 9103,
    "simulator": 9104,
    "rollout": 9105,
    "trainer": 9106,
}
"""Default metrics port of each service."""
