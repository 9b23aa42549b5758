"""Which bundle is which version of a policy namespace: written by the trainer and by imports, read by whoever runs a version."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import redis

from services.runtime.jobs import KEEP_SECONDS
from services.runtime.messages import POLICY_VERSIONS, PolicyVersion

IMPORT_SECONDS = 120


def versions_key(namespace: str) -> str:
    """Hash of a policy namespace: version -> artifact of its bundle."""
    return f"w2a:policy:{namespace}"


def published(client: redis.Redis, namespace: str) -> dict[int, str]:
    """Version -> artifact of its bundle."""
    found = cast("dict[str, str]", client.hgetall(versions_key(namespace)))
    return {int(version): artifact for version, artifact in found.items()}


def publish_version(
    client: redis.Redis,
    namespace: str,
    version: int,
    artifact: str,
    state: tuple[str, dict[str, str]] | None = None,
    keep: bool = False,
) -> PolicyVersion:
    """Record and announce a version; `state` (key, fields of a hash) is written in the same transaction.

    keep: the namespace does not expire with the jobs of its time.
    """
    message = PolicyVersion(namespace=namespace, version=version, artifact=artifact, published=time.time())
    with client.pipeline(transaction=True) as pipe:
        pipe.hset(versions_key(namespace), str(version), artifact)
        if keep:
            pipe.persist(versions_key(namespace))
        else:
            pipe.expire(versions_key(namespace), KEEP_SECONDS)
        pipe.xadd(POLICY_VERSIONS, {"json": message.model_dump_json()}, maxlen=10_000, approximate=True)
        if state is not None:
            pipe.hset(state[0], mapping=cast(Any, state[1]))
            pipe.expire(state[0], KEEP_SECONDS)
        pipe.execute()
    return message


def import_version(client: redis.Redis, namespace: str, artifact: str, load: Callable[[int], None]) -> PolicyVersion:
    """Publish `artifact` as the namespace's next version, once `load(version)` has accepted it; again is the same version.

    Raises what `load` raises, and then nothing is published; redis.exceptions.LockError where another import does not end.
    """
    with client.lock(f"{versions_key(namespace)}:import", timeout=IMPORT_SECONDS, blocking_timeout=IMPORT_SECONDS / 4):
        versions = published(client, namespace)
        version = next((v for v, name in versions.items() if name == artifact), max(versions, default=0) + 1)
        load(version)
        return publish_version(client, namespace, version, artifact, keep=True)
