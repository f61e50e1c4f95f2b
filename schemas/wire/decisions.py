"""Why a request went where it went: what was known of every candidate when it was decided.

Numbers and names only, enough to decide again by another rule: times are in seconds, prompts are
hashes that continue one another. Never here: prompts, token ids, sessions' names or keys.
"""

from __future__ import annotations

from typing import Final

import msgspec

from schemas.wire.events import Event
from schemas.wire.routing import Weights

CHAIN_STRIDE: Final = 4
"""Of the blocks a prompt is cut into, every so many leave their hash in `Decision.chain`."""


class Considered(msgspec.Struct, frozen=True, array_like=True):
    """One candidate."""

    replica: str
    deployment: str
    cluster: str
    rtt_s: float
    """Network round trip."""
    slow: float
    """At least 1: how much longer prefill took there just then than its speed says."""
    factor: float
    """How many times the fleet's prefill time its prefill counted as."""
    backlog_s: float
    """Prefill queued before this request."""
    kv_used: float
    """0 to 1."""
    requests: int
    """On it, this one not counted."""
    cached_tokens: float
    """That it was thought to hold of the prompt."""
    speed: float = 0.0
    """How many times the fleet's prefill time it needs; less than `factor` where its cache turns over
    fast. 0: as `factor` says."""


class Removed(msgspec.Struct, frozen=True, array_like=True):
    """One replica of the function that was no candidate."""

    replica: str
    reason: str


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What became of the request."""

    status: int
    outcome: str
    attempts: int = 1
    replica: str = ""
    """That answered; another than the chosen one after a retry."""
    ttft_s: float | None = None
    """To the first bytes of the answer's body."""
    duration_s: float = 0.0
    input_tokens: int | None = None
    cached_tokens: int | None = None
    """By the engine's own count."""
    output_tokens: int | None = None


class Decision(Event, frozen=True, kw_only=True):
    """The choice of a replica for one attempt. `outcome` is missing while the request runs."""

    id: str
    """As in `x-detoserve-route`."""
    at: float
    """Unix seconds."""
    router: str
    tenant: str
    function: str
    operation: str
    generation: int
    """Of the routing table."""
    revision: str
    """Commit that the table was compiled from."""
    policy_since: str = ""
    """Commit that set the policy."""
    policy: str
    weights: Weights = Weights()
    chosen: str
    candidates: tuple[Considered, ...]
    removed: tuple[Removed, ...] = ()
    pinned: str = ""
    """The replica that served the session before."""
    session: int | None = None
    """64 bits of a keyed hash."""
    turn: int = 0
    """Requests of the function before this one, in this process."""
    tokens: float = 0.0
    """Of the prompt, estimated."""
    block_tokens: float = 0.0
    chain: bytes = b""
    """Hashes of the prompt after every CHAIN_STRIDE blocks, 8 bytes each, big-endian."""
    p: float = 0.0
    """Seconds a token of prefill."""
    q: float = 0.0
    """Seconds a square token of prefill."""
    attempt: int = 1
    """Above 1: after earlier ones had failed."""
    forced: bool = False
    """A person chose the replica."""
    skipped: int = 0
    """Requests that this process sent before this one and recorded nothing of."""
    outcome: Outcome | None = None
