"""How many requests each replica carries from this process: counted before dispatch, on every path.

Not here: what other routers carry (shared load), or the decision made from it (core.pick). Who counts
gives back: `exchange` does both in one place each.
"""

from __future__ import annotations

from collections.abc import Callable


class InFlight:
    """The counters. `on_idle` hears of a replica whose last request has ended."""

    def __init__(self) -> None:
        self.total = 0
        """Requests in this process."""
        self.by_replica: dict[str, int] = {}
        self.on_idle: Callable[[str], None] | None = None

    def sent(self, replica: str) -> None:
        """One more on this replica."""
        self.by_replica[replica] = self.by_replica.get(replica, 0) + 1

    def ended(self, replica: str) -> None:
        """One less."""
        left = self.by_replica[replica] - 1
        if left:
            self.by_replica[replica] = left
            return
        # Gone, not zero: replicas come and go, and the map must not remember them all.
        del self.by_replica[replica]
        if self.on_idle is not None:
            self.on_idle(replica)
