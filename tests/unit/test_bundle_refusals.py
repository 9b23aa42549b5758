"""Residual bundles from outside: what is damaged, changed, unsigned or made beside other weights is refused in a sentence."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

from tests.vla_server import make_bundle
from world2act.bundle import Bundle, Origin
from world2act.models import store
from world2act.models.adapters import Adapters, AdapterSettings
from world2act.normalisation import Statistics
from world2act.signature import SignatureError, name_of, private_key, sign, trusted_keys

ORIGIN = Origin("b" * 64, "w" * 64, "a" * 64)
BUNDLE = make_bundle(ORIGIN, 3)
CONTENT = BUNDLE.to_bytes()
KEY, OTHER_KEY = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
NAME, OTHER_NAME = name_of(KEY.public_key()), name_of(OTHER_KEY.public_key())


def refusal(content: bytes, **checks: Any) -> str:
    """The sentence that `content` is refused with: one line, whatever is in the file."""
    with pytest.raises(store.WeightsError) as caught:
        Bundle.from_bytes(content, "r.safetensors", **checks)
    words = str(caught.value)
    assert words.startswith("r.safetensors: ") and "\n" not in words and len(words) < 700
    return words


def altered(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> bytes:
    """The bundle after change(metadata, tensors)."""
    tensors, metadata, _ = store.parse(CONTENT, "residual", "")
    change(metadata, tensors)
    return store.to_bytes(tensors, metadata)


def configured(path: str, value: Any) -> bytes:
    """The bundle with one entry of its config set, such as residual.bound; None: left out."""

    def change(metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        *parents, last = path.split(".")
        place = metadata["config"]
        for parent in parents:
            place = place[parent]
        place[last] = value
        if value is None:
            del place[last]

    return altered(change)


@pytest.mark.parametrize("length", [0, 7, 8, 9, 1000, len(CONTENT) // 2, len(CONTENT) - 1])
def test_truncated(length: int) -> None:
    assert "not a safetensors file" in refusal(CONTENT[:length])
    assert "not a safetensors file" in refusal(sign(CONTENT, KEY)[:length])


def test_huge_header_is_refused_before_it_is_parsed() -> None:
    for claimed in (store.MAX_HEADER + 1, 2**40, 2**64 - 1):
        assert "limit is" in refusal(claimed.to_bytes(8, "little") + CONTENT[8:])
    spaces = b" " * store.MAX_HEADER
    assert "limit is" in refusal((len(spaces) + 2).to_bytes(8, "little") + b"{}" + spaces)
    assert "not a safetensors file" in refusal((2**20).to_bytes(8, "little") + CONTENT[8:])  # longer than the file


@pytest.mark.parametrize(
    "metadata", ["[]", "3", "null", '"residual"', "[" * 100_000, '{"kind": "residual"', "", '{"kind": "adapters"}']
)
def test_metadata_that_is_no_bundles(metadata: str) -> None:
    header = json.dumps({"__metadata__": {store.KEY: metadata}}).encode()
    assert "World2Act metadata" in (words := refusal(len(header).to_bytes(8, "little") + header)) or "kind must be" in words


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("residual.bound", float("nan"), "residual.bound"),
        ("residual.bound", float("inf"), "residual.bound"),
        ("residual.bound", -1.0, "bound: must be > 0"),
        ("residual.bound", "9", "residual.bound"),
        ("residual.bound", None, "missing residual.bound"),
        ("residual.layers", 10**9, "layers: must be 1 to 64"),
        ("residual.heads", 7, "width: must be a multiple of 7 heads"),
        ("residual.heads", 0, "heads: must be 1 to 64"),
        ("residual.state_size", 5, "size mismatch"),
        ("residual.latent_shape", [100_000, 100_000, 100_000], "size mismatch"),
        ("residual.latent_shape", [16, 8], "latent_shape"),
        ("residual.vision", "sonar", "residual.vision"),
        ("residual.instruction", False, "Unexpected key"),
        ("residual.gain", 2.0, "residual.gain"),
        ("adapters.size", 2**40, "does not hold"),
        ("adapters.action_size", 3, "4 components, but 3 in the adapters"),
        ("layout.low", [float("nan")] * 4, "layout.low"),
        ("layout.low", [2.0] * 4, "every low one below its high one"),
        ("layout.low", None, "missing layout.low"),
        ("layout.names", ["dx", "dy", "dz"], "3 names, 4 low"),
        ("layout", None, "missing layout"),
        ("origin.base", None, "origin"),
        ("origin.base", 5, "origin.base"),
        ("version", float("inf"), "version"),
        ("version", 0, "version"),
        ("version", "3", "version"),
        ("residual", [], "missing residual.bound"),
    ],
)
def test_tampered_metadata_names_the_field(path: str, value: Any, words: str) -> None:
    assert words in refusal(configured(path, value))


def test_tampered_tensors() -> None:
    def setting(name: str, value: Any) -> bytes:
        return altered(lambda metadata, tensors: tensors.update({name: value}))

    bias = store.parse(CONTENT, "residual", "")[0]["head.3.bias"]
    for poison in (float("nan"), float("inf")):
        assert "not finite in head.3.bias" in refusal(setting("head.3.bias", torch.full_like(bias, poison)))
    assert "must be float32, but head.3.bias is torch.float16" in refusal(setting("head.3.bias", bias.half()))
    assert "size mismatch for head.3.bias" in refusal(setting("head.3.bias", bias[:-1].clone()))
    assert "Unexpected key" in refusal(setting("back.door", bias))
    assert "state_std must be > 0" in refusal(setting("state_std", torch.tensor([1.0, 0.0, 1.0, 1.0])))
    assert "std finite and > 0" in refusal(setting("actions.std", torch.tensor([1.0, -1.0, 1.0, 1.0])))
    assert "must be equal (n,)" in refusal(setting("actions.std", torch.ones(5)))
    for name in ("actions.mean", "actions.std", "state_mean", "state_std"):
        assert f"missing statistics: {name}" in refusal(altered(lambda metadata, tensors, name=name: tensors.pop(name)))  # type: ignore[misc]


def test_random_damage_is_refused_in_a_sentence_or_harmless() -> None:
    """Bytes changed anywhere, mostly in the header: never another exception, and where a signature is demanded, refused."""
    rng = np.random.default_rng(0)
    for turn in range(150):
        damaged = bytearray(sign(CONTENT, KEY) if turn % 2 else CONTENT)
        header = 8 + int.from_bytes(damaged[:8], "little")
        damaged[int(rng.integers(len(damaged) if turn % 3 == 0 else header))] ^= int(rng.integers(1, 256))
        with contextlib.suppress(store.WeightsError):
            Bundle.from_bytes(bytes(damaged))
        with pytest.raises(store.WeightsError):
            Bundle.from_bytes(bytes(damaged), trusted=frozenset({NAME}))


def test_bound_and_statistics_must_fit_what_is_in_use() -> None:
    assert Bundle.from_bytes(CONTENT, max_bound=1.0).policy.settings.bound == 1.0
    assert "up to 1 standard deviations to an action (bound), the limit here is 0.5" in refusal(CONTENT, max_bound=0.5)
    own = Adapters(AdapterSettings(), Statistics(torch.zeros(4), torch.full((4,), 0.5)), ORIGIN.worldmodel)
    assert Bundle.from_bytes(CONTENT, adapters=own).version == 3
    scaled = altered(lambda metadata, tensors: tensors["actions.std"].__setitem__(2, 5.0))
    assert "action statistics differ: std of dz is 5, but 0.5 in the adapters" in refusal(scaled, adapters=own)
    smaller = Adapters(AdapterSettings(unit=False), own.actions, ORIGIN.worldmodel)
    assert "the residual's adapters are" in refusal(CONTENT, adapters=smaller)


def test_signature() -> None:
    signed = sign(CONTENT, KEY)
    assert Bundle.from_bytes(signed).signed_by == Bundle.from_bytes(signed, trusted=frozenset({NAME})).signed_by == NAME
    assert Bundle.from_bytes(signed).to_bytes() == CONTENT and Bundle.from_bytes(CONTENT).signed_by == ""
    assert sign(signed, KEY) == signed and Bundle.from_bytes(sign(signed, OTHER_KEY)).signed_by == OTHER_NAME
    missing = refusal(CONTENT, trusted=frozenset({NAME, OTHER_NAME}))
    assert "it is not signed" in missing and NAME[:16] in missing and OTHER_NAME[:16] in missing
    wrong = refusal(signed, trusted=frozenset({OTHER_NAME}))
    assert f"signed by key {NAME[:16]}, which is not among the trusted ones ({OTHER_NAME[:16]})" in wrong


def test_signature_that_does_not_hold_is_refused_even_where_none_is_demanded() -> None:
    signed = sign(CONTENT, KEY)
    tensors, metadata, _ = store.parse(signed, "residual", "")
    own = metadata["signature"]
    for changes in (
        {"config": {**metadata["config"], "version": 4}},
        {"card": {"note": "better"}},
        {"signature": {**own, "key": OTHER_NAME}},
        {"signature": {**own, "value": "0" * 128}},
        {"signature": {**own, "value": own["value"][:-2]}},
        {"signature": {**own, "key": "zz"}},
        {"signature": {"value": own["value"]}},
        {"signature": "yes"},
        {"card": {"note": own["value"]}},  # the digits twice
    ):
        assert "the signature does not hold" in refusal(store.to_bytes(tensors, {**metadata, **changes}))
    flipped = bytearray(signed)
    flipped[-1] ^= 1  # one bit of one weight
    assert "the signature does not hold" in refusal(bytes(flipped))


def test_only_weights_files_are_signed() -> None:
    for content in (b"", b"hello", CONTENT[:100], (2).to_bytes(8, "little") + b"{}"):
        with pytest.raises(SignatureError, match="cannot be signed"):
            sign(content, KEY)


def pem(key: Any, password: bytes = b"") -> str:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return str(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption).decode())


def public_pem(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))


def test_private_key_is_read_from_text_and_never_shown() -> None:
    text = pem(KEY)
    for given in (text, text.replace("\n", "\\n")):
        assert name_of(private_key(given, "signing_key").public_key()) == NAME
    for given, words in (
        (pem(KEY, b"secret"), "is encrypted"),
        (pem(generate_private_key(65537, 2048)), "must be an Ed25519 key"),
        (public_pem(KEY).decode(), "holds no private key"),
        (text[:60], "holds no private key"),
        ("hunter2", "holds no private key"),
    ):
        with pytest.raises(SignatureError, match=f"^signing_key: {words}") as caught:
            private_key(given, "signing_key")
        assert "hunter2" not in str(caught.value) and "MC4CAQ" not in str(caught.value)


def test_trusted_keys_are_files(tmp_path: Path) -> None:
    for name, content in (
        ("a", public_pem(KEY)),
        ("b", public_pem(OTHER_KEY)),
        ("private", pem(KEY).encode()),
        ("junk", b"\xff"),
    ):
        (tmp_path / name).write_bytes(content)
    assert trusted_keys("", "f") == trusted_keys(" , ", "f") == frozenset()
    assert trusted_keys(f"{tmp_path}/a, {tmp_path}/b", "f") == {NAME, OTHER_NAME}
    for name, words in (("none", "cannot read"), ("private", "no public key"), ("junk", "no public key")):
        with pytest.raises(SignatureError, match=f"^f: .*{words}"):
            trusted_keys(f"{tmp_path}/{name}", "f")
