"""Small parts that keep robot_client.py readable: the arm's interface, a dry arm, the policy door, rate limit, watchdog."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

import grpc
import numpy as np

from services.runtime.generated import policy_pb2
from services.runtime.generated.policy_pb2_grpc import PolicyStub
from services.runtime.rpc import connect_channel
from services.runtime.tensors import from_tensor, to_tensor
from world2act.types import FloatArray, ImageArray


class StoppedError(Exception):
    """Why the arm was stopped, in one sentence."""


class Robot(Protocol):
    """What an arm must offer. Actions are what the base policy was trained on, such as end-effector deltas and gripper."""

    def observe(self) -> tuple[dict[str, ImageArray], FloatArray]:
        """Camera -> uint8 (height, width, 3), upright, and the state float32 (S,), of now."""

    def command(self, action: FloatArray) -> None:
        """Begin one action float32 (A,) and return at once; without a next command the arm must come to rest by itself."""

    def stop(self) -> None:
        """Hold still at once. Called from any thread, and more than once."""


class DryRobot:
    """No arm: noise images of the sizes that the policy wants, a state that follows the actions, a record of the commands."""

    def __init__(self, spec: Any) -> None:
        self.spec, self.commands, self.stopped = spec, list[FloatArray](), 0
        self.state, self.random = np.zeros(spec.state_size, np.float32), np.random.default_rng(0)

    def observe(self) -> tuple[dict[str, ImageArray], FloatArray]:
        shape = (self.spec.image_height, self.spec.image_width, 3)
        return {name: self.random.integers(0, 256, shape, dtype=np.uint8) for name in self.spec.cameras}, self.state.copy()

    def command(self, action: FloatArray) -> None:
        moved = min(len(action), len(self.state))
        self.state[:moved] += 0.01 * action[:moved]
        self.commands.append(action.copy())

    def stop(self) -> None:
        self.stopped += 1


def load_robot(name: str, spec: Any) -> Robot:
    """`module:Class`, made without arguments; empty: a dry arm."""
    if not name:
        return DryRobot(spec)
    module, _, kind = name.partition(":")
    robot: Robot = getattr(importlib.import_module(module), kind)()
    return robot


class Policy:
    """The policy server's gRPC door. The version that answers first is asked for from then on, so that it cannot change. unseen:
    it was not post-trained on the instruction, and leaves it to the base."""

    def __init__(self, address: str, instruction: str, namespace: str = "", version: int = -1) -> None:
        self.channel, self.address = connect_channel(address), address
        self.stub: Any = PolicyStub(self.channel)
        self.instruction, self.namespace, self.version, self.unseen = instruction, namespace, version, False
        self.spec: Any = self._call(self.stub.Describe, policy_pb2.PolicyDescribeRequest(), 10.0)

    def act(self, images: dict[str, ImageArray], state: FloatArray, seconds: float) -> tuple[FloatArray, FloatArray]:
        """Base and combined chunk (M, A). Raises StoppedError where no answer comes within `seconds`, or a refusal."""
        observation = policy_pb2.Observation(
            images={name: to_tensor(image) for name, image in images.items()},
            state=to_tensor(state),
            instruction=self.instruction,
        )
        request = policy_pb2.ActRequest(observations=[observation], namespace=self.namespace, version=self.version)
        reply = self._call(self.stub.Act, request, seconds)
        self.version, self.unseen = int(reply.version), any(reply.unseen)
        return from_tensor(reply.base, "base")[0], from_tensor(reply.combined, "combined")[0]

    def _call(self, method: Any, request: Any, seconds: float) -> Any:
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as error:
            late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            reason = f"did not answer within {seconds:g} s" if late else f"answered {error.code().name}: {error.details()}"
            raise StoppedError(f"the policy server at {self.address} {reason}") from None


class RateLimit:
    """Keeps each component of an action within `change` of the one before; the first starts from rest."""

    def __init__(self, size: int, change: float) -> None:
        self.last, self.change = np.zeros(size, np.float32), np.float32(change)

    def __call__(self, action: FloatArray) -> FloatArray:
        self.last = np.clip(action, self.last - self.change, self.last + self.change)
        return self.last


class Watchdog:
    """Stops the arm from its own thread when `feed` was not called for `seconds`, whatever the loop is waiting for."""

    def __init__(self, seconds: float, stop: Callable[[], None]) -> None:
        self.seconds, self.stop, self.tripped = seconds, stop, False
        self._fed, self._end = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def feed(self) -> None:
        """The loop lives. Raises StoppedError where the arm was stopped meanwhile."""
        if self.tripped:
            raise StoppedError(f"no action was ready within {self.seconds:g} s")
        self._fed = time.monotonic()

    def _watch(self) -> None:
        while not self._end.wait(self.seconds / 10):
            if time.monotonic() - self._fed > self.seconds:
                self.tripped = True
                self.stop()
                return

    def __enter__(self) -> Self:
        self._fed = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
