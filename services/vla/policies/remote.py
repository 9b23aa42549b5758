"""The base policy of another server of ours, over policy.proto: its version 0. It keeps its plans itself, per episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import grpc
import numpy as np
import structlog

from services.runtime.generated import policy_pb2
from services.runtime.generated.policy_pb2_grpc import PolicyStub
from services.runtime.rpc import RpcError, connect_channel
from services.runtime.tensors import from_tensor, to_tensor
from services.vla.policies.base import BasePolicy, PolicySpec
from services.vla.policies.plans import NOWHERE, Turn
from services.vla.settings import VlaSettings
from world2act.types import FloatArray, ImageArray, M

log = structlog.get_logger()
MAX_SIZE = 4096
"""Most pixels a side, state columns and action components that another server may claim."""


class Remote(BasePolicy):
    """What it is, it says itself (Describe); whatever base policy it runs, its hash is ours, so its residuals fit here."""

    def __init__(self, address: str, timeout: float) -> None:
        """Asks the server what it is, waiting for it up to `timeout` seconds. Raises OSError or ValueError with a sentence."""
        self._address, self._timeout = address, timeout
        self._channel = connect_channel(address)  # gRPC reconnects by itself
        self._stub: Any = PolicyStub(self._channel)  # type: ignore[no-untyped-call]
        try:
            reply = self._stub.Describe(policy_pb2.PolicyDescribeRequest(), timeout=timeout, wait_for_ready=True)
        except grpc.RpcError as error:
            raise OSError(f"policy remote at {address}: {error.details()} ({error.code().name})") from None
        sizes = (reply.image_height, reply.image_width, reply.state_size, reply.action_size, reply.max_batch)
        limits = len(reply.action_low) == len(reply.action_high) == reply.action_size
        cameras = len(set(reply.cells)) == len(reply.cameras) and set(reply.cells) <= {0, 1, 2, 3} and len(reply.cells) > 0
        if not (limits and cameras and all(1 <= size <= MAX_SIZE for size in sizes)) or reply.chunk != M:
            raise ValueError(
                f"policy remote at {address}: describes itself with cameras {list(reply.cameras)} in cells {list(reply.cells)}, "
                f"sizes {sizes}, {len(reply.action_low)} action limits, chunk {reply.chunk} (M = {M}): not of this version"
            )
        self._batch = int(reply.max_batch)
        self._spec = PolicySpec(
            name="remote",
            hash=reply.base_hash,
            cameras=dict(zip(reply.cameras, reply.cells, strict=True)),
            height=reply.image_height,
            width=reply.image_width,
            state_size=reply.state_size,
            low=tuple(reply.action_low),
            high=tuple(reply.action_high),
            chunk=M,
        )

    @property
    def spec(self) -> PolicySpec:
        return self._spec

    def _continue(
        self, grids: ImageArray, states: FloatArray, instructions: Sequence[str], turns: Sequence[Turn]
    ) -> list[FloatArray]:
        rows = [self._observation(*row) for row in zip(grids, states, instructions, turns, strict=True)]
        parts = [self._ask(rows[start : start + self._batch]) for start in range(0, len(rows), self._batch)]
        return list(np.concatenate(parts))

    def _act(self, grids: ImageArray, states: FloatArray, instructions: Sequence[str]) -> FloatArray:
        return np.stack(self._continue(grids, states, instructions, [NOWHERE] * len(instructions)))

    def _observation(self, grid: ImageArray, state: FloatArray, instruction: str, turn: Turn) -> policy_pb2.Observation:
        height, width = self._spec.height, self._spec.width
        images = {}
        for name, cell in self._spec.cameras.items():
            row, column = divmod(cell, 2)
            images[name] = to_tensor(grid[row * height : (row + 1) * height, column * width : (column + 1) * width])
        return policy_pb2.Observation(
            images=images, state=to_tensor(state), instruction=instruction, episode=turn.episode, step=turn.step
        )

    def _ask(self, rows: Sequence[policy_pb2.Observation]) -> FloatArray:
        """Base chunks float32 (rows, M, A)."""
        try:
            reply = self._stub.Act(policy_pb2.ActRequest(observations=rows), timeout=self._timeout)
        except grpc.RpcError as error:
            self._fail(error.code(), f"{error.details()}")
        try:
            chunks = from_tensor(reply.base, "base")
        except ValueError as error:
            self._fail(grpc.StatusCode.INTERNAL, str(error))
        try:
            return self._checked(chunks, len(rows))
        except RuntimeError as error:
            self._fail(grpc.StatusCode.INTERNAL, str(error))

    def _fail(self, code: grpc.StatusCode, reason: str) -> NoReturn:
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            reason = f"no answer within {self._timeout:g} s (W2A_VLA_REMOTE_TIMEOUT)"
        if code == grpc.StatusCode.FAILED_PRECONDITION:  # would make our own client load a residual
            code = grpc.StatusCode.INTERNAL
        raise RpcError(code, f"policy remote at {self._address}: {reason}")


def build(settings: VlaSettings) -> Remote:
    """Raises ValueError for a missing address, OSError when the server does not answer."""
    if not settings.vla_remote:
        raise ValueError("vla_remote: must be the address of another policy server, such as 127.0.0.1:50051")
    return Remote(settings.vla_remote, settings.vla_remote_timeout)
