"""What only Redis knows, as Prometheus metrics: queues, dead letters, heartbeats, its memory; and the artifacts' disk.

The gateway exports it because it asks Redis the same for /status. With several gateways each tells the same; the rules take
the maximum.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from typing import Any, cast

import redis
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from services.gateway.doors import Doors
from services.runtime.messages import DEAD


class State(Collector):
    """Asks at every scrape. Redis that does not answer is `w2a_redis_up 0` and nothing more."""

    def __init__(self, doors: Doors) -> None:
        self.doors = doors

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask Redis."""
        return []

    def collect(self) -> Iterator[Metric]:
        try:
            found = list(self._redis())
        except redis.exceptions.RedisError:
            found = []
        yield GaugeMetricFamily("w2a_redis_up", "1 while Redis answers the gateway", value=float(bool(found)))
        yield from found
        yield from self._disk()

    def _redis(self) -> Iterator[Metric]:
        backlogs = self.doors.backlogs()
        backlogs.pop(DEAD)
        queues = GaugeMetricFamily("w2a_queue_backlog", "Entries of a queue that are not finished", labels=["queue"])
        for queue, count in backlogs.items():
            queues.add_metric([queue], count)
        beats = GaugeMetricFamily("w2a_heartbeat_age_seconds", "Since a service's newest heartbeat", labels=["service"])
        newest: dict[str, float] = {}
        for name, age in self.doors.heartbeats().items():
            service = name.partition(":")[0]
            newest[service] = min(age, newest.get(service, age))
        for service, age in newest.items():
            beats.add_metric([service], age)
        memory = self.doors.redis.info("memory")
        limit = int(memory["maxmemory"]) or int(memory["total_system_memory"])
        yield queues
        yield beats
        yield CounterMetricFamily("w2a_dead_letters", "Messages that no consumer could handle", value=self._dead())
        yield GaugeMetricFamily("w2a_redis_memory_bytes", "Memory that Redis uses", value=int(memory["used_memory"]))
        yield GaugeMetricFamily("w2a_redis_memory_limit_bytes", "maxmemory, or the machine's memory", value=limit)

    def _dead(self) -> int:
        try:
            return int(cast(Any, self.doors.redis.xinfo_stream(DEAD))["entries-added"])
        except redis.exceptions.ResponseError:
            return 0  # the stream is made with its first entry

    def _disk(self) -> Iterator[Metric]:
        """Of a store on a file system; an object store has no end."""
        if "file" not in self.doors.artifacts.fs.protocol:
            return
        try:
            disk = shutil.disk_usage(self.doors.artifacts.root)
        except OSError:
            return
        yield GaugeMetricFamily("w2a_artifacts_disk_free_bytes", "Free space of the artifact store", value=disk.free)
        yield GaugeMetricFamily("w2a_artifacts_disk_size_bytes", "Size of the artifact store's disk", value=disk.total)
