"""What a batch goes through: base policy once for all rows, VAE once for the rows that need it, each residual on its rows.

A residual harms tasks that it was not trained on (docs/findings.md): they are left to the base, unless settings say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np
import numpy.typing as npt
import prometheus_client
import structlog

from services.runtime.rpc import RpcError
from services.vla.observations import Observations
from services.vla.policies.base import BasePolicy, in_blocks
from services.vla.versions import Residual
from services.vla.vision import Vision
from world2act.bundle import ActionLayout, Bundle, Origin
from world2act.models.adapters import Adapters
from world2act.models.store import MismatchError, WeightsError
from world2act.types import FloatArray

log = structlog.get_logger()
UNSEEN = prometheus_client.Counter(
    "w2a_vla_unseen_rows_total", "Observations left to the base: of no task that the residual was post-trained on"
)


@dataclass(frozen=True)
class ActJob:
    """One request: its rows and who acts on top of the base (None: nobody)."""

    observations: Observations
    residual: Residual | None

    def __len__(self) -> int:
        return len(self.observations)


@dataclass(frozen=True)
class Chunks:
    """float32 (B, M, A) each, in the simulator's action units; combined = clip(base + residual).

    plans: what the base alone would do from now on, a row each, float32 (>= M, A): its first M actions are `base`.
    unseen: bool (B,), rows that were left to the base: their instruction is of no task that the residual was trained on.
    """

    base: FloatArray
    residual: FloatArray
    combined: FloatArray
    version: int
    plans: tuple[FloatArray, ...] = ()
    unseen: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))


class Engine:
    """Stateless after construction; `compute` is called by one thread, `check` by any.

    adapters_hash: empty where bundles of any adapters load; adapters, max_bound, trusted: see `Bundle.from_bytes`. everywhere:
    residuals act on instructions that they were not trained on, too.
    """

    def __init__(
        self,
        policy: BasePolicy,
        vision: Vision,
        adapters_hash: str,
        block: int,
        adapters: Adapters | None = None,
        max_bound: float = math.inf,
        trusted: frozenset[str] = frozenset(),
        everywhere: bool = False,
    ) -> None:
        self.policy, self.vision, self.adapters_hash, self.block = policy, vision, adapters_hash, block
        self.adapters, self.max_bound, self.trusted, self.everywhere = adapters, max_bound, trusted, everywhere

    def compute(self, jobs: Sequence[ActJob]) -> list[Chunks | Exception]:
        """One batch. A residual that fails spoils only the requests that asked for it."""
        rows = Observations.join([job.observations for job in jobs])
        try:
            plans = self.policy.plan(rows.grids, rows.states, rows.instructions, rows.turns)
        except RpcError as error:  # of a policy elsewhere
            if len(jobs) > 1 and error.code == grpc.StatusCode.INTERNAL:  # perhaps one job's fault: the others must not suffer
                return [self.compute([job])[0] for job in jobs]
            log.warning("the base policy did not answer", policy=self.policy.spec.name, reason=str(error))
            return [error] * len(jobs)
        base = np.stack([plan[: self.policy.spec.chunk] for plan in plans])
        ends = np.cumsum([len(job) for job in jobs])
        places = [np.arange(end - len(job), end) for job, end in zip(jobs, ends, strict=True)]
        latents = self._latents(rows, [p for job, p in zip(jobs, places, strict=True) if job.residual and job.residual.latents])
        ahead = [tuple(plans[i] for i in p) for p in places]
        results: list[Chunks | Exception] = [
            Chunks(base[p], np.zeros_like(base[p]), base[p], 0, rest) for p, rest in zip(places, ahead, strict=True)
        ]
        for residual in {job.residual for job in jobs if job.residual}:
            members = [i for i, job in enumerate(jobs) if job.residual is residual]
            where = np.concatenate([places[i] for i in members])
            visual = latents[where] if residual.latents else rows.grids[where]
            texts = [rows.instructions[i] for i in where]
            unseen = np.array([not self.everywhere and residual.is_new(text) for text in texts])
            try:
                both = in_blocks(residual.combine, self.block, visual, rows.states[where], base[where], texts)
                both[unseen, 0], both[unseen, 1] = 0.0, base[where][unseen]
                if not np.isfinite(both).all():
                    raise ValueError("actions are not finite")
            except Exception as error:
                log.exception("residual failed", version=residual.version, uri=residual.uri)
                failure = RpcError(grpc.StatusCode.INTERNAL, f"residual version {residual.version} failed: {error}")
                for i in members:
                    results[i] = failure
                continue
            UNSEEN.inc(int(unseen.sum()))
            ends = np.cumsum([len(jobs[i]) for i in members])[:-1]
            for i, part, new in zip(members, np.split(both, ends), np.split(unseen, ends), strict=True):
                results[i] = Chunks(base[places[i]], part[:, 0], part[:, 1], residual.version, ahead[i], new)
        return results

    def _latents(self, rows: Observations, places: Sequence[npt.NDArray[np.int64]]) -> FloatArray:
        """VAE latents (B, C, h, w), computed for the rows in `places` and zero elsewhere."""
        latents = np.zeros((len(rows), *self.vision.shape), np.float32)
        if places:
            where = np.concatenate(places)
            latents[where] = self.vision.encode(rows.grids[where])
        return latents

    def check(self, content: bytes, version: int, uri: str) -> Residual:
        """A residual out of a bundle's bytes, tried once. Raises WeightsError (a ValueError) that says what does not fit.

        Refused are: a damaged file, missing statistics, another base policy, world model or adapters, other statistics or
        action limits, a bound that is too large, a signature that is missing or does not hold.
        """
        spec = self.policy.spec
        bundle = Bundle.from_bytes(
            content,
            uri,
            Origin(spec.hash, self.vision.hash, self.adapters_hash),
            adapters=self.adapters,
            max_bound=self.max_bound,
            trusted=self.trusted,
        )
        names = (bundle.layout.names + ("?",) * spec.action_size)[: spec.action_size]  # a policy says limits, not names
        if difference := bundle.layout.difference(ActionLayout(names, spec.low, spec.high)):
            raise MismatchError(f"{uri}: the residual's action layout {difference}")
        residual = Residual(version, uri, bundle)
        self._try(residual)
        return residual

    def _try(self, residual: Residual) -> None:
        """Act once on blank observations: what cannot run must fail here, not under a client's request."""
        spec, rows = self.policy.spec, max(self.block, 1)
        grids = np.zeros((rows, 2 * spec.height, 2 * spec.width, 3), np.uint8)
        states = np.zeros((rows, spec.state_size), np.float32)
        base = np.zeros((rows, spec.chunk, spec.action_size), np.float32)
        try:
            both = residual.combine(self.vision.encode(grids) if residual.latents else grids, states, base, ["probe"] * rows)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise WeightsError(f"{residual.uri}: the residual cannot run on this policy's observations ({reason})") from None
        if both.shape != (rows, 2, spec.chunk, spec.action_size) or not np.isfinite(both).all():
            raise WeightsError(f"{residual.uri}: the residual returns {both.shape[2:]} actions or values that are not finite")
