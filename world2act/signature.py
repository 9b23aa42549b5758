"""Ed25519 signatures that lie inside a safetensors file, in its metadata. Needs no torch: who signs need not run a policy.

Signed is the whole file, byte for byte, with the signature's 128 hexadecimal digits read as zeros. Keys are PEM, as `openssl
genpkey -algorithm ed25519` makes them; a key's name is its public half in hexadecimal. No private key stands in an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

METADATA_KEY = "world2act"
"""The one metadata key of our weights files (world2act/models/store.py)."""

FIELD = "signature"
_BLANK = "0" * 128


class SignatureError(ValueError):
    """A signature that does not hold, or a key that is none."""


def sign(content: bytes, key: Ed25519PrivateKey) -> bytes:
    """The same weights file with its signature in it; an earlier one is replaced. Raises SignatureError for another file."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
        metadata = json.loads(header["__metadata__"][METADATA_KEY])
        blank = _with_signature(header, metadata, content[8 + size :], key, _BLANK)
        return _with_signature(header, metadata, content[8 + size :], key, key.sign(blank).hex())
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise SignatureError(f"cannot be signed: it is no weights file of World2Act ({error})") from None


def _with_signature(
    header: Mapping[str, Any], metadata: Mapping[str, Any], data: bytes, key: Ed25519PrivateKey, value: str
) -> bytes:
    signed = {**metadata, FIELD: {"key": name_of(key.public_key()), "value": value}}
    changed = {**header, "__metadata__": {METADATA_KEY: json.dumps(signed, sort_keys=True)}}
    text = json.dumps(changed, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    return len(text).to_bytes(8, "little") + text + data


def signer(content: bytes, metadata: Mapping[str, Any]) -> str:
    """The name of the key that signed `content`, whose parsed metadata is `metadata`; empty where nobody did.

    Raises SignatureError where there is a signature that does not hold.
    """
    found = metadata.get(FIELD)
    if found is None:
        return ""
    try:
        name, value = str(found["key"]), str(found["value"])
        if len(value) != len(_BLANK) or content.count(value.encode()) != 1:
            raise ValueError
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(name))
        key.verify(bytes.fromhex(value), content.replace(value.encode(), _BLANK.encode()))
    except (KeyError, TypeError, ValueError, InvalidSignature):
        raise SignatureError("the signature does not hold: the file was changed after it was signed") from None
    return name_of(key)


def check_signer(name: str, trusted: Iterable[str]) -> None:
    """Raise SignatureError unless nothing is demanded (`trusted` is empty) or `name` is among the trusted keys."""
    known = sorted(trusted)
    if not known or name in known:
        return
    keys = ", ".join(short(key) for key in known)
    if not name:
        raise SignatureError(f"it is not signed; only bundles signed by a trusted key are loaded here ({keys})")
    raise SignatureError(f"it is signed by key {short(name)}, which is not among the trusted ones ({keys})")


def short(name: str) -> str:
    """A key's name as it is shown."""
    return name[:16]


def name_of(key: Ed25519PublicKey) -> str:
    """64 hexadecimal digits."""
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def private_key(pem: str, where: str) -> Ed25519PrivateKey:
    """The key in `pem` (newlines may be written as backslash-n). Raises SignatureError naming `where`, never the text."""
    try:
        key = serialization.load_pem_private_key(pem.replace("\\n", "\n").encode(), password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        reason = "is encrypted; give it without a password" if isinstance(error, TypeError) else "holds no private key in PEM"
        raise SignatureError(f"{where}: {reason}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{where}: must be an Ed25519 key (openssl genpkey -algorithm ed25519)")
    return key


def trusted_keys(files: str, where: str) -> frozenset[str]:
    """Names of the public keys in comma-separated PEM files; none for an empty text. Raises SignatureError naming `where`."""
    names = set()
    for file in (part.strip() for part in files.split(",")):
        if not file:
            continue
        try:
            key = serialization.load_pem_public_key(Path(file).read_bytes())
        except OSError as error:
            raise SignatureError(f"{where}: cannot read {file}: {error.strerror}") from None
        except (ValueError, UnsupportedAlgorithm):
            raise SignatureError(f"{where}: {file} holds no public key in PEM (openssl pkey -pubout)") from None
        if not isinstance(key, Ed25519PublicKey):
            raise SignatureError(f"{where}: {file} must be an Ed25519 key")
        names.add(name_of(key))
    return frozenset(names)
