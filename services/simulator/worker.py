"""One environment in one process. Requests and replies are safetensors bytes (services/runtime/tensors.py): no pickle.

Request: metadata {"op": "describe" | "reset" | "step"}, its scalars as text, tensors by name.
Reply: metadata {"status": "ok" | "invalid" | "failed", "message"}, tensors "image/<camera>", "state" or "states".
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from services.runtime.tensors import pack, unpack, unpack_metadata
from services.simulator.envs import base

Arrays = Mapping[str, npt.NDArray[Any]]
# safetensors cannot hold a file without tensors in every version: a reply always carries this one.
MARK: Arrays = {"mark": np.zeros(1, np.uint8)}
IMAGE = "image/"


def encode(head: Mapping[str, str], arrays: Arrays | None = None) -> bytes:
    """A message: text fields and named arrays."""
    return pack({**MARK, **(arrays or {})}, head)


def decode(data: bytes) -> tuple[dict[str, str], dict[str, npt.NDArray[Any]]]:
    """The inverse of `encode`."""
    arrays = unpack(data)
    arrays.pop("mark", None)
    return unpack_metadata(data), arrays


def images_of(arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
    """camera -> image(s) of a reply."""
    return {key.removeprefix(IMAGE): value for key, value in arrays.items() if key.startswith(IMAGE)}


def spec_from_json(text: str) -> base.EnvironmentSpec:
    """The spec that a worker described."""
    fields = json.loads(text)
    for name, kind in (("cameras", base.Camera), ("state", base.Axis), ("action", base.Axis), ("tasks", base.TaskSpec)):
        fields[name] = tuple(kind(**entry) for entry in fields[name])
    return base.EnvironmentSpec(**fields)


def answer(env: base.Environment, request: bytes) -> bytes:
    """Carry out one request. Simulator errors propagate: the process is then no longer to be trusted."""
    head, arrays = decode(request)
    if head["op"] == "describe":
        return encode({"status": "ok", "spec": json.dumps(asdict(env.spec))})
    try:
        if head["op"] == "reset":
            observation = env.reset(head["task"], int(head["seed"]))
            images = {IMAGE + name: image for name, image in observation.images.items()}
            return encode({"status": "ok", "instruction": observation.instruction}, {**images, "state": observation.state})
        result = env.step(arrays["actions"], cast(base.Frames, head["frames"]))
    except base.InvalidInputError as error:
        return encode({"status": "invalid", "message": str(error)})
    images = {IMAGE + name: image for name, image in result.images.items()}
    flags = {"success": str(int(result.success)), "done": str(int(result.done))}
    return encode({"status": "ok", **flags}, {**images, "states": result.states})


def work(connection: Connection, simulator: str) -> None:
    """The process: answers until the parent closes the pipe, or after an error that the simulator did not expect."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes the pipe in order
    env = base.make(simulator)
    try:
        while True:
            connection.send_bytes(answer(env, connection.recv_bytes()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        connection.send_bytes(encode({"status": "failed", "message": f"{type(error).__name__}: {error}"[:500]}))
    finally:
        env.close()
