"""A base policy that runs elsewhere, behind somebody else's protocol: one question, one answer, on a connection that is kept.

What the protocols share is here: the table (layouts.py), one time-out for every answer, one new attempt on a fresh connection
when an old one broke, and errors that name the policy, its address and what was wrong. A silent server costs one time-out.
"""

from __future__ import annotations

import hashlib
import socket
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import structlog

from services.runtime.rpc import RpcError
from services.vla.policies import layouts
from services.vla.policies.base import BasePolicy, PolicySpec
from services.vla.settings import VlaSettings
from services.vla.wire import Array
from world2act.types import FloatArray, ImageArray, M

log = structlog.get_logger()
Code = grpc.StatusCode
KNOCK_SECONDS = 2.0


class LostError(ConnectionError):
    """The connection is gone: worth one new attempt."""


class RefusedError(Exception):
    """The server does not let us in (token)."""


class AnswerError(Exception):
    """The server answered, with an error of its own."""


@dataclass(frozen=True)
class Row:
    """One observation in the other policy's terms."""

    images: dict[str, ImageArray]
    states: dict[str, FloatArray]
    instruction: str

    def flat(self, instruction: str) -> dict[str, Any]:
        """All in one map, the instruction under the name `instruction`."""
        return {**self.images, **self.states, instruction: self.instruction}


class Elsewhere(BasePolicy):
    """Subclasses speak a protocol: `_open`, `_close`, `_ask`."""

    def __init__(self, name: str, settings: VlaSettings, example: str) -> None:
        """`example`: an address to show. Raises ValueError naming the setting that is missing or the table's wrong field."""
        if not settings.vla_remote:
            raise ValueError(f"vla_remote: must be the address of the {name} server, such as {example}")
        self.address, self.timeout = settings.vla_remote, settings.vla_remote_timeout
        self.token = settings.vla_remote_token.get_secret_value()
        self.layout = layouts.load(settings.vla_layout, name)
        horizon = settings.vla_remote_horizon or self.layout.policy.horizon
        if horizon < M:
            raise ValueError(
                f"horizon: {horizon} actions an answer are shorter than a chunk of M = {M}; see W2A_VLA_REMOTE_HORIZON"
            )
        robot = self.layout.robot
        # The weights are elsewhere: what they are called, and how we talk to them, stands for them.
        identity = repr((name, settings.vla_remote_model, self.layout.model_dump_json(), horizon))
        self._spec = PolicySpec(
            name=name,
            hash=hashlib.sha256(identity.encode()).hexdigest(),
            cameras=dict(robot.cameras),
            height=settings.vla_image_size,
            width=settings.vla_image_size,
            state_size=robot.state,
            low=tuple(robot.low),
            high=tuple(robot.high),
            chunk=M,
            horizon=horizon,
            table=f"layout {settings.vla_layout}, W2A_VLA_LAYOUT",
        )
        self._connected = False

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    def away(self) -> str:
        """See `BasePolicy.away`: asks only whether anything listens there."""
        try:
            parts = urlsplit(self.address if "://" in self.address else f"//{self.address}")
            port = parts.port or {"https": 443, "wss": 443}.get(parts.scheme, 80)
            socket.create_connection((parts.hostname or "", port), timeout=KNOCK_SECONDS).close()
        except (OSError, ValueError) as error:
            return str(self._error(Code.UNAVAILABLE, f"cannot be reached ({error})"))
        return ""

    def _act(self, grids: ImageArray, states: FloatArray, instructions: Sequence[str]) -> FloatArray:
        rows = [
            Row(self.layout.images(grid), self.layout.states(state), text)
            for grid, state, text in zip(grids, states, instructions, strict=True)
        ]
        answers = self._reach(rows)
        return np.stack([self._read(answer) for answer in answers])

    def _reach(self, rows: list[Row]) -> list[dict[str, Array]]:
        """The answers, over the kept connection or a new one. Raises RpcError that says who did what."""
        kept = self._connected
        try:
            try:
                return self._try(rows)
            except LostError:
                if not kept:
                    raise
                log.info("connection lost, opening another", policy=self.spec.name, address=self.address)
                return self._try(rows)
        except TimeoutError:
            raise self._error(Code.DEADLINE_EXCEEDED, f"no answer within {self.timeout:g} s (W2A_VLA_REMOTE_TIMEOUT)") from None
        except OSError as error:
            raise self._error(Code.UNAVAILABLE, f"cannot be reached ({error})") from None
        except RefusedError as error:
            raise self._error(Code.UNAUTHENTICATED, f"refuses us ({error}); see W2A_VLA_REMOTE_TOKEN") from None
        except AnswerError as error:
            raise self._error(Code.INTERNAL, f"answers with an error: {error}") from None
        except ValueError as error:
            raise self._error(Code.INTERNAL, str(error)) from None

    def _try(self, rows: list[Row]) -> list[dict[str, Array]]:
        try:
            if not self._connected:
                self._open()
                self._connected = True
            return self._ask(rows)
        except BaseException:
            self.disconnect()  # whatever went wrong, an answer that comes late must not be taken for the next question's
            raise

    def _read(self, answer: dict[str, Array]) -> FloatArray:
        """Their action vectors -> our plan (horizon, A)."""
        try:
            actions = self.layout.our_actions(answer)
        except ValueError as error:
            raise self._error(Code.INTERNAL, str(error)) from None
        wanted = self.spec.horizon
        if len(actions) < wanted:
            raise self._error(
                Code.INTERNAL,
                f"answers {len(actions)} actions, the horizon is {wanted} (layout {self.layout.policy.horizon}); "
                f"W2A_VLA_REMOTE_HORIZON sets a shorter one, at least M = {M}",
            )
        if not np.isfinite(actions).all():
            raise self._error(Code.INTERNAL, "actions are not finite")
        return actions[:wanted]

    def _error(self, code: Code, reason: str) -> RpcError:
        return RpcError(code, f"policy {self.spec.name} at {self.address}: {reason}")

    def disconnect(self) -> None:
        """Drop the connection; the next question opens another."""
        self._connected = False
        self._close()

    def left(self, deadline: float) -> float:
        """Seconds until `deadline` (time.monotonic). Raises TimeoutError when there are none."""
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    @abstractmethod
    def _open(self) -> None:
        """Connect within the time-out and check what the server says of itself. Raises what `_ask` raises."""

    @abstractmethod
    def _close(self) -> None:
        """Free the connection; harmless when there is none."""

    @abstractmethod
    def _ask(self, rows: list[Row]) -> list[dict[str, Array]]:
        """For each row the policy's action vectors (H, n) by name.

        Raises TimeoutError, LostError, another OSError, RefusedError, AnswerError, or ValueError for an answer that is not what
        the protocol says.
        """


def last_line(text: str) -> str:
    """What a traceback ends with, short."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return (lines[-1] if lines else "(empty)")[:300]
