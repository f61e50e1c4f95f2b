"""What engines' agents and routers tell one another, all of it rebuildable and none of it secret.

Never here: prompts, token ids, salts or keys; blocks travel as keyed 64-bit hashes.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

VERSION: Final = 1


class Event(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Base: every event carries the version it was written in."""

    version: int = VERSION


class KvBatch(Event, frozen=True, kw_only=True):
    """One entry of the stream `kv:<replica>`: what its cache gained and lost, in order.

    Hashes are packed big-endian, 8 bytes each (token_blocks). A reader that sees a new epoch, or a
    gap in seq, forgets what it knew of the replica. `kv:<replica>:snapshot` has the same form: all
    that was held after the batch of that number.
    """

    epoch: int
    """Changes when the engine starts."""
    seq: int
    """Grows by one from batch to batch; from 0 in each epoch."""
    cleared: bool = False
    """Applied first."""
    removed: bytes = b""
    """Applied second."""
    stored: bytes = b""
    """Applied last; a block comes after those before it in its chain."""


class EngineReport(Event, frozen=True, kw_only=True):
    """`engine:<replica>`, expiring, and the channel `engines`: what one engine says of itself.

    Counters are of this epoch. A reader that sees another (epoch, clears) forgets what it thought
    the replica holds.
    """

    replica: str
    at: float
    """Unix seconds; a reader believes none that is not newer than the last."""
    agent: str = ""
    """Who says so: two agents that follow one engine would contradict one another."""
    epoch: int = 0
    """Changes when the engine starts; 0: nobody can tell."""
    clears: int = 0
    """How often the engine emptied its cache, or events were lost that nobody can replay."""
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """0 to 1: the share that running requests hold."""
    capacity_blocks: int = 0
    """0: not known."""
    block_tokens: int = 0
    events: bool = False
    """Whether the counters below are kept from the engine's own KV events."""
    stored_tokens: int = 0
    """That its cache took in."""
    removed_tokens: int = 0
    """That it gave up to make room."""


class AgentHeartbeat(Event, frozen=True, kw_only=True):
    """`agent:<id>`, expiring: which engines an agent follows, and what it cannot."""

    id: str
    at: float
    cluster: str = ""
    """Empty: it follows engines of every cluster."""
    replicas: tuple[str, ...] = ()
    problems: dict[str, str] = msgspec.field(default_factory=dict)
    """Replica -> what is wrong, for people."""
    version_text: str = ""


class AgentPost(Event, frozen=True, kw_only=True):
    """The body of one POST of an agent that has no Redis. Its cluster stands in the headers."""

    heartbeat: AgentHeartbeat
    reports: tuple[EngineReport, ...] = ()


class AgentAnswer(Event, frozen=True, kw_only=True):
    """What it gets back: the replicas of its cluster, and those of its words that count for nothing."""

    replicas: dict[str, str] = msgspec.field(default_factory=dict)
    """Id -> base URL as routers know it."""
    refused: dict[str, str] = msgspec.field(default_factory=dict)
    """Replica -> why."""


class ReplicaLoad(msgspec.Struct, frozen=True, array_like=True):
    """What one router has on one replica when it says so. Ages are in seconds; below 0: never."""

    replica: str
    requests: int = 0
    work_s: float = 0.0
    """Prefill that is not at its first token, whole."""
    kv_tokens: float = 0.0
    oldest_age_s: float = -1.0
    """Since the oldest of that prefill was sent."""
    oldest_work_s: float = 0.0
    departed_age_s: float = -1.0
    """Since the last before it came to its first token."""


class Cached(msgspec.Struct, frozen=True, array_like=True):
    """A chain of blocks that a replica was sent, and so holds: keyed hashes, no prompt."""

    replica: str
    blocks: bytes
    """8 bytes each, little-endian, from the chain's first block on."""


class PrefillSample(msgspec.Struct, frozen=True, array_like=True):
    """How long a replica took over one prefill of so many tokens, so many of them cached."""

    replica: str
    cached: float
    tokens: float
    prefill_s: float


class LoadBatch(Event, frozen=True, kw_only=True):
    """One message of the channel `load`: what a router did since its last, or has in all.

    Loads are whole amounts, not differences: whoever misses a message is right again with the next.
    """

    router: str
    """One router process, from its start to its end."""
    seq: int
    """Grows by one with each message."""
    full: bool = False
    """Whether replicas that are not named have nothing from this router."""
    to: str = ""
    """The only router that it is for; empty: all."""
    loads: tuple[ReplicaLoad, ...] = ()
    cached: tuple[Cached, ...] = ()
    samples: tuple[PrefillSample, ...] = ()


class UsageRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One finished request in the stream `usage`, under the field `r`. No prompt, no key itself.

    A router numbers what it writes: whoever counts records keeps the greatest `seq` of every
    journal, and so counts each once however often it is sent. Without names and made by place, unlike
    other events: there is one for every request. New fields go to the end. Read it with `usage_record`.
    """

    journal: str
    """One router process, from its start to its end."""
    seq: int
    """Grows by one from 1 within the journal."""
    id: str
    """Of the request, as in `x-request-id`; a client may have chosen it, and twice."""
    tenant: str
    key: str
    """Its public id."""
    function: str
    revision: str
    """Commit of the config repo whose price holds."""
    started_at: float
    """Unix seconds; the ledger's day is that of its end."""
    replica: str = ""
    input_tokens: int = 0
    """The cached ones are among them."""
    cached_tokens: int = 0
    output_tokens: int = 0
    cost_nano_usd: int = 0
    """Billionths of a USD."""
    estimated: bool = False
    """The engine did not say; the router counted."""
    ttft_s: float | None = None
    duration_s: float = 0.0
    outcome: str = "ok"
    version: int = VERSION


_decode_usage_record: Final = msgspec.msgpack.Decoder(UsageRecord).decode
_DEFAULTS: Final = dict(
    zip(
        reversed(UsageRecord.__struct_fields__),
        reversed(UsageRecord.__struct_defaults__),
        strict=False,
    )
)
_NAMED: Final = frozenset({*range(0x80, 0x90), 0xDE})
"""First bytes of MessagePack's maps."""


def usage_record(data: bytes) -> UsageRecord:
    """The record in these bytes; also of a router that wrote names beside the values, as they once did.

    Raises:
        msgspec.DecodeError, UnicodeDecodeError: it is none.
    """
    if data and data[0] in _NAMED:
        said = _DEFAULTS | msgspec.msgpack.decode(data, type=dict[str, Any])
        return msgspec.convert(
            [said.get(name) for name in UsageRecord.__struct_fields__], UsageRecord
        )
    return _decode_usage_record(data)


class MonthToDate(Event, frozen=True, kw_only=True):
    """`usage:month:<YYYY-MM>`, a hash by tenant: what the ledger in Git has counted."""

    requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost_nano_usd: int = 0


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
