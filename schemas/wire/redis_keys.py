"""The names of everything in Redis. All of it can be rebuilt; nothing here is the only copy."""

from __future__ import annotations

from typing import Final

PREFIX: Final = "detoserve:"

ROUTES_CURRENT: Final = PREFIX + "routes:current"
"""Envelope of the current RoutingTable."""
ROUTES_CHANNEL: Final = PREFIX + "routes"
"""Channel: the new generation as decimal text, after ROUTES_CURRENT is set."""
ROUTES_GENERATION: Final = PREFIX + "routes:generation"
"""Decimal: the generation of ROUTES_CURRENT, so that a writer can compare without decoding."""
ROUTES_FRESH: Final = PREFIX + "routes:fresh"
"""Envelope of Freshness."""
LEASE: Final = PREFIX + "lease"
"""Hash: holder, generation; expires with the lease."""
LEASE_GENERATION: Final = PREFIX + "lease:generation"
"""Counter that outlives any one lease: the fencing generation."""
ROUTERS_CHANNEL: Final = PREFIX + "routers"
"""Channel: msgpack RouterHeartbeat whenever a router changes generation or finishes draining."""
USAGE_STREAM: Final = PREFIX + "usage"
LOAD_CHANNEL: Final = PREFIX + "load"


def routes(generation: int) -> str:
    """Envelope of one past generation; expires."""
    return f"{PREFIX}routes:{generation}"


def router(router_id: str) -> str:
    return f"{PREFIX}router:{router_id}"


ROUTER_PATTERN: Final = PREFIX + "router:*"


def kv(replica: str) -> str:
    return f"{PREFIX}kv:{replica}"


def kv_snapshot(replica: str) -> str:
    return f"{PREFIX}kv:{replica}:snapshot"


def engine(replica: str) -> str:
    return f"{PREFIX}engine:{replica}"


def session(session_hash: str) -> str:
    return f"{PREFIX}session:{session_hash}"


SESSIONS_CHANNEL: Final = PREFIX + "sessions"
"""Channel: msgpack SessionBatch."""
SESSION_PATTERN: Final = PREFIX + "session:*"


def decisions(tenant: str) -> str:
    """Stream of one tenant's recorded decisions: `i` id, `d` msgpack Decision; capped, and expires."""
    return f"{PREFIX}decisions:{tenant}"


DECISIONS_PATTERN: Final = PREFIX + "decisions:*"
