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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import psutil
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


@dataclass
class Measured:
    """Latencies in seconds of `concurrent` clients, and the CPU seconds that the serving process spent on them."""

    latencies: list[float] = field(default_factory=list)
    cpu: float = 0.0
    concurrent: int = 1

    @property
    def rate(self) -> float:
        return self.concurrent * len(self.latencies) / sum(self.latencies)


def clients(server: VlaProcess, version: int, count: int, into: Measured) -> None:
    """`count` clients at once, each with its own channel, one observation a request."""
    into.concurrent = count
    assert server.process is not None
    process = psutil.Process(server.process.pid)

    def client(number: int) -> None:
        request = policy_pb2.ActRequest(observations=[observation(number)], version=version)
        with connect_channel(f"127.0.0.1:{server.port}") as channel:
            stub = PolicyStub(channel)
            stub.Act(request, timeout=30)
            ready.wait()
            into.latencies.extend(sample(lambda: stub.Act(request, timeout=30), SECONDS))

    ready = threading.Barrier(count + 1)
    threads = [threading.Thread(target=client, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    ready.wait()
    before = sum(process.cpu_times()[:2])
    for thread in threads:
        thread.join()
    into.cpu += sum(process.cpu_times()[:2]) - before


def in_process(engine: Engine, server: VlaProcess, version: int, into: Measured) -> None:
    """The same work without gRPC, batcher and second process."""
    residual = engine.check(server.artifacts.get(server.publish(1)), 1, "bench") if version else None
    job = ActJob(read_observations([observation(0)], engine.policy.spec, 1), residual)
    engine.compute([job])
    before = time.thread_time()
    into.latencies += sample(lambda: engine.compute([job]), SECONDS)
    into.cpu += time.thread_time() - before


def run() -> list[dict[str, object]]:
    """About a minute."""
    threads = torch.get_num_threads()
    cases: dict[str, Callable[[Measured], None]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
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
            cases[f"in process, {what}"] = partial(in_process, engine, servers["on"], version)
            cases[f"1 client, no wait, {what}"] = partial(clients, servers["alone"], version, 1)
            cases[f"1 client, wait 5 ms, {what}"] = partial(clients, servers["on"], version, 1)
            cases[f"{CLIENTS} clients, batching on, {what}"] = partial(clients, servers["on"], version, CLIENTS)
            cases[f"{CLIENTS} clients, batching off, {what}"] = partial(clients, servers["off"], version, CLIENTS)
        found = {name: Measured() for name in cases}
        for _ in range(ROUNDS):
            for name, case in cases.items():
                case(found[name])
    return [row for name in found for row in rows(name, found)]


def rows(name: str, found: dict[str, Measured]) -> list[dict[str, object]]:
    """One case as table rows: rate, latency, the server's CPU time a request (which a busy machine distorts least)."""
    mine, peer = found[name], ""
    if "batching on" in name:
        peer = name.replace("batching on", "batching off")
    elif "1 client" in name:
        peer = "in process" + name[name.rindex(",") :]
    elif "residual" in name:
        peer = name.replace(" + residual", "")
    rate = cpu = ""
    if peer:
        rate = f"{mine.rate / found[peer].rate:.2f} x {peer}"
        cpu = f"{mine.cpu / len(mine.latencies) / (found[peer].cpu / len(found[peer].latencies)):.2f} x {peer}"
    p50, p99 = np.percentile(mine.latencies, [50, 99]) * 1e3
    return [
        {"name": f"{name}: rate", "value": round(mine.rate, 1), "unit": "requests/s", "ratio": rate},
        {"name": f"{name}: latency p50", "value": round(float(p50), 2), "unit": "ms", "ratio": ""},
        {"name": f"{name}: latency p99", "value": round(float(p99), 2), "unit": "ms", "ratio": ""},
        {"name": f"{name}: CPU", "value": round(mine.cpu / len(mine.latencies) * 1e3, 2), "unit": "ms/request", "ratio": cpu},
    ]


if __name__ == "__main__":
    for row in run():
        print(f"{row['name']:<56} {row['value']:>8} {row['unit']:<11} {row['ratio']}")
