"""The gRPC door of proto/world2act/v1/simulator.proto in front of a `Pool`."""

from __future__ import annotations

import math
import time

import grpc
import prometheus_client

from services.runtime.generated import simulator_pb2 as pb
from services.runtime.generated.simulator_pb2_grpc import SimulatorServicer
from services.runtime.rpc import RpcError, guarded
from services.runtime.tensors import from_tensor, to_tensor
from services.simulator.envs import base
from services.simulator.pool import ExhaustedError, LostError, NotLeasedError, Pool
from world2act.splits import parse_split, scene_seed

DEFAULT_WAIT = 30.0
LONGEST_WAIT = 3600.0
FRAMES: dict[int, base.Frames] = {pb.FRAMES_LAST: "last", pb.FRAMES_NONE: "none", pb.FRAMES_ALL: "all"}

STEPS = prometheus_client.Counter("w2a_simulator_actions_total", "actions executed")
RESETS = prometheus_client.Counter("w2a_simulator_resets_total", "episodes started", ["task"])
STEP_SECONDS = prometheus_client.Histogram("w2a_simulator_step_seconds", "time of a Step call")


class Servicer(SimulatorServicer):
    """Checks every field, then hands the work to the pool."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    @guarded
    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:  # noqa: N802
        spec = self.pool.spec
        return pb.DescribeReply(
            simulator=spec.simulator,
            cameras=[pb.Camera(name=c.name, height=c.height, width=c.width, cell=c.cell) for c in spec.cameras],
            state=[pb.Axis(name=a.name, unit=a.unit, low=a.low, high=a.high) for a in spec.state],
            action=[pb.Axis(name=a.name, unit=a.unit, low=a.low, high=a.high) for a in spec.action],
            chunk=spec.chunk,
            control_hz=spec.control_hz,
            gripper_open_width=spec.gripper_open_width,
            gripper_width_index=spec.gripper_width_index,
            tasks=[pb.Task(name=t.name, instruction=t.instruction, max_chunks=t.max_chunks) for t in spec.tasks],
            environments=len(self.pool),
        )

    @guarded
    def Reset(self, request: pb.ResetRequest, context: grpc.ServicerContext) -> pb.ResetReply:  # noqa: N802
        task = self.pool.spec.task(request.task)
        seed = scene_seed(parse_split(request.split), request.index)
        wait = request.wait_seconds or DEFAULT_WAIT
        if not math.isfinite(wait) or not 0 < wait <= LONGEST_WAIT:
            raise base.InvalidInputError(f"wait_seconds: {request.wait_seconds} is outside [0, {LONGEST_WAIT:g}]")
        with pool_errors():
            env_id = request.env_id or self.pool.lease(wait)
            try:
                observation = self.pool.reset(env_id, task.name, seed)
            except Exception:
                if not request.env_id:  # the caller never learns this id
                    self.pool.release(env_id)
                raise
        if not request.env_id and not context.is_active():
            self.pool.release(env_id)  # the caller gave up while waiting
        RESETS.labels(task.name).inc()
        return pb.ResetReply(
            env_id=env_id,
            images={name: to_tensor(image) for name, image in observation.images.items()},
            state=to_tensor(observation.state),
            instruction=observation.instruction,
        )

    @guarded
    def Step(self, request: pb.StepRequest, context: grpc.ServicerContext) -> pb.StepReply:  # noqa: N802
        if request.frames not in FRAMES:
            raise base.InvalidInputError(f"frames: {request.frames} is unknown; choose one of {', '.join(pb.Frames.keys())}")
        if not 1 <= len(request.chunks) <= len(self.pool):
            raise base.InvalidInputError(f"chunks: {len(request.chunks)} chunks, the limit is 1 to {len(self.pool)}")
        chunks = {}
        for number, chunk in enumerate(request.chunks):
            if chunk.env_id in chunks:
                raise base.InvalidInputError(f"chunks[{number}].env_id: appears twice")
            try:
                chunks[chunk.env_id] = base.check_actions(from_tensor(chunk.actions, "actions"), self.pool.spec)
            except ValueError as error:
                raise base.InvalidInputError(f"chunks[{number}].{error}") from None
        started = time.perf_counter()
        with pool_errors():
            results = self.pool.step(chunks, FRAMES[request.frames])
        STEP_SECONDS.observe(time.perf_counter() - started)
        STEPS.inc(sum(len(actions) for actions in chunks.values()))
        return pb.StepReply(results=[to_result(env_id, results[env_id]) for env_id in chunks])

    @guarded
    def Close(self, request: pb.CloseRequest, context: grpc.ServicerContext) -> pb.CloseReply:  # noqa: N802
        for env_id in request.env_ids:
            self.pool.release(env_id)
        return pb.CloseReply()


def to_result(env_id: str, result: base.StepResult) -> pb.ChunkResult:
    """A step's result as its message."""
    return pb.ChunkResult(
        env_id=env_id,
        images={name: to_tensor(frames) for name, frames in result.images.items()},
        states=to_tensor(result.states),
        success=result.success,
        done=result.done,
    )


class pool_errors:  # noqa: N801  (a context manager, used like a function)
    """The pool's errors as gRPC statuses."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NotLeasedError):
            env_id = str(error.args[0])[:80]
            raise RpcError(grpc.StatusCode.NOT_FOUND, f"env_id: {env_id!r} is unknown or its lease expired") from None
        if isinstance(error, ExhaustedError):
            raise RpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from None
        if isinstance(error, LostError):
            raise RpcError(grpc.StatusCode.UNAVAILABLE, str(error)) from None
