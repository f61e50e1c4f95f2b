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
LIMIT: Final = PREFIX + "limit:"
"""Hashes of shared counters, `limit:<level>:<name>:<unit>`: what routers have taken of a limit."""
LIMIT_EPOCH: Final = LIMIT + "epoch"
"""Changes when the counters were lost, so that routers tell again what they hold."""
LIMIT_ROUTERS: Final = LIMIT + "routers"
"""Sorted set: router processes that count against limits, by when they were last heard (ms)."""
LIMIT_RECALL: Final = LIMIT + "recall"
"""Channel: the key of a counter that is out, so that routers give back what they hold unused of it."""
ENGINES_CHANNEL: Final = PREFIX + "engines"
"""Channel: msgpack EngineReport, each as its key is set."""
USAGE_STREAM: Final = PREFIX + "usage"
"""Stream of msgpack UsageRecord, field `r`; cut off behind what is in the ledger."""
USAGE_SENT: Final = PREFIX + "usage:sent"
"""Hash: journal -> the greatest seq of it that was put into the stream."""
USAGE_ACKED: Final = PREFIX + "usage:acked"
"""Hash: journal -> the greatest seq of it that is in the ledger: routers may forget those."""
LOAD_CHANNEL: Final = PREFIX + "load"


def routes(generation: int) -> str:
    """Envelope of one past generation; expires."""
    return f"{PREFIX}routes:{generation}"


def router(router_id: str) -> str:
    return f"{PREFIX}router:{router_id}"


ROUTER_PATTERN: Final = PREFIX + "router:*"


KV_FIELD: Final = "batch"
"""Of an entry of a kv stream: msgpack KvBatch."""


def kv(replica: str) -> str:
    return f"{PREFIX}kv:{replica}"


def kv_snapshot(replica: str) -> str:
    return f"{PREFIX}kv:{replica}:snapshot"


def engine(replica: str) -> str:
    return f"{PREFIX}engine:{replica}"


def usage_month(month: str) -> str:
    """Hash: tenant -> msgpack MonthToDate, of a month like 2026-11."""
    return f"{PREFIX}usage:month:{month}"


def agent(agent_id: str) -> str:
    return f"{PREFIX}agent:{agent_id}"


AGENT_PATTERN: Final = PREFIX + "agent:*"


def session(session_hash: str) -> str:
    return f"{PREFIX}session:{session_hash}"


SESSIONS_CHANNEL: Final = PREFIX + "sessions"
"""Channel: msgpack SessionBatch."""
SESSION_PATTERN: Final = PREFIX + "session:*"


def decisions(tenant: str) -> str:
    """Stream of one tenant's recorded decisions: `i` id, `d` msgpack Decision; capped, and expires."""
    return f"{PREFIX}decisions:{tenant}"


DECISIONS_PATTERN: Final = PREFIX + "decisions:*"


def budget(tenant: str, month: str, unit: str) -> str:
    """Hash of what a tenant has spent and reserved in a month (`2026-11`); unit: nano_usd, tokens."""
    return f"{PREFIX}budget:{month}:{tenant}:{unit}"


SIGNALS_CHANNEL: Final = PREFIX + "signals"
"""Channel: msgpack RouterSignals."""
