"""What the two gRPC doors say about themselves, asked until they answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import numpy as np
import structlog

from services.runtime.generated import policy_pb2
from services.runtime.generated.policy_pb2_grpc import PolicyStub
from services.runtime.rpc import connect_channel
from services.trainer.context import JobContext
from services.trainer.doors import AWAY, BROKEN, SECONDS, Simulator
from world2act.types import ImageArray

log = structlog.get_logger()
T = TypeVar("T")


def patiently(context: JobContext, address: str, call: Callable[[grpc.Channel], T]) -> T:
    """`call` on a fresh channel to `address`, again while the door is away. Raises ValueError with what the door refused."""
    deadline = time.monotonic() + context.settings.rollout_patience
    while True:
        context.check()
        try:
            with connect_channel(address) as channel:
                return call(channel)
        except grpc.RpcError as error:
            if error.code() not in (*AWAY, *BROKEN) or time.monotonic() > deadline:
                raise ValueError(f"{error.details()} ({address} answered {error.code().name})") from None
            log.info("door is away", address=address, code=error.code().name)
            context.stop.wait(1.0)


def policy(context: JobContext) -> Any:
    """PolicyDescribeReply."""

    def describe(channel: grpc.Channel) -> Any:
        stub: Any = PolicyStub(channel)  # type: ignore[no-untyped-call]
        return stub.Describe(policy_pb2.PolicyDescribeRequest(), timeout=SECONDS)

    return patiently(context, context.settings.vla(), describe)


def simulator(context: JobContext) -> Any:
    """DescribeReply of the first simulator."""
    return patiently(context, context.settings.simulators()[0], lambda channel: Simulator(channel).spec)


def start_frames(context: JobContext, task: str, split: str, indices: list[int]) -> tuple[ImageArray, str, int]:
    """Grid frames (N, H, W, 3) of the initial states, the task's instruction, and its customary limit in chunks."""

    def frame(channel: grpc.Channel, index: int) -> tuple[ImageArray, str, int]:
        env = Simulator(channel)
        try:
            limit = env.max_chunks(task)
            _, instruction = env.reset(task, split, index, context.settings.environment_wait)
            return env.grid(), instruction, limit
        finally:
            env.close()

    address = context.settings.simulators()[0]
    found = [patiently(context, address, lambda channel, i=index: frame(channel, i)) for index in indices]  # type: ignore[misc]
    return np.stack([grid for grid, _, _ in found]), found[0][1], found[0][2]
