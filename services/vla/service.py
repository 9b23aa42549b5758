"""policy.proto on gRPC: validation, batching, versions."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import grpc
import prometheus_client
import structlog

from services.runtime.artifacts import NAME, ArtifactError, ArtifactStore
from services.runtime.generated import policy_pb2, policy_pb2_grpc
from services.runtime.rpc import Reply, RpcError, guarded
from services.runtime.tensors import to_tensor
from services.vla.batcher import Batcher
from services.vla.engine import ActJob, Chunks, Engine
from services.vla.observations import DEFAULT_NAMESPACE, read_namespace, read_observations
from services.vla.versions import Versions
from world2act.models.store import MismatchError

log = structlog.get_logger()
REQUESTS = prometheus_client.Counter("w2a_vla_requests_total", "Requests answered", ["method", "code"])
ROWS = prometheus_client.Counter("w2a_vla_rows_total", "Observations acted on", ["residual"])
LATENCY = prometheus_client.Histogram(
    "w2a_vla_latency_seconds",
    "Act, from the request's arrival to its answer",
    ["residual"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
LOAD_SECONDS = prometheus_client.Histogram("w2a_vla_load_seconds", "Load: fetch, check and try a residual bundle")


def door(method: Callable[[Any, Any, grpc.ServicerContext], Reply]) -> Callable[[Any, Any, grpc.ServicerContext], Reply]:
    """`guarded`, and every answer is counted with its status."""
    inner = guarded(method)

    @functools.wraps(method)
    def wrapper(self: Any, request: Any, context: grpc.ServicerContext) -> Reply:
        try:
            return inner(self, request, context)
        finally:
            code = context.code() or grpc.StatusCode.OK  # type: ignore[attr-defined]  # missing in grpc-stubs
            REQUESTS.labels(method.__name__, getattr(code, "name", str(code))).inc()

    return wrapper


class PolicyServicer(policy_pb2_grpc.PolicyServicer):
    """See proto/world2act/v1/policy.proto for the door's promises."""

    def __init__(
        self, engine: Engine, batcher: Batcher[ActJob, Chunks], versions: Versions, artifacts: ArtifactStore, max_batch: int
    ) -> None:
        self.engine, self.batcher, self.versions, self.artifacts = engine, batcher, versions, artifacts
        self.max_batch = max_batch
        self._loading = threading.Lock()

    @door
    def Describe(  # noqa: N802
        self, request: policy_pb2.PolicyDescribeRequest, context: grpc.ServicerContext
    ) -> policy_pb2.PolicyDescribeReply:
        spec = self.engine.policy.spec
        return policy_pb2.PolicyDescribeReply(
            policy=spec.name,
            base_hash=spec.hash,
            worldmodel_hash=self.engine.vision.hash,
            adapters_hash=self.engine.adapters_hash,
            cameras=list(spec.cameras),
            image_height=spec.height,
            image_width=spec.width,
            state_size=spec.state_size,
            action_size=spec.action_size,
            chunk=spec.chunk,
            versions=[0, *self.versions.loaded(DEFAULT_NAMESPACE)],
            max_batch=self.max_batch,
            horizon=spec.horizon,
            action_low=spec.low,
            action_high=spec.high,
            cells=spec.cameras.values(),
        )

    @door
    def Act(self, request: policy_pb2.ActRequest, context: grpc.ServicerContext) -> policy_pb2.ActReply:  # noqa: N802
        started = time.monotonic()
        # The version is fixed on arrival: what is loaded or dropped later does not touch this request.
        residual = self.versions.resolve(read_namespace(request.namespace), request.version)
        observations = read_observations(request.observations, self.engine.policy.spec, self.max_batch)
        future = self.batcher.submit(ActJob(observations, residual))
        context.add_callback(lambda: _cancel(future))  # the client went away: its rows need not be computed
        try:
            chunks = future.result()
        except CancelledError:
            raise RpcError(grpc.StatusCode.CANCELLED, "the client cancelled") from None
        label = "yes" if residual else "no"
        ROWS.labels(label).inc(len(observations))
        LATENCY.labels(label).observe(time.monotonic() - started)
        return policy_pb2.ActReply(
            base=to_tensor(chunks.base),
            residual=to_tensor(chunks.residual),
            combined=to_tensor(chunks.combined),
            version=chunks.version,
            unseen=chunks.unseen.tolist(),
        )

    @door
    def Load(self, request: policy_pb2.LoadRequest, context: grpc.ServicerContext) -> policy_pb2.LoadReply:  # noqa: N802
        namespace = read_namespace(request.namespace)
        if request.version < 1:
            raise ValueError(f"version: must be >= 1 (0 is the base alone), got {request.version}")
        if not NAME.match(request.uri):
            raise ValueError(f"uri: must be an artifact's name, sha256-<64 hex>.<suffix>, got {request.uri[:80]!r}")
        with self._loading, LOAD_SECONDS.time():  # one at a time: a burst of loads must not take the memory or the cores
            if self.versions.find(namespace, request.version, request.uri):
                return policy_pb2.LoadReply(versions=self.versions.loaded(namespace))
            try:
                residual = self.engine.check(self.artifacts.get(request.uri), request.version, request.uri)
            except MismatchError as error:
                raise RpcError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
            except (ArtifactError, ValueError) as error:
                raise RpcError(grpc.StatusCode.DATA_LOSS, str(error)) from None
            versions = self.versions.add(namespace, residual)
        signer = residual.bundle.signed_by or "nobody"
        log.info("residual loaded", namespace=namespace, version=request.version, uri=request.uri, signed_by=signer)
        return policy_pb2.LoadReply(versions=versions)


def _cancel(future: Future[Chunks]) -> None:
    future.cancel()
