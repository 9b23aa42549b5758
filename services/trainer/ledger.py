"""What the trainer remembers in Redis: which episodes were asked for and which are finished, and which bundle is which version.

Delivery is at least once, so every write here happens once by construction: a script tests and writes in one step.
"""

from __future__ import annotations

from typing import cast

import redis

from services.runtime.jobs import KEEP_SECONDS
from services.runtime.messages import (
    IMAGINE_REQUESTS,
    ROLLOUT_REQUESTS,
    ImagineRequest,
    RolloutRequest,
    RolloutResult,
    trajectories,
)
from services.runtime.policies import publish_version, published, versions_key

# KEYS: the job's finished episodes (hash), its trajectories stream, the imagine requests stream.
# ARGV: episode id, result, imagine request ("" if none), seconds to keep.
_FINISH = """
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('EXPIRE', KEYS[1], ARGV[4])
if ARGV[3] ~= '' then redis.call('XADD', KEYS[3], 'MAXLEN', '~', 100000, '*', 'json', ARGV[3]) end
redis.call('XADD', KEYS[2], '*', 'json', ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 1
"""

# KEYS: the job's requested ids (set), the requests stream. ARGV: id, request, seconds to keep.
_REQUEST = """
if redis.call('SADD', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 100000, '*', 'json', ARGV[2])
return 1
"""


def finished_key(job: str) -> str:
    """Hash of a job's finished episodes: id -> RolloutResult."""
    return f"w2a:rollouts:{job}"


class Ledger:
    """See the module's docstring. Every method is one round trip and safe to repeat."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self._finish = client.register_script(_FINISH)
        self._request = client.register_script(_REQUEST)

    def finish(self, result: RolloutResult, imagine: ImagineRequest | None = None) -> bool:
        """Publish an episode's result (and its imagine request) unless it was published before. Returns whether it was new."""
        keys = [finished_key(result.job), trajectories(result.job), IMAGINE_REQUESTS]
        request = imagine.model_dump_json() if imagine else ""
        return bool(self._finish(keys, [result.id, result.model_dump_json(), request, KEEP_SECONDS]))

    def finished(self, job: str, episode: str) -> bool:
        return bool(self.client.hexists(finished_key(job), episode))

    def request(self, request: RolloutRequest) -> bool:
        """Put an episode on the requests stream unless it was put there before. Returns whether it was new."""
        keys = [f"w2a:requested:{request.job}", ROLLOUT_REQUESTS]
        return bool(self._request(keys, [request.id, request.model_dump_json(), KEEP_SECONDS]))

    def publish_imagine(self, request: ImagineRequest) -> None:
        """Ask for an imagination (again, where the first request was lost: the worker answers from its cache)."""
        self.client.xadd(IMAGINE_REQUESTS, {"json": request.model_dump_json()}, maxlen=100_000, approximate=True)

    def artifact(self, namespace: str, version: int) -> str | None:
        """The bundle that was published as `version` of `namespace`."""
        return cast("str | None", self.client.hget(versions_key(namespace), str(version)))

    def newest(self, namespace: str) -> int | None:
        """The newest published version, or None where nothing was published."""
        return max(published(self.client, namespace), default=None)

    def publish_version(
        self, namespace: str, version: int, artifact: str, state: tuple[str, dict[str, str]] | None = None
    ) -> None:
        """Record and announce a version; `state` (key, fields of a hash) is written in the same transaction."""
        publish_version(self.client, namespace, version, artifact, state)
