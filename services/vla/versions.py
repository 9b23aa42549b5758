"""Which residual versions are in memory: the last few of each namespace, the last few namespaces."""

from __future__ import annotations

import difflib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy.typing as npt
import prometheus_client
import structlog
import torch

from services.runtime.rpc import RpcError
from world2act.bundle import Bundle
from world2act.types import FloatArray

log = structlog.get_logger()
LOADED = prometheus_client.Gauge("w2a_vla_loaded_versions", "Residual versions in memory, all namespaces")
NEWEST = -1
BASE_ALONE = 0
MOST_TOLD = 100
"""Instructions of which the log says that a residual does not know them."""


@dataclass(frozen=True, eq=False)
class Residual:
    """A checked residual policy, ready to act. `uri` is the artifact it came from."""

    version: int
    uri: str
    bundle: Bundle
    told: set[str] = field(default_factory=set)

    @property
    def latents(self) -> bool:
        """Whether it sees VAE latents; else the camera grid."""
        return self.bundle.policy.settings.vision == "latent"

    def is_new(self, instruction: str) -> bool:
        """Whether it was not trained on that instruction; the log says so once, with the most similar one that it knows."""
        new = not self.bundle.knows(instruction)
        if new and instruction not in self.told and len(self.told) < MOST_TOLD:
            self.told.add(instruction)
            closest = difflib.get_close_matches(instruction, self.bundle.instructions, n=1, cutoff=0.0)[0]
            log.warning(
                "left to the base alone: not post-trained on",
                instruction=instruction,
                closest=closest,
                version=self.version,
                uri=self.uri,
            )
        return new

    def combine(self, visual: npt.NDArray[Any], states: FloatArray, base: FloatArray, instructions: Sequence[str]) -> FloatArray:
        """Latents (B, C, h, w) or grids uint8 (B, H, W, 3), states, base (B, M, A) -> (B, 2, M, A): residual, combined."""
        with torch.inference_mode():
            seen, state, chunk = (torch.from_numpy(a) for a in (visual, states, base))
            both: FloatArray = torch.stack(self.bundle.combine(seen, state, chunk, instructions), dim=1).numpy()
        return both


class Versions:
    """Thread-safe. A request that has resolved its version keeps it, whatever is loaded or dropped meanwhile."""

    def __init__(self, keep_versions: int, keep_namespaces: int) -> None:
        self._keep_versions, self._keep_namespaces = keep_versions, keep_namespaces
        self._lock = threading.Lock()
        # Both in order of last use, oldest first.
        self._namespaces: OrderedDict[str, OrderedDict[int, Residual]] = OrderedDict()
        self._dropped: OrderedDict[str, None] = OrderedDict()

    def add(self, namespace: str, residual: Residual) -> list[int]:
        """Make `residual` the answer for its version at once; returns the namespace's versions.

        The same version again replaces the earlier one: a trainer that was killed publishes its last version once more.
        Dropped is what was not used for longest, but never the newest version.
        """
        with self._lock:
            versions = self._namespaces.setdefault(namespace, OrderedDict())
            self._namespaces.move_to_end(namespace)
            self._dropped.pop(namespace, None)
            earlier = versions.get(residual.version)
            if earlier is not None and earlier.uri != residual.uri:
                log.warning("version replaced", namespace=namespace, version=residual.version, was=earlier.uri, now=residual.uri)
            versions[residual.version] = residual
            versions.move_to_end(residual.version)
            while len(versions) > self._keep_versions:
                kept = {max(versions), residual.version}
                oldest = next((v for v in versions if v not in kept), residual.version)
                del versions[oldest]
            while len(self._namespaces) > self._keep_namespaces:
                name, _ = self._namespaces.popitem(last=False)
                self._remember_dropped(name)
            LOADED.set(sum(len(v) for v in self._namespaces.values()))
            return sorted(versions)

    def _remember_dropped(self, name: str) -> None:
        log.info("namespace dropped", namespace=name)
        self._dropped[name] = None
        while len(self._dropped) > 100 * self._keep_namespaces:
            self._dropped.popitem(last=False)

    def resolve(self, namespace: str, version: int) -> Residual | None:
        """The residual that acts; None: the base alone. -1 is the newest, which is the base if none was ever loaded.

        Raises RpcError FAILED_PRECONDITION when the version, or a namespace that had versions, is not in memory.
        """
        if version < NEWEST:
            raise ValueError(f"version: must be >= -1, got {version}")
        if version == BASE_ALONE:
            return None
        with self._lock:
            versions = self._namespaces.get(namespace)
            if versions is not None:
                self._namespaces.move_to_end(namespace)
                found = versions.get(max(versions) if version == NEWEST else version)
                if found is not None:
                    versions.move_to_end(found.version)
                    return found
            elif version == NEWEST:
                if namespace not in self._dropped:
                    return None
                # Answering with the base would let a client believe that it runs the newest residual.
                raise RpcError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"version: namespace {namespace!r} was dropped from memory (at most {self._keep_namespaces} stay); call Load",
                )
            loaded = ", ".join(map(str, sorted(versions or {}))) or "none"
        raise RpcError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"version: {version} is not loaded in namespace {namespace!r} (loaded: {loaded}); call Load",
        )

    def loaded(self, namespace: str) -> list[int]:
        """Versions of `namespace` in memory, ascending."""
        with self._lock:
            return sorted(self._namespaces.get(namespace, {}))

    def find(self, namespace: str, version: int, uri: str) -> bool:
        """Whether exactly this artifact is loaded as this version."""
        with self._lock:
            versions = self._namespaces.get(namespace)
            found = versions.get(version) if versions is not None else None
            return found is not None and found.uri == uri
