"""One timer for everything that may take too long, instead of one a request.

Whoever is watched says since when it waits and how long that may last; both may change at any time,
for the price of an assignment. Not here: what becomes of whoever is late.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Final, Protocol

TICK_S: Final = 0.05
"""How late a deadline may be noticed."""


class Watched(Protocol):
    """What can be late."""

    since: float
    """`perf_counter` seconds."""
    patience_s: float

    def expired(self) -> None:
        """It is late. It is not watched any more."""


class Deadlines:
    """Owned by one event loop. Costs nothing while nobody is watched."""

    def __init__(self, tick_s: float = TICK_S) -> None:
        self._loop = asyncio.get_running_loop()
        self._tick_s = tick_s
        self._watched: set[Watched] = set()
        self._ticking = False

    def __len__(self) -> int:
        return len(self._watched)

    def watch(self, one: Watched) -> None:
        """From now on, until it is late or forgotten."""
        self._watched.add(one)
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(self._tick_s, self._tick)

    def forget(self, one: Watched) -> None:
        self._watched.discard(one)

    def _tick(self) -> None:
        now = perf_counter()
        for one in [w for w in self._watched if now - w.since > w.patience_s]:
            if one in self._watched:  # else another's end has ended it
                self._watched.discard(one)
                one.expired()
        if self._watched:
            self._loop.call_later(self._tick_s, self._tick)
        else:
            self._ticking = False
