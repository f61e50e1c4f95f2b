"""How many requests each replica carries from this process: counted before dispatch, on every path.

A slot is a context manager, so that no way out of a request can forget it. Not here: what other
routers carry (shared load), or the decision made from it (core.pick).
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Slot:
    """One request's place: on a replica, or (replica None) in the process."""

    __slots__ = ("_in_flight", "_replica")

    def __init__(self, in_flight: InFlight, replica: str | None) -> None:
        self._in_flight = in_flight
        self._replica = replica

    def __enter__(self) -> None:
        load = self._in_flight
        if self._replica is None:
            load.total += 1
        else:
            load.by_replica[self._replica] = load.by_replica.get(self._replica, 0) + 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        load = self._in_flight
        if self._replica is None:
            load.total -= 1
            return
        left = load.by_replica[self._replica] - 1
        if left:
            load.by_replica[self._replica] = left
        else:
            # Gone, not zero: replicas come and go, and the map must not remember them all.
            del load.by_replica[self._replica]
            if load.on_idle is not None:
                load.on_idle(self._replica)


class InFlight:
    """The counters. `on_idle` hears of a replica whose last request has ended."""

    def __init__(self) -> None:
        self.total = 0
        self.by_replica: dict[str, int] = {}
        self.on_idle: Callable[[str], None] | None = None

    def request(self) -> Slot:
        return Slot(self, None)

    def slot(self, replica: str) -> Slot:
        return Slot(self, replica)
