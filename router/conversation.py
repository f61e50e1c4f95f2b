"""Which conversation one request belongs to, as far as its function's routing asks.

Not here: what names one and what a pin is (core.sessions), or sharing pins (session_store).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from router.core.headers import ClientHeaders
from router.core.sessions import conversation_start, session_key, session_number
from router.session_store import SessionStore
from schemas.wire.routing import Function, Tenant


class Chance(Protocol):
    """The part of `random.Random` used here."""

    def getrandbits(self, k: int, /) -> int: ...


class Conversation:
    """Made for each function that a request may go to."""

    __slots__ = ("_final", "_number", "_parsed", "_store", "_ttl_s", "key")

    def __init__(
        self,
        store: SessionStore,
        function: Function,
        tenant: Tenant,
        name: bytes | None,
        headers: ClientHeaders,
        parsed: Mapping[str, Any],
    ) -> None:
        """`name`: what the client calls it. `parsed`: the request's body; empty where it is no JSON object."""
        self._store = store
        self._parsed = parsed
        self._final = headers.session_final
        self._ttl_s = function.policy.session_ttl_s if function.policy.session_affinity else 0.0
        self._number: int | None = None
        self.key = (
            None if name is None else session_key(store.secret, tenant.name, function.name, name)
        )
        """None: the client names no session."""

    @property
    def session(self) -> int | None:
        """64 bits of the session's key."""
        return None if self.key is None else session_number(self.key)

    def number(self, chance: Chance) -> int:
        """64 bits that all requests of the conversation share; drawn where nothing tells which it is."""
        if self._number is None:
            number = self.session
            if number is None:
                number = conversation_start(self._parsed)
            self._number = chance.getrandbits(64) if number is None else number
        return self._number

    def pinned(self) -> str | None:
        """The replica that served the session last."""
        if self.key is None or not self._ttl_s:
            return None
        return self._store.replica(self.key)

    def served(self, replica: str) -> None:
        """The request goes there; after its last one, nothing is remembered of a session."""
        if self.key is None or not self._ttl_s:
            return
        if self._final:
            self._store.release(self.key)
        else:
            self._store.served(self.key, replica, self._ttl_s)
