"""What engines' agents and routers tell one another, all of it rebuildable and none of it secret.

Never here: prompts, token ids, salts or keys; blocks travel as keyed 64-bit hashes.
"""

from __future__ import annotations

from typing import Final

import msgspec

VERSION: Final = 1


class Event(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Base: every event carries the version it was written in."""

    version: int = VERSION


class KvBatch(Event, frozen=True, kw_only=True):
    """One entry of the stream `kv:<replica>`: what its cache gained and lost, in order.

    Hashes are packed big-endian, 8 bytes each. A reader that sees a new epoch, or a gap in seq,
    forgets what it knew of the replica.
    """

    epoch: int
    """Changes when the engine starts."""
    seq: int
    cleared: bool = False
    """Applied first."""
    removed: bytes = b""
    """Applied second."""
    stored: bytes = b""
    """Applied last."""


class EngineReport(Event, frozen=True, kw_only=True):
    """`engine:<replica>`: what one engine says of itself."""

    replica: str
    at: float
    """Unix seconds."""
    epoch: int = 0
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """0 to 1."""
    capacity_blocks: int = 0
    block_tokens: int = 0


class LoadDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one router did to one replica since its last flush."""

    replica: str
    dispatched: int = 0
    dispatched_prefill_tokens: int = 0
    first_tokens: int = 0
    first_token_prefill_tokens: int = 0
    finished: int = 0


class LoadBatch(Event, frozen=True, kw_only=True):
    """One message of the channel `load`, at most 20 ms after the first event in it."""

    router: str
    seq: int
    deltas: tuple[LoadDelta, ...]


class UsageRecord(Event, frozen=True, kw_only=True):
    """One finished request in the stream `usage`."""

    id: str
    """Of the request; a record is counted once however often it is read."""
    tenant: str
    key: str
    function: str
    revision: str
    replica: str
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    cost_usd: float
    started_at: float
    ttft_s: float | None
    duration_s: float
    outcome: str


class RouterHeartbeat(Event, frozen=True, kw_only=True):
    """`router:<id>`, expiring: which generation a router serves, and what it still carries."""

    id: str
    at: float
    generation: int
    revision: str = ""
    in_flight: dict[str, int] = msgspec.field(default_factory=dict)
    """Replica -> requests on it; replicas without any are left out."""
    draining: bool = False
    version_text: str = ""


class SessionPin(msgspec.Struct, frozen=True, array_like=True):
    """`session:<hash>`, expiring: the replica that served a session last."""

    key: bytes
    """A keyed hash; nothing of the session's name is in it."""
    replica: str
    expires_at: float
    """Unix seconds."""


class SessionBatch(Event, frozen=True, kw_only=True):
    """One message of the channel `sessions`: what changed in one router process."""

    process: str
    """Of the sender, so that it can leave out its own."""
    pins: tuple[SessionPin, ...] = ()
    released: tuple[bytes, ...] = ()
