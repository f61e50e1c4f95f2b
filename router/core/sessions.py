"""Conversations: what names one, and which replica served it last.

A session's name comes from the client and is never kept: it counts only as a keyed hash, together
with its tenant and function, so that nobody can ask after another's. A pin is a hint for the score
and a rule for the policy `session`; it moves with the session's requests. Pure: time is passed in.
Not here: telling other processes (session_store), or what a pin is worth (score).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final

from xxhash import xxh3_64_intdigest

KEY_BYTES: Final = 16
_FIELDS: Final = ("prompt_cache_key", "safety_identifier", "user")
_NAMING: Final = frozenset({*_FIELDS, "metadata"})
_PROMPT_CHARS: Final = 1024
"""Of a bare prompt, by which its continuations are known."""


def session_name(header: bytes | None, request: Mapping[str, Any]) -> bytes | None:
    """What the client calls this conversation; None: nothing.

    `X-Session-ID` first, then the fields of OpenAI's and Anthropic's APIs by which providers keep
    requests together. `request` is the parsed body.
    """
    if header:
        return header
    if _NAMING.isdisjoint(request):
        return None
    for name in _FIELDS:
        value = request.get(name)
        if isinstance(value, str) and value:
            return value.encode("utf-8", "surrogatepass")
    metadata = request.get("metadata")
    value = metadata.get("user_id") if isinstance(metadata, dict) else None
    if isinstance(value, str) and value:
        return value.encode("utf-8", "surrogatepass")
    return None


def session_key(secret: bytes, tenant: str, function: str, name: bytes) -> bytes:
    """What a session is known by everywhere: 16 bytes. `secret` is what routers share, up to 64 bytes."""
    hashed = _begun(secret, tenant, function).copy()
    hashed.update(name)
    return hashed.digest()


@lru_cache(maxsize=4096)
def _begun(secret: bytes, tenant: str, function: str) -> blake2b:
    # Names of tenants and functions hold no NUL, and the session's stands last: no two run together.
    text = b"%b\0%b\0" % (tenant.encode(), function.encode())
    return blake2b(text, key=secret, digest_size=KEY_BYTES)


def session_number(key: bytes) -> int:
    """64 bits of a session's key, for hashing it to an arm or a replica."""
    return int.from_bytes(key[:8], "big")


def conversation_start(request: Mapping[str, Any]) -> int | None:
    """A hash of what every request of one conversation begins with; None: there is no such thing.

    The system prompt and the first message of the user; the system prompt alone may be everybody's.
    """
    messages = request.get("messages")
    if messages is None:
        messages = request.get("input")
    parts: list[str] = [
        repr(request[name]) for name in ("system", "instructions") if name in request
    ]
    if isinstance(messages, list):
        for message in messages:
            parts.append(repr(message))
            if isinstance(message, dict) and message.get("role") == "user":
                break
    elif isinstance(messages, str):
        parts.append(messages[:_PROMPT_CHARS])
    prompt = request.get("prompt")
    if isinstance(prompt, list):
        prompt = repr(prompt[:_PROMPT_CHARS])
    if isinstance(prompt, str):
        parts.append(prompt[:_PROMPT_CHARS])
    if not parts:
        return None
    return xxh3_64_intdigest("\0".join(parts).encode("utf-8", "surrogatepass"))


class Pin:
    """Where a session was last, and until when that counts (Unix seconds)."""

    __slots__ = ("expires_at", "replica", "told_until")

    def __init__(self, replica: str, expires_at: float, told_until: float) -> None:
        self.replica = replica
        self.expires_at = expires_at
        self.told_until = told_until
        """What other processes know."""


@dataclass(slots=True)
class Pins:
    """All pins of one process; the longest unused go first when there are too many."""

    limit: int
    moved: int = 0
    """Pins that went to another replica."""
    evicted: int = 0
    """Pins that gave way before their time."""
    _pins: dict[bytes, Pin] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._pins)

    def replica(self, key: bytes, now: float) -> str | None:
        """The replica that served the session last. It may be gone since."""
        pin = self._pins.get(key)
        return pin.replica if pin is not None and pin.expires_at > now else None

    def served(self, key: bytes, replica: str, now: float, ttl_s: float) -> bool:
        """A request of the session goes there. True when others should be told of it.

        Not at every request: that it is new or has moved, and else at every half of its life.
        """
        pin = self._pins.pop(key, None)
        expires_at = now + ttl_s
        if pin is None:
            self._keep(key, Pin(replica, expires_at, expires_at))
            return True
        self._pins[key] = pin
        pin.expires_at = expires_at
        if pin.replica != replica:
            pin.replica = replica
            self.moved += 1
        elif pin.told_until > now + ttl_s / 2:
            return False
        pin.told_until = expires_at
        return True

    def heard(self, key: bytes, replica: str, expires_at: float) -> None:
        """Another process says so. The later word counts."""
        pin = self._pins.get(key)
        if pin is not None and pin.expires_at > expires_at:
            return
        self._pins.pop(key, None)
        self._keep(key, Pin(replica, expires_at, expires_at))

    def release(self, key: bytes) -> bool:
        """The session is over. False: nothing was known of it."""
        return self._pins.pop(key, None) is not None

    def sweep(self, now: float) -> None:
        """Drops those at the old end that have expired."""
        while self._pins:
            oldest = next(iter(self._pins))
            if self._pins[oldest].expires_at > now:
                return
            del self._pins[oldest]

    def _keep(self, key: bytes, pin: Pin) -> None:
        self._pins[key] = pin
        if len(self._pins) > self.limit:
            del self._pins[next(iter(self._pins))]
            self.evicted += 1
