"""The coordinator's side of the gRPC doors: one episode's simulator and policy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import grpc
import numpy as np

from services.runtime.generated import policy_pb2, simulator_pb2
from services.runtime.generated.policy_pb2_grpc import PolicyStub
from services.runtime.generated.simulator_pb2_grpc import SimulatorStub
from services.runtime.tensors import from_tensor, to_tensor
from world2act.data.grid import stitch
from world2act.types import FloatArray, ImageArray

SECONDS = 60.0
"""Longest wait for one answer of a door that is up."""

AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.NOT_FOUND,  # the environment died or expired with a restart: the episode starts again
)
"""The door is away or busy: the same episode can succeed later."""

BROKEN = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
"""Either a connection that was cut in the middle or a defect: worth a few tries, no more."""


class Simulator:
    """One leased environment. Images come back as the stitched camera grid. `leased(env_id)` hears of a new lease."""

    def __init__(self, channel: grpc.Channel, leased: Callable[[str], None] = lambda env_id: None) -> None:
        self.leased = leased
        self.stub: Any = SimulatorStub(channel)  # type: ignore[no-untyped-call]
        self.spec: Any = self.stub.Describe(simulator_pb2.DescribeRequest(), timeout=SECONDS)
        self.cells = {camera.name: camera.cell for camera in self.spec.cameras}
        self.used_rows = max(camera.height * (1 + camera.cell // 2) for camera in self.spec.cameras)
        self.low = np.array([axis.low for axis in self.spec.action], np.float32)
        self.high = np.array([axis.high for axis in self.spec.action], np.float32)
        self.env_id = ""
        self.images: dict[str, ImageArray] = {}

    def max_chunks(self, task: str) -> int:
        """The customary episode limit of `task`, in chunks. Raises ValueError naming the choices."""
        limits = {t.name: int(t.max_chunks) for t in self.spec.tasks}
        if task not in limits:
            raise ValueError(f"task: {task[:80]!r} is unknown; choose one of {', '.join(limits)}")
        return limits[task]

    def reset(self, task: str, split: str, index: int, wait: float) -> tuple[FloatArray, str]:
        """Lease an environment and start an episode. Returns state (S,) and the instruction; `images` holds the cameras."""
        request = simulator_pb2.ResetRequest(env_id=self.env_id, task=task, split=split, index=index, wait_seconds=wait)
        reply = self.stub.Reset(request, timeout=SECONDS + wait)
        self.env_id = reply.env_id
        self.leased(self.env_id)
        self.images = {name: from_tensor(image, f"images[{name}]") for name, image in reply.images.items()}
        return np.array(from_tensor(reply.state, "state"), np.float32), str(reply.instruction)

    def step(self, actions: FloatArray, every_frame: bool) -> tuple[ImageArray, FloatArray, bool, bool]:
        """Run actions (m, A). Returns grid frames (f, H, W, 3), states (m, S), success, done; `images` holds the last frames."""
        chunk = simulator_pb2.Chunk(env_id=self.env_id, actions=to_tensor(actions))
        frames = simulator_pb2.FRAMES_ALL if every_frame else simulator_pb2.FRAMES_LAST
        result = self.stub.Step(simulator_pb2.StepRequest(chunks=[chunk], frames=frames), timeout=SECONDS).results[0]
        images = {name: from_tensor(image, f"images[{name}]") for name, image in result.images.items()}
        self.images = {name: image[-1] for name, image in images.items()}
        return stitch(images, self.cells), from_tensor(result.states, "states"), bool(result.success), bool(result.done)

    def grid(self) -> ImageArray:
        """The newest frames as the camera grid (H, W, 3)."""
        return stitch(self.images, self.cells)

    def close(self) -> None:
        """Give the environment back; a door that is gone has already forgotten it."""
        if self.env_id:
            with contextlib.suppress(grpc.RpcError):
                self.stub.Close(simulator_pb2.CloseRequest(env_ids=[self.env_id]), timeout=5)
            self.env_id = ""


class Policy:
    """The policy door. A version that the server has not loaded is looked up with `artifact(namespace, version)` and loaded."""

    def __init__(self, channel: grpc.Channel, artifact: Callable[[str, int], str | None]) -> None:
        self.stub: Any = PolicyStub(channel)  # type: ignore[no-untyped-call]
        self.artifact = artifact

    def act(
        self,
        images: Mapping[str, ImageArray],
        state: FloatArray,
        instruction: str,
        namespace: str,
        version: int,
        episode: str = "",
        step: int = 0,
    ) -> tuple[FloatArray, FloatArray, int, bool]:
        """One observation -> base and combined chunk (M, A) in the simulator's units, the version that acted, and whether it left
        this instruction to the base alone.

        `episode`, `step`: see policy.proto; for base policies that plan further ahead than M.
        """
        observation = policy_pb2.Observation(
            images={name: to_tensor(image) for name, image in images.items()},
            state=to_tensor(state),
            instruction=instruction,
            episode=episode,
            step=step,
        )
        request = policy_pb2.ActRequest(observations=[observation], namespace=namespace, version=version)
        try:
            reply = self.stub.Act(request, timeout=SECONDS)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
                raise
            self._load(namespace, version)
            reply = self.stub.Act(request, timeout=SECONDS)
        base, combined = from_tensor(reply.base, "base")[0], from_tensor(reply.combined, "combined")[0]
        return base, combined, int(reply.version), any(reply.unseen)

    def _load(self, namespace: str, version: int) -> None:
        uri = self.artifact(namespace, version)
        if uri is None:
            raise ValueError(f"version: {version} of policy namespace {namespace[:80]!r} was never published")
        try:
            self.stub.Load(policy_pb2.LoadRequest(namespace=namespace, version=version, uri=uri), timeout=SECONDS)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.FAILED_PRECONDITION:
                raise
            reason = f"version: {version} of policy namespace {namespace!r} does not fit: {error.details()}"
            raise ValueError(f"{reason}; version 0 is the base alone") from None
