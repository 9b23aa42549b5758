"""A client of the Triton models: numpy in, numpy out, and errors sorted into "wait" and "your fault"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from services.worldmodel.backbones import BackboneInfo, Frames

MAX_ROWS = 64
"""Rows of one call: max_batch_size of the models."""
MODELS = ("worldmodel", "video_adapter", "imagine")
OUTPUTS = ("e_v", "last_frame", "latents", "frames")


class TritonUnavailableError(Exception):
    """Triton does not answer, or a model is not loaded (yet): the same call may work later."""


class TritonFailedError(TritonUnavailableError):
    """The computation failed or hung inside Triton (its Python process died, say): worth a few more tries."""


class TritonRefusedError(ValueError):
    """The model refused the call: an argument is out of range. The same call will fail again."""


@dataclass(frozen=True)
class Served:
    """What Triton serves now: the world model's description and the adapters' hash."""

    worldmodel: BackboneInfo
    adapters_hash: str


class ImagineClient:
    """Calls the ensemble `imagine` at `address` (host:port of Triton's gRPC door). Use from one thread at a time."""

    def __init__(self, address: str, timeout: float = 300.0) -> None:
        self.address, self.timeout = address, timeout
        # Without keepalive a call to a machine that vanished would hang until its timeout.
        keepalive = grpcclient.KeepAliveOptions(keepalive_time_ms=20_000, keepalive_timeout_ms=10_000)
        self._client = grpcclient.InferenceServerClient(address, keepalive_options=keepalive)

    def close(self) -> None:
        self._client.close()

    def missing(self) -> str | None:
        """None when the server and all models are ready, else one sentence that says what is not."""
        try:
            if not self._client.is_server_ready(client_timeout=2.0):
                return f"triton at {self.address} is not ready"
            absent = [m for m in MODELS if not self._client.is_model_ready(m, client_timeout=2.0)]
        except InferenceServerException:
            return f"triton at {self.address} does not answer"
        return f"triton at {self.address}: not ready: {', '.join(absent)}" if absent else None

    def served(self) -> Served:
        """Hashes and sizes, from the loaded models themselves. Imagines nothing."""
        reply = self._call("worldmodel", _inputs(np.zeros((1, 1, 1, 3), np.uint8), [""], [0], 1, 1, 1.0, 0), ["info"])
        info = BackboneInfo.from_dict(json.loads(reply["info"][0, 0]))
        latents = np.zeros((1, 2, *info.latent_shape), np.float32)
        reply = self._call("video_adapter", {"latents": latents}, ["hash"])
        return Served(info, cast(bytes, reply["hash"][0, 0]).decode())

    def imagine(
        self,
        start: Frames,
        prompts: Sequence[str],
        seeds: Sequence[int],
        horizon: int,
        steps: int = 1,
        guidance: float = 1.0,
        wants: Sequence[str] = ("e_v",),
    ) -> tuple[dict[str, npt.NDArray[Any]], str, str]:
        """Start frames uint8 (b, H, W, 3), b <= 64, prompt and seed per row -> ({name: array}, world-model hash, adapters hash).

        `wants` from OUTPUTS: e_v float32 (b, horizon, D), last_frame uint8 (b, H, W, 3), latents float32 (b, 1+horizon, C, h, w),
        frames uint8 (b, 1+M*horizon, H, W, 3). Raises TritonUnavailableError or TritonRefusedError.
        """
        names = [*wants, "worldmodel_hash", "adapters_hash"]
        decode = 2 if "frames" in wants else 1 if "last_frame" in wants else 0
        reply = self._call("imagine", _inputs(start, prompts, seeds, horizon, steps, guidance, decode), names)
        hashes = [cast(bytes, reply.pop(name)[0, 0]).decode() for name in ("worldmodel_hash", "adapters_hash")]
        return reply, hashes[0], hashes[1]

    def _call(self, model: str, arrays: dict[str, npt.NDArray[Any]], names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        inputs = []
        for name, array in arrays.items():
            tensor = grpcclient.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        outputs = [grpcclient.InferRequestedOutput(name) for name in names]
        try:
            reply = self._client.infer(model, inputs, outputs=outputs, client_timeout=self.timeout)
        except InferenceServerException as error:
            raise sort_error(error) from None
        return {name: reply.as_numpy(name) for name in names}


def sort_error(error: InferenceServerException) -> Exception:
    """A gRPC status -> whose fault it is: the caller's, the computation's, or nobody's (not reachable, not loaded)."""
    text = " ".join(str(error.message()).split())[:500]
    if error.status() == "StatusCode.INVALID_ARGUMENT":
        return TritonRefusedError(text)
    if error.status() in ("StatusCode.INTERNAL", "StatusCode.UNKNOWN", "StatusCode.DEADLINE_EXCEEDED"):
        return TritonFailedError(f"triton: {text}")
    return TritonUnavailableError(f"triton: {text}")


def _inputs(
    start: Frames, prompts: Sequence[str], seeds: Sequence[int], horizon: int, steps: int, guidance: float, decode: int
) -> dict[str, npt.NDArray[Any]]:
    rows = len(start)
    if not 1 <= rows <= MAX_ROWS or len(prompts) != rows or len(seeds) != rows:
        raise TritonRefusedError(
            f"start: need 1 to {MAX_ROWS} rows with a prompt and a seed each, got {rows}, {len(prompts)}, {len(seeds)}"
        )
    return {
        "start_frame": np.ascontiguousarray(start),
        "prompt": np.array([[p.encode()] for p in prompts], dtype=object),
        "seed": np.array(seeds, np.int64).reshape(-1, 1),
        "horizon": np.full((rows, 1), horizon, np.int32),
        "steps": np.full((rows, 1), steps, np.int32),
        "guidance": np.full((rows, 1), guidance, np.float32),
        "decode": np.full((rows, 1), decode, np.int32),
    }
