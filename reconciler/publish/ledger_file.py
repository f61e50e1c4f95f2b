"""The ledger's documents as signed YAML.

The signature is the routing tables' Ed25519 key's, over the document's content as canonical JSON, so
that a total can be checked wherever the file has gone. Not here: what the documents say (core.ledger).
"""

from __future__ import annotations

import json
from typing import Any, Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from reconciler.publish.status_yaml import parse_document, render_document

_PURPOSE: Final = b"detoserve/usage\0"
_SIGNATURE: Final = "signature"


class Opened(NamedTuple):
    """A document without its signature."""

    document: Any
    signed: bool
    """By the key that was asked for."""


def _signed_bytes(document: dict[str, Any]) -> bytes:
    return _PURPOSE + json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def seal_document(document: dict[str, Any], key: Ed25519PrivateKey) -> bytes:
    """YAML whose last line is the signature, in hex."""
    signature = key.sign(_signed_bytes(document)).hex()
    return render_document({**document, _SIGNATURE: signature})


def open_document(data: bytes, key: Ed25519PublicKey | None) -> Opened:
    """The document in some YAML; None as document where it is no mapping."""
    document = parse_document(data)
    if not isinstance(document, dict):
        return Opened(None, signed=False)
    signature = document.pop(_SIGNATURE, None)
    if key is None or not isinstance(signature, str):
        return Opened(document, signed=False)
    try:
        key.verify(bytes.fromhex(signature), _signed_bytes(document))
    except (InvalidSignature, ValueError):
        return Opened(document, signed=False)
    return Opened(document, signed=True)
