"""Simulator: actions a second through gRPC and a pool of processes, against the same environments called in process.

Peer: the same Meta-World environments in this process, one after the other. Both sides run the same scenes and actions, in turns
(round by round), so that a busy machine slows both. One action is two simulator steps; a frame is two 64x64 images a chunk.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from services.runtime.generated import simulator_pb2 as pb
from services.runtime.generated.simulator_pb2_grpc import SimulatorStub
from services.runtime.rpc import connect_channel, healthy
from services.runtime.tensors import to_tensor
from services.simulator.envs import base
from world2act.splits import Split, scene_seed

TASK = "push"
ENVIRONMENTS = 2
CHUNKS = 12  # of one episode
ROUNDS = 5
FRAMES: dict[base.Frames, int] = {"none": pb.FRAMES_NONE, "last": pb.FRAMES_LAST}
LABELS: dict[base.Frames, str] = {"none": "without frames", "last": "one frame a chunk"}


@contextmanager
def server() -> Iterator[SimulatorStub]:
    """The real service as its own process, on a free port."""
    ports = []
    for _ in range(2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            ports.append(str(s.getsockname()[1]))
    variables = {
        "W2A_SIMULATOR_PORT": ports[0],
        "W2A_METRICS_PORT": ports[1],
        "W2A_SIMULATOR_ENVIRONMENTS": str(ENVIRONMENTS),
        "W2A_LOG_LEVEL": "WARNING",
    }
    process = subprocess.Popen([sys.executable, "-m", "services.simulator"], env={**os.environ, **variables})
    try:
        address = f"127.0.0.1:{ports[0]}"
        while not healthy(address):
            if process.poll() is not None:
                raise RuntimeError("the simulator service did not start")
            time.sleep(0.2)
        with connect_channel(address) as channel:
            yield SimulatorStub(channel)
    finally:
        process.terminate()
        process.wait(20)


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def run() -> list[dict[str, Any]]:
    """Rows: actions a second, medians over rounds; ratio: against in process."""
    envs = [base.make("metaworld") for _ in range(ENVIRONMENTS)]
    size = envs[0].spec.chunk
    actions = np.random.default_rng(0).uniform(-1, 1, (CHUNKS, size, len(envs[0].spec.action))).astype(np.float32)
    messages = [to_tensor(chunk) for chunk in actions]
    rates: dict[tuple[base.Frames, str], list[float]] = {}
    with server() as stub:
        ids: list[str] = []

        def reset() -> None:
            for index, env in enumerate(envs):
                env.reset(TASK, scene_seed(Split.TUNING, index))
                known = ids[index] if index < len(ids) else ""
                reply = stub.Reset(pb.ResetRequest(task=TASK, split="tuning", index=index, env_id=known))
                if index == len(ids):
                    ids.append(reply.env_id)

        def in_process(frames: base.Frames) -> None:
            for chunk in actions:
                for env in envs:
                    env.step(chunk, frames)

        def by_grpc(frames: base.Frames) -> None:
            for message in messages:
                stub.Step(pb.StepRequest(chunks=[pb.Chunk(env_id=i, actions=message) for i in ids], frames=FRAMES[frames]))

        for round_ in range(ROUNDS + 1):
            for frames in FRAMES:
                for side, work in (("in process", in_process), ("gRPC", by_grpc)):
                    reset()
                    seconds = timed(lambda w=work, f=frames: w(f))
                    if round_:  # the first round warms up
                        rates.setdefault((frames, side), []).append(CHUNKS * size * ENVIRONMENTS / seconds)
    for env in envs:
        env.close()
    rows = []
    for frames in FRAMES:
        peer = float(np.median(rates[frames, "in process"]))
        served = float(np.median(rates[frames, "gRPC"]))
        named = f"{ENVIRONMENTS} environments, {LABELS[frames]}"
        rows.append({"name": f"{named}, in process", "value": peer, "unit": "actions/s", "ratio": ""})
        rows.append({"name": f"{named}, gRPC", "value": served, "unit": "actions/s", "ratio": f"{served / peer:.2f}x in process"})
    return rows


if __name__ == "__main__":
    for row in run():
        print(f"{row['name']:<60}{row['value']:>10,.0f} {row['unit']}  {row['ratio']}")
