"""One timer for everything that may take too long, instead of one a request.

Whoever is watched says since when it waits and how long that may last; both may change at any time,
for the price of an assignment. Not here: what becomes of whoever is late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Final, Protocol

TICK_S: Final = 0.05
"""How late a deadline may be noticed."""
SWEEP_S: Final = 1.0
"""How late where it was put forward: who has long to go is looked at less often."""


class Watched(Protocol):
    """What can be late."""

    since: float
    """`perf_counter` seconds."""
    patience_s: float

    def expired(self) -> None:
        """It is late. It is not watched any more."""


class Timers(Protocol):
    """Of an event loop."""

    def call_later(self, delay: float, callback: Callable[[], object], /) -> object:
        """Calls back once, in so many seconds."""


class Deadlines:
    """Owned by one event loop, by default the running one.

    Costs nothing while nobody is watched, and little for those who have long to go.
    """

    def __init__(
        self,
        tick_s: float = TICK_S,
        *,
        loop: Timers | None = None,
        now: Callable[[], float] = perf_counter,
    ) -> None:
        self._loop = loop or asyncio.get_running_loop()
        self._now = now
        self._tick_s = tick_s
        self._near: set[Watched] = set()
        """Looked at with each tick: those that may soon be late, or were not looked at yet."""
        self._far: set[Watched] = set()
        self._sweep_at = 0.0
        self._ticking = False

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    def watch(self, one: Watched) -> None:
        """From now on, until it is late or forgotten."""
        self._near.add(one)
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(self._tick_s, self._tick)

    def forget(self, one: Watched) -> None:
        self._near.discard(one)
        self._far.discard(one)

    def _tick(self) -> None:
        now = self._now()
        near, far = self._near, self._far
        soon = now + 2 * SWEEP_S
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_S
            near |= {one for one in far if one.since + one.patience_s < soon}
            far -= near
        later = {one for one in near if one.since + one.patience_s >= soon}
        near -= later
        far |= later
        for one in [one for one in near if now - one.since > one.patience_s]:
            if one in near:  # else another's end has ended it
                near.discard(one)
                one.expired()
        if near or far:
            self._loop.call_later(self._tick_s, self._tick)
        else:
            self._ticking = False
