"""Other people's encodings, byte for byte, written out here by hand from their documentation; and what must not be believed."""

from __future__ import annotations

import base64
import json
import struct

import msgpack
import numpy as np
import pytest

from services.vla import wire

ARRAY = np.array([[1.5, -2.0], [0.0, 4.0], [1e9, -1e-9]], np.float32)
RAW = struct.pack("<6f", 1.5, -2.0, 0.0, 4.0, 1e9, -1e-9)


def text(value: bytes, mark: int) -> bytes:
    """msgpack: a short str (0xa0) or map (0x80) or array (0x90) header."""
    return bytes([mark + len(value)]) + value


# msgpack_numpy of openpi-client: keys are bytes (bin 8), the shape is an array of ints, dtype is numpy's "<f4" as str.
OPENPI = (
    b"\x81" + text(b"actions", 0xA0) + b"\x84"
    + b"\xc4\x0b__ndarray__" + b"\xc3"
    + b"\xc4\x04data" + b"\xc4\x18" + RAW
    + b"\xc4\x05dtype" + text(b"<f4", 0xA0)
    + b"\xc4\x05shape" + b"\x92\x03\x02"
)  # fmt: skip

# numpy's format 1.0: magic, version, header length, a literal padded with spaces to a multiple of 64 bytes, a newline, the data.
HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }"
NPY = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + HEADER + b" " * (118 - len(HEADER) - 1) + b"\n" + RAW
# MsgSerializer of gr00t/policy/server_client.py: keys are str, the npy file is bytes (bin 8).
GR00T = (
    b"\x82" + text(b"endpoint", 0xA0) + text(b"get_action", 0xA0)
    + text(b"data", 0xA0) + b"\x81" + text(b"x", 0xA0)
    + b"\x82" + text(b"__ndarray_class__", 0xA0) + b"\xc3" + text(b"as_npy", 0xA0) + b"\xc4" + bytes([len(NPY)]) + NPY
)  # fmt: skip

JSON = b'{"proprio": {"__numpy__": "%s", "dtype": "<f4", "shape": [3, 2]}}' % base64.b64encode(RAW)


def test_openpi_to_the_byte() -> None:
    assert wire.pack_openpi({"actions": ARRAY}) == OPENPI
    read = wire.unpack_openpi(OPENPI)["actions"]
    assert read.dtype == np.float32 and np.array_equal(read, ARRAY)
    scalar = b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\xcb" + struct.pack(">d", 0.25) + b"\xc4\x05dtype\xa3<f4"
    assert wire.pack_openpi(np.float32(0.25)) == scalar and wire.unpack_openpi(scalar) == 0.25
    word = b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\xa3cup\xc4\x05dtype\xa3<U3"
    assert wire.unpack_openpi(word) == "cup"


def test_gr00t_to_the_byte() -> None:
    assert wire.to_npy(ARRAY) == NPY
    assert wire.pack_gr00t({"endpoint": "get_action", "data": {"x": ARRAY}}) == GR00T
    assert np.array_equal(wire.unpack_gr00t(GR00T)["data"]["x"], ARRAY)
    fortran = NPY.replace(b"'fortran_order': False, 'shape': (3, 2)", b"'fortran_order': True, 'shape': (2, 3) ")
    assert np.array_equal(wire.from_npy(fortran), ARRAY.T)


def test_json_numpy_to_the_byte() -> None:
    assert wire.to_json({"proprio": ARRAY}) == JSON
    read = wire.from_json(JSON)["proprio"]
    assert read.dtype == np.float32 and np.array_equal(read, ARRAY)
    assert json.loads(wire.to_json(np.float32(2.0)))["shape"] == [] and wire.from_json(wire.to_json(np.float32(2.0))) == 2.0


def openpi(data: object = RAW, dtype: object = "<f4", shape: object = (3, 2)) -> bytes:
    return bytes(msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (openpi(dtype="|O"), "dtype '|O' is not one of"),
        (openpi(dtype="O"), "dtype 'O' is not one of"),
        (openpi(dtype="<U3"), "dtype '<U3' is not one of"),
        (openpi(dtype=">f4"), "dtype '>f4' is not one of"),
        (openpi(dtype="f4," * 5 + "f"), "is not one of"),
        (openpi(dtype=[["a", "<f4"]]), "is not one of"),
        (openpi(dtype="x" * 100_000), "is not one of"),
        (openpi(shape=[1 << 40, 1 << 40]), "24 bytes do not hold float32"),
        (openpi(shape=[-3, -2]), "whole numbers >= 0"),
        (openpi(shape=[3, 2.0]), "whole numbers >= 0"),
        (openpi(shape=[True, 6]), "whole numbers >= 0"),
        (openpi(shape=[1] * 40), "at most 8 sizes"),
        (openpi(shape=6), "at most 8 sizes"),
        (openpi(data="text"), "data must be bytes"),
        (openpi(data=RAW[:-1]), "23 bytes do not hold float32"),
        (b"\xdd\xff\xff\xff\xff", "not msgpack"),  # a list of 4 billion
        (b"\x91" * 5000 + b"\x00", "not msgpack"),  # nested beyond reason
        (b"\xc1", "not msgpack"),
        (b"", "not msgpack"),
        (OPENPI + b"\x00", "not msgpack"),
        (
            bytes(msgpack.packb({b"__npgeneric__": True, b"data": 1 << 40, b"dtype": "<i4"})),
            "does not fit int32",
        ),
        (bytes(msgpack.packb({b"__npgeneric__": True, b"data": [1], b"dtype": "<i4"})), "must be a number"),
    ],
)
def test_openpi_messages_that_are_not_believed(message: bytes, words: str) -> None:
    with pytest.raises(wire.WireError) as caught:
        wire.unpack_openpi(message)
    assert words in str(caught.value)


def gr00t(npy: object) -> bytes:
    return bytes(msgpack.packb({"__ndarray_class__": True, "as_npy": npy}))


@pytest.mark.parametrize(
    ("npy", "words"),
    [
        (NPY.replace(b"'<f4'", b"'|O' "), "dtype '|O' is not one of"),
        (NPY.replace(b"'<f4'", b"open "), "header cannot be read"),
        (NPY.replace(b"(3, 2)", b"(9, 9)"), "24 bytes do not hold float32 (9, 9)"),
        (NPY[:8] + b"\xff\xff" + NPY[10:], "header is longer"),
        (b"\x80\x04cos\nsystem\n", "not in numpy's npy format"),  # a pickle
        (b"PK\x03\x04" + b"\0" * 40, "not in numpy's npy format"),  # an npz
        (NPY[:9], "not in numpy's npy format"),
        ("text", "not in numpy's npy format"),
        (None, "not in numpy's npy format"),
    ],
)
def test_gr00t_arrays_that_are_not_believed(npy: object, words: str) -> None:
    with pytest.raises(wire.WireError, match=words.replace("(", r"\(").replace(")", r"\)").replace("|", r"\|")):
        wire.unpack_gr00t(gr00t(npy))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"__numpy__": "!!", "dtype": "<f4", "shape": [1]}', "not base64"),
        (b'{"__numpy__": 3, "dtype": "<f4", "shape": [1]}', "not base64"),
        (b'{"__numpy__": "AAAA", "dtype": "O", "shape": [1]}', "dtype 'O' is not one of"),
        (b'{"__numpy__": "AAAAAA==", "dtype": "<f4", "shape": [1000000]}', "4 bytes do not hold"),
        (b'{"__numpy__": "AAAAAA==", "dtype": "<f4"}', "shape must be a list"),
        (b'{"a": ', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_json_that_is_not_believed(body: bytes, words: str) -> None:
    with pytest.raises(wire.WireError, match=words):
        wire.from_json(body)


def test_messages_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_BYTES", 10)
    for read in (wire.unpack_openpi, wire.unpack_gr00t, wire.from_json):
        with pytest.raises(wire.WireError, match="11 bytes are more than 10"):
            read(b" " * 11)
