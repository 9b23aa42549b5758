"""numpy arrays as bytes: one codec for protobuf, pipes and artifacts.

Not pickle: the reader trusts nothing but shape and dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from services.runtime.generated.tensor_pb2 import Tensor

DTYPES = ("uint8", "int32", "int64", "float16", "float32", "float64", "bool")
MAX_BYTES = 256 * 1024 * 1024


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """ndarray -> protobuf Tensor (C order, little endian)."""
    array = np.asarray(array, order="C")
    return Tensor(dtype=array.dtype.name, shape=array.shape, data=array.tobytes())


def from_tensor(tensor: Tensor, field: str = "tensor") -> npt.NDArray[Any]:
    """protobuf Tensor -> ndarray. Raises ValueError naming `field` for an unknown dtype, a bad shape or a wrong length."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{field}: dtype {tensor.dtype!r} is not one of {', '.join(DTYPES)}")
    shape = tuple(tensor.shape)
    if len(shape) > 8 or any(n < 0 for n in shape):
        raise ValueError(f"{field}: shape {shape} must have at most 8 non-negative sizes")
    dtype = np.dtype(tensor.dtype)
    expected = math.prod(shape) * dtype.itemsize
    if expected > MAX_BYTES or len(tensor.data) != expected:
        raise ValueError(
            f"{field}: {len(tensor.data)} bytes do not hold {tensor.dtype} {shape} ({expected} bytes, limit {MAX_BYTES})"
        )
    return np.frombuffer(tensor.data, dtype).reshape(shape)


def pack(arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Named arrays + text -> safetensors bytes; equal input gives equal bytes."""
    contiguous = {k: np.asarray(v, order="C") for k, v in sorted(arrays.items())}
    data = bytes(safetensors.numpy.save(contiguous, dict(metadata or {}) or None))
    # safetensors writes several metadata keys in a random order: write its header again, sorted, so that names are reproducible.
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def unpack(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """safetensors bytes -> named arrays."""
    return dict(safetensors.numpy.load(data))


def unpack_metadata(data: bytes) -> dict[str, str]:
    """The text stored beside the arrays by `pack`."""
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise ValueError("safetensors header is longer than the data")
    header = json.loads(data[8 : 8 + size])
    return dict(header.get("__metadata__", {}))
