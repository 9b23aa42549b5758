"""Arrays on the wires of other people's policy servers and clients: three encodings, read without trust.

- `npy`: Isaac-GR00T, msgpack {"__ndarray_class__": True, "as_npy": numpy.save's bytes}.
- `openpi`: msgpack {b"__ndarray__": True, b"data", b"dtype", b"shape"}; scalars {b"__npgeneric__": True, b"data", b"dtype"}.
- `json_numpy`: JSON {"__numpy__": base64, "dtype", "shape"} (Cosmos Policy, OpenVLA-OFT).

Whoever is at the other end, a dtype must be on the list, a shape must fit its bytes, and nothing is unpickled: numpy.load is not
called, the header of an npy array is read here. Raises ValueError with a sentence.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import math
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DTYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64")
MAX_BYTES = 64 * 1024 * 1024
"""Longest message that is read from anybody."""
MAX_AXES = 8
MAX_ITEMS = 1_000_000
"""Most elements of a msgpack list or map."""
NPY_MAGIC = b"\x93NUMPY"


class WireError(ValueError):
    """What came over the wire is not what its protocol says."""


def make_array(data: object, dtype: object, shape: object) -> Array:
    """`data` (bytes) as an array of `dtype` (numpy's name or "<f4") and `shape` (sizes), all three from the wire."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise WireError(f"array: data must be bytes, got {type(data).__name__}")
    kind = read_dtype(dtype)
    if not isinstance(shape, list | tuple) or len(shape) > MAX_AXES:
        raise WireError(f"array: shape must be a list of at most {MAX_AXES} sizes")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
        raise WireError("array: shape must hold whole numbers >= 0")
    expected = math.prod(shape) * kind.itemsize
    if expected != len(data):
        raise WireError(f"array: {len(data)} bytes do not hold {kind.name} {tuple(shape)} ({expected} bytes)")
    return np.frombuffer(data, kind).reshape(shape)


def read_dtype(value: object) -> np.dtype[Any]:
    """A dtype from the list, little endian or without order. A structured or object dtype is refused before numpy parses it."""
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    if not isinstance(text, str) or len(text) > 16 or text[:1] == ">":
        raise WireError(f"array: dtype {str(value)[:40]!r} is not one of {', '.join(DTYPES)}")
    try:
        kind = np.dtype(text)
    except (TypeError, ValueError, SyntaxError):
        kind = np.dtype("O")
    if kind.name not in DTYPES:
        raise WireError(f"array: dtype {text[:40]!r} is not one of {', '.join(DTYPES)}")
    return kind


def to_npy(array: Array) -> bytes:
    """What numpy.save writes: format 1.0, C order."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape!r}, }}"
    text += " " * (-(len(NPY_MAGIC) + 4 + len(text) + 1) % 64) + "\n"
    return NPY_MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1") + array.tobytes()


def from_npy(data: object) -> Array:
    """An array out of numpy.save's bytes, formats 1.0 to 3.0. The header is a literal; nothing in it is executed."""
    if not isinstance(data, bytes) or data[:6] != NPY_MAGIC or len(data) < 12 or data[6] not in (1, 2, 3):
        raise WireError("array: as_npy is not in numpy's npy format")
    width = 2 if data[6] == 1 else 4
    start = 8 + width
    end = start + int.from_bytes(data[8:start], "little")
    if end > min(len(data), start + 10_000):
        raise WireError("array: the npy header is longer than the data or than 10000 bytes")
    try:
        header = ast.literal_eval(data[start:end].decode("utf8" if data[6] == 3 else "latin1").strip())
        descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError, UnicodeDecodeError):
        raise WireError("array: the npy header cannot be read") from None
    if fortran is True and isinstance(shape, tuple):
        return make_array(data[end:], descr, shape[::-1]).T
    return make_array(data[end:], descr, shape)


def _from_gr00t(value: dict[Any, Any]) -> Any:
    return from_npy(value.get("as_npy")) if "__ndarray_class__" in value else value


def _to_gr00t(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return {"__ndarray_class__": True, "as_npy": to_npy(np.asarray(value))}
    raise TypeError(f"cannot send {type(value).__name__}")


def _from_openpi(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return make_array(value.get(b"data"), value.get(b"dtype"), value.get(b"shape"))
    if b"__npgeneric__" in value:
        item = value.get(b"data")
        if isinstance(item, str):
            return item
        if not isinstance(item, bool | int | float):
            raise WireError(f"scalar: data must be a number or text, got {type(item).__name__}")
        kind = read_dtype(value.get(b"dtype"))
        if kind.kind in "iu" and not np.iinfo(kind).min <= item <= np.iinfo(kind).max:
            raise WireError(f"scalar: the number does not fit {kind.name}")
        return kind.type(item)
    return value


def _to_openpi(value: object) -> object:
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"cannot send {type(value).__name__}")


def _unpack(data: bytes, hook: Callable[[dict[Any, Any]], Any]) -> Any:
    if len(data) > MAX_BYTES:
        raise WireError(f"message: {len(data)} bytes are more than {MAX_BYTES}")
    try:
        return msgpack.unpackb(data, object_hook=hook, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS)
    except WireError:
        raise
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise WireError(f"message: not msgpack ({str(error)[:100] or type(error).__name__})") from None


def pack_gr00t(value: object) -> bytes:
    """`value` as Isaac-GR00T's MsgSerializer packs it."""
    return bytes(msgpack.packb(value, default=_to_gr00t))


def unpack_gr00t(data: bytes) -> Any:
    """See `npy`. A ModalityConfig stays the map that it is on the wire."""
    return _unpack(data, _from_gr00t)


def pack_openpi(value: object) -> bytes:
    """`value` as openpi's msgpack_numpy packs it."""
    return bytes(msgpack.packb(value, default=_to_openpi))


def unpack_openpi(data: bytes) -> Any:
    """See `openpi`."""
    return _unpack(data, _from_openpi)


def to_json(value: object) -> bytes:
    """`value` as json_numpy writes it."""

    def default(item: object) -> object:
        if isinstance(item, np.ndarray | np.generic):
            array = np.ascontiguousarray(item)
            encoded = base64.b64encode(array.tobytes()).decode()
            return {"__numpy__": encoded, "dtype": array.dtype.str, "shape": np.shape(item)}
        raise TypeError(f"cannot send {type(item).__name__}")

    return json.dumps(value, default=default).encode()


def from_json(data: bytes) -> Any:
    """JSON with json_numpy's arrays in it."""

    def hook(value: dict[str, Any]) -> Any:
        if "__numpy__" not in value:
            return value
        try:
            raw = base64.b64decode(value["__numpy__"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise WireError("array: __numpy__ is not base64") from None
        return make_array(raw, value.get("dtype"), value.get("shape"))

    if len(data) > MAX_BYTES:
        raise WireError(f"message: {len(data)} bytes are more than {MAX_BYTES}")
    try:
        return json.loads(data, object_hook=hook)
    except WireError:
        raise
    except (ValueError, RecursionError) as error:
        raise WireError(f"message: not JSON ({str(error)[:100]})") from None
