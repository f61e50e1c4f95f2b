"""Whether a POST is an agent's own, new, and about its own cluster. Pure; time is passed in.

The routing table says by SHA-256 which key counts for a cluster; the keys themselves are given to routers as secrets.
What is wrong is told only to somebody who has a key: to others every refusal is the same. Not here:
what the reports do (engine_reports), or HTTP (fleet.agent_listener).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Final

from schemas.wire import agent_signature
from schemas.wire.routing import RoutingTable

MAX_NONCES: Final = 100_000
NOT_AUTHENTICATED: Final = "not authenticated"
_NONCE_LENGTH: Final = 32
_NOBODY: Final = bytes(32)
"""Signatures are checked with it where there is no key, so that refusals take the same time."""


class AgentRefused(Exception):
    """The POST counts for nothing; says why, for its sender."""


class AgentKeys:
    """The keys that routers were given, by their SHA-256."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._keys = {hashlib.sha256(key).hexdigest(): key for key in keys}

    def of(self, cluster: str, table: RoutingTable) -> bytes | None:
        """The key that counts for a cluster now."""
        named = next((c.agent_key_sha256 for c in table.clusters if c.name == cluster), "")
        return self._keys.get(named) if named else None


class AgentGate:
    """Lets every signed POST through once."""

    def __init__(self, keys: AgentKeys) -> None:
        self._keys = keys
        self._seen: dict[str, float] = {}
        """Nonce -> when it may be forgotten, in Unix seconds; in the order in which they came."""

    def check(
        self, headers: Mapping[str, str], body: bytes, table: RoutingTable, now_unix_s: float
    ) -> str:
        """The cluster whose agent sent it. `headers`: with names in lower case.

        Raises:
            AgentRefused: it is not signed by that cluster's key, too old, or was here before.
        """
        cluster = headers.get(agent_signature.CLUSTER_HEADER, "")
        timestamp = headers.get(agent_signature.TIMESTAMP_HEADER, "")
        nonce = headers.get(agent_signature.NONCE_HEADER, "")
        key = self._keys.of(cluster, table)
        signed = agent_signature.verify(
            key or _NOBODY,
            headers.get(agent_signature.SIGNATURE_HEADER, ""),
            cluster=cluster,
            timestamp=timestamp,
            nonce=nonce,
            body=body,
        )
        if key is None or not signed:
            raise AgentRefused(NOT_AUTHENTICATED)
        try:
            off_s = float(timestamp) - now_unix_s
        except ValueError:
            off_s = float("nan")
        if not abs(off_s) <= agent_signature.WINDOW_S:
            raise AgentRefused(
                f"the clocks of agent and router are more than {agent_signature.WINDOW_S:g} s apart"
            )
        if len(nonce) != _NONCE_LENGTH:
            raise AgentRefused(f"a nonce has {_NONCE_LENGTH} characters")
        self._forget(now_unix_s)
        if nonce in self._seen:
            raise AgentRefused("it was sent before")
        if len(self._seen) >= MAX_NONCES:
            raise AgentRefused("too many posts at once")
        self._seen[nonce] = now_unix_s + 2 * agent_signature.WINDOW_S
        return cluster

    def _forget(self, now_unix_s: float) -> None:
        while self._seen:
            oldest = next(iter(self._seen))
            if self._seen[oldest] > now_unix_s:
                return
            del self._seen[oldest]


def replicas_of(table: RoutingTable, cluster: str) -> dict[str, str]:
    """Id -> base URL of a cluster's replicas: those an agent of it may speak of."""
    return {
        replica.id: replica.url
        for function in table.functions
        for arm in function.arms
        if arm.cluster == cluster
        for replica in arm.replicas
    }
