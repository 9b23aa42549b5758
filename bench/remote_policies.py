"""Base policies elsewhere: what each adapter costs over a bare client of the same protocol.

Both ask one server that answers at once with fixed actions, in its documented protocol, in a process of its own, with two
cameras of 256 x 256 (GR00T, Cosmos Policy) or 224 x 224 pixels. The bare client sends the same message, encoded anew each time,
and decodes the answer, with the libraries that the protocol's own client uses. The adapter does that, and cuts cameras out of the
grid, resizes and mirrors them, and checks everything. Alternating rounds in one process; median and 95th percentile. Doors:
openpi's own client and a bare GR00T client against our server, against the same observation over policy.proto.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import json_numpy
import msgpack
import numpy as np
import torch
import zmq
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from services.runtime.generated import policy_pb2
from services.vla.policies import base
from services.vla.settings import VlaSettings
from tests.policy_servers import SERVERS, Brain, from_npy, npy
from tests.processes import free_port
from tests.vla_server import VlaProcess, observation

ROUNDS, SECONDS = 3, 0.5
SIZE = 256
Call = Callable[[], object]


class Fixed(Brain):
    """Answers at once: what is measured is the way."""

    def __init__(self, policy: str, robot: str) -> None:
        super().__init__(policy, robot)
        sizes = self.layout.action_sizes
        self.answer = {name: np.full((self.horizon, size), 0.25, np.float32) for name, size in sizes.items()}

    def actions(self, observation: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        self.seen[:] = [observation]
        return self.answer


def serve(policy: str, pipe: Connection) -> None:
    """A server process: sends its address, ends when told."""
    with SERVERS[policy](Fixed(policy, "libero")) as address:
        pipe.send(address)
        pipe.recv()


@contextlib.contextmanager
def server(policy: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(policy, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        here.send("end")
        process.join(10)


def bare_openpi(address: str, flat: dict[str, Any]) -> Call:
    host, port = address.split(":")
    client = WebsocketClientPolicy(host, int(port))
    return lambda: client.infer(flat)


def bare_gr00t(address: str, flat: dict[str, Any], names: tuple[list[str], list[str], str]) -> Call:
    """As gr00t/policy/server_client.py."""
    socket = zmq.Context.instance().socket(zmq.REQ)
    socket.connect(f"tcp://{address}")
    cameras, states, text = names
    request = {
        "endpoint": "get_action",
        "data": {
            "observation": {
                "video": {name: flat[name][None, None] for name in cameras},
                "state": {name: flat[name][None, None] for name in states},
                "language": {text: [[flat[text]]]},
            },
            "options": None,
        },
    }

    def call() -> object:
        socket.send(msgpack.packb(request, default=npy))
        return msgpack.unpackb(socket.recv(), object_hook=from_npy)

    return call


def bare_http(address: str, flat: dict[str, Any]) -> Call:
    client = httpx.Client(trust_env=False, headers={"content-type": "application/json"})
    return lambda: json_numpy.loads(client.post(f"http://{address}/act", content=json_numpy.dumps(flat)).content)


def sample(call: Call) -> list[float]:
    latencies, end = [], time.perf_counter() + SECONDS
    while (started := time.perf_counter()) < end:
        call()
        latencies.append(1000.0 * (time.perf_counter() - started))
    return latencies


def compare(cases: dict[str, Call]) -> dict[str, list[float]]:
    """Latencies in ms of each case, in alternating rounds after one call each to warm up."""
    for call in cases.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, call in cases.items():
            found[name] += sample(call)
    return found


def rows(label: str, found: dict[str, list[float]]) -> list[dict[str, object]]:
    """Table rows; the first case is what the others are held against."""
    peer = float(np.median(next(iter(found.values()))))
    made: list[dict[str, object]] = []
    for number, (name, latencies) in enumerate(found.items()):
        middle, late = np.percentile(latencies, [50, 95])
        ratio = f"p95 {late:.1f} ms" + (f", +{middle - peer:.2f} ms, {middle / peer:.2f}x" if number else "")
        made.append({"name": f"{label}, {name}", "value": float(middle), "unit": "ms", "ratio": ratio})
    return made


def adapter(name: str) -> list[dict[str, object]]:
    """One policy's adapter against a bare client."""
    with server(name) as address:
        policy = base.make(
            VlaSettings(vla_policy=name, vla_remote=address, vla_layout="libero", vla_image_size=SIZE, vla_remote_timeout=30)
        )
        rng = np.random.default_rng(0)
        grids = rng.integers(0, 256, (1, 2 * SIZE, 2 * SIZE, 3), dtype=np.uint8)
        states = rng.uniform(-0.5, 0.5, (1, 7)).astype(np.float32)
        layout = policy.layout  # type: ignore[attr-defined]
        table = layout.policy
        flat = {**layout.images(grids[0]), **layout.states(states[0]), table.instruction: "open the drawer"}
        bare = {
            "openpi": lambda: bare_openpi(address, flat),
            "gr00t": lambda: bare_gr00t(address, flat, (list(table.cameras), list(table.state), table.instruction)),
        }.get(name, lambda: bare_http(address, flat))()
        found = compare({"bare client": bare, "adapter": lambda: policy.act(grids, states, ["open the drawer"])})
        policy.disconnect()  # type: ignore[attr-defined]
        return rows(name, found)


def doors() -> list[dict[str, object]]:
    """Our server, asked in three protocols for the same: base + residual of the tiny policy."""
    with tempfile.TemporaryDirectory() as folder:
        ports = {"vla_openpi_port": free_port(), "vla_gr00t_port": free_port()}
        process = VlaProcess(Path(folder), vla_max_wait_ms=0, **ports)
        try:
            process.start().load(1)
            row = observation(0)
            images = {name: np.frombuffer(row.images[name].data, np.uint8).reshape(64, 64, 3) for name in ("primary", "wrist")}
            state = np.frombuffer(row.state.data, np.float32)
            flat = {"observation/image": images["primary"], "observation/wrist_image": images["wrist"]}
            flat |= {"observation/state": state, "prompt": row.instruction}  # type: ignore[dict-item]
            named = {"image": images["primary"], "wrist_image": images["wrist"], "proprio": state, "task": row.instruction}
            request = policy_pb2.ActRequest(observations=[row], version=-1)
            cases: dict[str, Call] = {
                "policy.proto": lambda: process.stub.Act(request, timeout=30),
                "openpi-client": bare_openpi(f"127.0.0.1:{ports['vla_openpi_port']}", flat),
                "GR00T client": bare_gr00t(
                    f"127.0.0.1:{ports['vla_gr00t_port']}", named, (["image", "wrist_image"], ["proprio"], "task")
                ),
            }
            return rows("our doors, base + residual", compare(cases))
        finally:
            process.close()


def run() -> list[dict[str, object]]:
    """Rows for `python -m bench`; about half a minute if idle."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = [row for name in SERVERS for row in adapter(name)] + doors()
    torch.set_num_threads(threads)
    return made
