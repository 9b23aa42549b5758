"""Policy requests per second and latency through gRPC: with and without residual, batching on and off, against in process.

Real server processes on random weights of the shipped sizes (speed does not depend on the values). What is compared runs in
alternating rounds of one run, so that a busy machine slows both sides. `python -m bench.policy` prints the rows.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from services.runtime.generated import policy_pb2
from services.runtime.generated.policy_pb2_grpc import PolicyStub
from services.runtime.rpc import connect_channel
from services.vla.__main__ import load_engine
from services.vla.engine import ActJob, Engine
from services.vla.observations import read_observations
from services.vla.settings import VlaSettings
from tests.vla_server import VlaProcess, observation

ROUNDS = 3
SECONDS = 1.0
CLIENTS = 8


def sample(call: Callable[[], object], seconds: float) -> list[float]:
    """Latencies in seconds of one client that asks again as soon as it is answered."""
    latencies, end = [], time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        call()
        latencies.append(time.perf_counter() - started)
    return latencies


def clients(server: VlaProcess, version: int, count: int) -> list[float]:
    """Latencies of `count` clients at once, each with its own channel, one observation a request."""
    latencies: list[float] = []

    def client(number: int) -> None:
        request = policy_pb2.ActRequest(observations=[observation(number)], version=version)
        with connect_channel(f"127.0.0.1:{server.port}") as channel:
            stub = PolicyStub(channel)
            stub.Act(request, timeout=30)
            latencies.extend(sample(lambda: stub.Act(request, timeout=30), SECONDS))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies


def in_process(engine: Engine, server: VlaProcess, version: int) -> list[float]:
    """The same work without gRPC, batcher and second process."""
    residual = engine.check(server.artifacts.get(server.publish(1)), 1, "bench") if version else None
    job = ActJob(read_observations([observation(0)], engine.policy.spec, 1), residual)
    engine.compute([job])
    return sample(lambda: engine.compute([job]), SECONDS)


def rows(name: str, latencies: list[float], concurrent: int, ratio: str = "") -> list[dict[str, object]]:
    """Rate, median and 99th percentile as table rows."""
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    rate = concurrent * len(latencies) / sum(latencies)
    return [
        {"name": f"{name}: rate", "value": round(rate, 1), "unit": "requests/s", "ratio": ratio},
        {"name": f"{name}: latency p50", "value": round(p50, 2), "unit": "ms", "ratio": ""},
        {"name": f"{name}: latency p99", "value": round(p99, 2), "unit": "ms", "ratio": ""},
    ]


def run() -> list[dict[str, object]]:
    """About 30 seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases: dict[str, Callable[[], list[float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(torch.set_num_threads, threads)
        servers = {
            "on": VlaProcess(folder / "on"),
            "alone": VlaProcess(folder / "alone", vla_max_wait_ms=0),
            "off": VlaProcess(folder / "off", vla_max_wait_ms=0, vla_max_batch=1, vla_block=1),
        }
        for server in servers.values():
            stack.callback(server.close)
            server.start().load(1)
        engine = load_engine(VlaSettings(zoo=servers["on"].zoo))
        for version, what in ((0, "base"), (1, "base + residual")):
            cases[f"in process, {what}"] = lambda v=version: in_process(engine, servers["on"], v)  # type: ignore[misc]
            cases[f"1 client, no wait, {what}"] = lambda v=version: clients(servers["alone"], v, 1)  # type: ignore[misc]
            cases[f"1 client, wait 5 ms, {what}"] = lambda v=version: clients(servers["on"], v, 1)  # type: ignore[misc]
            cases[f"{CLIENTS} clients, batching on, {what}"] = lambda v=version: clients(servers["on"], v, CLIENTS)  # type: ignore[misc]
            cases[f"{CLIENTS} clients, batching off, {what}"] = lambda v=version: clients(servers["off"], v, CLIENTS)  # type: ignore[misc]
        found: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(ROUNDS):
            for name, case in cases.items():
                found[name] += case()
    return table(found)


def table(found: dict[str, list[float]]) -> list[dict[str, object]]:
    """Latencies per case -> rows with their ratios."""
    concurrent = {name: CLIENTS if name.startswith(f"{CLIENTS} clients") else 1 for name in found}
    rate = {name: concurrent[name] * len(values) / sum(values) for name, values in found.items()}
    result: list[dict[str, object]] = []
    for name, values in found.items():
        ratio = ""
        if "1 client, no wait" in name:
            ratio = f"{rate[name] / rate[name.replace('1 client, no wait', 'in process')]:.2f} x in process"
        elif "batching on" in name:
            ratio = f"{rate[name] / rate[name.replace('batching on', 'batching off')]:.2f} x batching off"
        if "residual" in name and "in process" in name:
            ratio = f"{rate[name] / rate[name.replace(' + residual', '')]:.2f} x base alone"
        result += rows(name, values, concurrent[name], ratio)
    return result


if __name__ == "__main__":
    for row in run():
        print(f"{row['name']:<52} {row['value']:>10} {row['unit']:<11} {row['ratio']}")
