"""What stands behind both doors: a client's observation in its table's terms -> base + residual in the same terms.

The answer is as long as the base policy's plan. Its first M actions are base + residual; those after them are the base policy's
own, for clients that act longer on one answer: no residual was trained for states that nobody has seen yet.
"""

from __future__ import annotations

import concurrent.futures
import hmac
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import prometheus_client

from services.runtime.rpc import RpcError
from services.vla.batcher import Batcher
from services.vla.engine import ActJob, Chunks, Engine
from services.vla.observations import Observations, check_instruction, check_state
from services.vla.policies.layouts import Layout
from services.vla.versions import Versions
from services.vla.wire import Array
from world2act.data.grid import stitch
from world2act.types import FloatArray

ANSWERS = prometheus_client.Counter("w2a_vla_door_requests_total", "Requests of others' clients answered", ["door", "outcome"])
SECONDS = 120.0
"""Longest wait for the batcher."""


@dataclass(frozen=True)
class Seen:
    """One observation as a client sent it: images and state vectors by the client's names, and the instruction."""

    images: dict[str, Any]
    states: dict[str, Any]
    instruction: Any


class Acting:
    """Thread-safe."""

    def __init__(
        self,
        engine: Engine,
        batcher: Batcher[ActJob, Chunks],
        versions: Versions,
        layout: Layout,
        namespace: str,
        version: int,
        rows: int,
    ) -> None:
        """rows: most observations in one request. Raises ValueError when the table is for another robot than the policy's."""
        layout.check_reversible()
        spec, robot = engine.policy.spec, layout.robot
        ours, theirs = (spec.cameras, spec.state_size, spec.action_size), (robot.cameras, robot.state, layout.size)
        if ours != theirs:
            raise ValueError(f"vla_door_layout: it is for cameras, state, action {theirs}; policy {spec.name} has {ours}")
        self._engine, self._batcher, self._versions = engine, batcher, versions
        self.layout, self._namespace, self._version, self.rows = layout, namespace, version, rows

    @property
    def horizon(self) -> int:
        """Actions in an answer."""
        return self._engine.policy.spec.horizon

    def describe(self) -> dict[str, Any]:
        """What a client may want to know."""
        spec = self._engine.policy.spec
        return {"policy": f"world2act {spec.name}", "base_hash": spec.hash, "action_horizon": spec.horizon, "chunk": spec.chunk}

    def act(self, seen: Sequence[Seen]) -> tuple[list[dict[str, FloatArray]], int]:
        """Their action vectors (H, n) by name for each observation, and the policy version that acted.

        Raises ValueError for what the client did wrong, naming it; RpcError for what went wrong here.
        """
        if not 1 <= len(seen) <= self.rows:
            raise ValueError(f"observations: must be 1 to {self.rows} in one request, got {len(seen)}")
        residual = self._versions.resolve(self._namespace, self._version)
        spec = self._engine.policy.spec
        views = [self.layout.our_images(row.images, spec.height, spec.width) for row in seen]
        images = {camera: np.stack([view[camera] for view in views]) for camera in spec.cameras}
        states = np.stack([check_state(self.layout.our_state(row.states), spec, "state") for row in seen])
        texts = tuple(check_instruction(text_of(row.instruction), "instruction") for row in seen)
        chunks = wait(self._batcher.submit(ActJob(Observations(stitch(images, spec.cameras), states, texts), residual)))
        answers = []
        for combined, plan in zip(chunks.combined, chunks.plans, strict=True):
            answers.append(self.layout.their_actions(np.concatenate([combined, plan[spec.chunk : spec.horizon]])))
        return answers, chunks.version


def wait(future: Future[Chunks]) -> Chunks:
    """The result. Raises what the batch raised, or RpcError when it takes too long."""
    try:
        return future.result(SECONDS)
    except concurrent.futures.TimeoutError:
        future.cancel()
        raise RpcError(grpc.StatusCode.DEADLINE_EXCEEDED, f"the policy did not act within {SECONDS:g} s") from None


def text_of(value: object) -> str:
    """An instruction off the wire. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"instruction: must be text, got {type(value).__name__}")
    return value


def sentence(error: Exception) -> str:
    """What a client is told: our own sentences, nothing of what went wrong inside."""
    return str(error)[:500] if isinstance(error, ValueError | RpcError) else "the policy failed; its log has the reason"


def same(token: str, shown: object) -> bool:
    """Whether a client showed the token, in constant time; no token set: yes."""
    return not token or (isinstance(shown, str) and hmac.compare_digest(token.encode(), shown.encode()))


def arrays(observation: dict[Any, Any], names: Sequence[str]) -> dict[str, Array]:
    """Those of `names` that are there."""
    return {name: observation[name] for name in names if name in observation}
