"""Settings of the gateway."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
from pathlib import Path

from pydantic import Field, SecretStr

from services.runtime.settings import CommonSettings

MEBIBYTE = 1024 * 1024


class GatewaySettings(CommonSettings):
    """Limits, folders and the optional token of the REST door."""

    data_root: Path = Field(Path("data"), description='folder that {"episode": ...} paths are relative to and may not leave')
    upload_limit_bytes: int = Field(4096 * MEBIBYTE, ge=1024, description="largest uploaded episode file")
    json_limit_bytes: int = Field(8 * MEBIBYTE, ge=1024, description="largest body of any other request")
    segment_wait_s: float = Field(20.0, ge=0.0, le=60.0, description="POST /segment answers 200 within this, else 202 with a job")
    check_timeout_s: float = Field(2.0, gt=0.0, le=30.0, description="wait for another service's health")
    triton_http_url: str = Field("", description="Triton's HTTP door, for its health; empty: Triton's host, triton_http_port")
    gateway_token: SecretStr = Field(SecretStr(""), description="bearer token every route but health demands; empty: none")
    gateway_token_file: Path | None = Field(None, description="file that holds the token instead")
    gateway_token_create: bool = Field(
        False, description="write gateway_token_file: the token given, else a new one where there is no such file"
    )

    def token(self) -> str:
        """The token, or "" for none. Raises ValueError when the file cannot be read or is empty."""
        if self.gateway_token_file is None:
            return self.gateway_token.get_secret_value()
        if self.gateway_token_create:
            self._create_token(self.gateway_token_file)
        try:
            text = self.gateway_token_file.read_text().strip()
        except OSError as error:
            raise ValueError(f"gateway_token_file: cannot read {self.gateway_token_file}: {error.strerror}") from None
        if not text:
            raise ValueError(f"gateway_token_file: {self.gateway_token_file} is empty")
        return text

    def _create_token(self, path: Path) -> None:
        """Write the given token, or a new one where there is none yet, whole or not at all and for this user alone."""
        given = self.gateway_token.get_secret_value()
        if path.exists() and not given:
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # reading it will say what is wrong
            temporary.touch(0o600)
            temporary.write_text((given or secrets.token_urlsafe(24)) + "\n")
            temporary.replace(path)

    def triton_http(self) -> str:
        host = self.triton().rsplit(":", 1)[0]
        return self.triton_http_url.rstrip("/") or f"http://{host}:{self.triton_http_port}"

    def check_host(self) -> None:
        """Raise ValueError when the door would open to other machines without a token."""
        try:
            loopback = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            loopback = self.host == "localhost"
        if not loopback and not self.token():
            raise ValueError(f"host: {self.host} is not a loopback address; set W2A_GATEWAY_TOKEN to serve other machines")
