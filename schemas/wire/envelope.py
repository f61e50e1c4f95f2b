"""Signed and versioned bytes: `[1, purpose, payload, Ed25519 signature]` in msgpack.

The signature covers purpose and payload, so that bytes signed for one use prove nothing for another.
Not here: what the payload says (routing, events), or where keys are kept.
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from schemas.wire.routing import VERSION, Freshness, RoutingTable

ENVELOPE_VERSION: Final = 1
MAX_PAYLOAD_BYTES: Final = 256 * 2**20

# What decoding hostile bytes raises: msgspec leaves bad UTF-8 and endless nesting to Python.
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

T = TypeVar("T", RoutingTable, Freshness)


class EnvelopeInvalid(ValueError):
    """Not signed by the expected key, not well-formed, or of a version this program does not know."""


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    version: int
    purpose: str
    payload: bytes
    signature: bytes


def _purpose(kind: type[RoutingTable | Freshness]) -> str:
    return f"detoserve/{kind.__name__}"


def seal(message: RoutingTable | Freshness, key: Ed25519PrivateKey) -> bytes:
    """Signed bytes of a message."""
    payload = msgspec.msgpack.encode(message)
    purpose = _purpose(type(message))
    signature = key.sign(purpose.encode() + b"\0" + payload)
    return msgspec.msgpack.encode(_Envelope(ENVELOPE_VERSION, purpose, payload, signature))


def unseal(data: bytes, kind: type[T], key: Ed25519PublicKey) -> T:
    """The message, if `key` signed it for this use.

    Raises:
        EnvelopeInvalid: for anything else; nothing of the payload has been believed then.
    """
    try:
        envelope = msgspec.msgpack.decode(data, type=_Envelope)
    except _UNREADABLE as error:
        raise EnvelopeInvalid(f"not an envelope: {error}") from None
    if envelope.version != ENVELOPE_VERSION:
        raise EnvelopeInvalid(
            f"envelope version {envelope.version}, this program reads {ENVELOPE_VERSION}"
        )
    if envelope.purpose != _purpose(kind):
        raise EnvelopeInvalid(f"sealed as {envelope.purpose!r}, wanted {_purpose(kind)!r}")
    if len(envelope.payload) > MAX_PAYLOAD_BYTES:
        raise EnvelopeInvalid(f"payload of {len(envelope.payload)} bytes is over the cap")
    try:
        key.verify(envelope.signature, envelope.purpose.encode() + b"\0" + envelope.payload)
    except InvalidSignature:
        raise EnvelopeInvalid("the signature is not the reconciler's") from None
    try:
        message = msgspec.msgpack.decode(envelope.payload, type=kind)
    except _UNREADABLE as error:
        raise EnvelopeInvalid(f"signed, but not a {kind.__name__}: {error}") from None
    if message.version != VERSION:
        raise EnvelopeInvalid(
            f"{kind.__name__} version {message.version}, this program reads {VERSION}"
        )
    return message


def public_key_hex(key: Ed25519PrivateKey) -> str:
    """What routers are given: 64 hex characters."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def public_key_from_hex(text: str) -> Ed25519PublicKey:
    """The verifying half.

    Raises:
        ValueError: when it is not 64 hex characters.
    """
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text.strip()))
    except ValueError:
        raise ValueError(
            "a routes public key is 64 hex characters, as `detoserve up` prints it"
        ) from None
