"""HTTP POST /act with json_numpy arrays: what the servers of OpenVLA-OFT and Cosmos Policy share (vla-scripts/deploy.py,
cosmos_policy/experiments/robot/aloha/deploy.py). Such a server reports every error as HTTP 200 with the body "error".
"""

from __future__ import annotations

import time
from typing import Any

import httpx
import numpy as np

from services.vla.policies.elsewhere import AnswerError, Elsewhere, LostError, RefusedError, Row, last_line
from services.vla.settings import VlaSettings
from services.vla.wire import MAX_BYTES, Array, from_json, to_json


class HttpAct(Elsewhere):
    """One observation a question: rows are asked one after the other."""

    def __init__(self, name: str, settings: VlaSettings) -> None:
        super().__init__(name, settings, "127.0.0.1:8777")
        base = self.address if "://" in self.address else f"http://{self.address}"
        self._url = base if base.endswith("/act") else f"{base.rstrip('/')}/act"
        self._client: httpx.Client | None = None

    def _open(self) -> None:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self.token:
            headers["authorization"] = f"Bearer {self.token}"  # not of the protocol: for a proxy in front of the server
        self._client = httpx.Client(headers=headers, timeout=self.timeout, trust_env=False)

    def _close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _ask(self, rows: list[Row]) -> list[dict[str, Array]]:
        return [self._answer(from_json(self._post(to_json(row.flat(self.layout.policy.instruction))))) for row in rows]

    def _post(self, body: bytes) -> bytes:
        """The answer's body, read piece by piece: its length is not believed, and a trickle does not outlive the time-out."""
        assert self._client is not None
        deadline = time.monotonic() + self.timeout
        parts, size = [], 0
        try:
            with self._client.stream("POST", self._url, content=body) as response:
                for part in response.iter_raw():
                    parts.append(part)
                    size += len(part)
                    if size > MAX_BYTES:
                        raise ValueError(f"answer: more than {MAX_BYTES} bytes")
                    self.left(deadline)
        except httpx.TimeoutException:
            raise TimeoutError from None
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
            raise LostError(f"the connection ended ({error})") from None
        except httpx.TransportError as error:
            raise OSError(str(error)) from None
        except httpx.InvalidURL as error:
            raise OSError(f"{self._url}: {error}") from None
        content = b"".join(parts)
        if response.status_code in (401, 403):
            raise RefusedError(f"HTTP {response.status_code}")
        if response.status_code != 200:
            raise AnswerError(f"HTTP {response.status_code}: {last_line(content[:2000].decode(errors='replace'))}")
        return content

    def _answer(self, value: Any) -> dict[str, Array]:
        """Their actions (H, A) under the table's one action name; an answer may be the list of actions itself, or its text."""
        if value == "error":
            raise AnswerError('"error" (its log has the reason; it does not know what was sent, or failed on it)')
        if isinstance(value, str):  # json_numpy text inside JSON: how these servers answer clients that "double encode"
            value = from_json(value.encode())
        (name,) = self.layout.policy.actions
        if isinstance(value, dict):
            value = value.get(name)
        if value is None:
            raise ValueError(f"answer: has no {name!r}")
        return {name: matrix(value, name)}


def matrix(value: Any, name: str) -> Array:
    """A list of actions, or an array of one or two axes, as an array (H, n). Raises ValueError."""
    rows = [value] if isinstance(value, np.ndarray) and value.ndim == 1 else value
    try:
        found = rows if isinstance(rows, np.ndarray) else np.array([np.asarray(row, np.float32) for row in rows], np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"action {name!r}: must be a list of actions of equal size") from None
    return found
