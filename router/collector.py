"""Python's collector of reference cycles, kept from holding up streams.

Requests leave it nothing, and what libraries leave is found while it is young. To look through all
that is old takes tens of milliseconds where a thousand streams run, and by itself it is done while
they begin. Here it is done when nothing runs, or where that is never so, now and then. Not here:
memory that is kept on purpose.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Final

IDLE_S: Final = 60.0
"""Between two looks where nothing runs."""
BUSY_S: Final = 900.0
"""Between two looks in any case."""
_ALLOCATIONS: Final = 25_000
"""By default it looks at what is young after every thirty requests or so."""
_NEVER: Final = 2**30


def calm() -> None:
    """Once, before the event loop: what is there now stays, and what is old is only looked at by `OldGarbage`."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, 10, _NEVER)


class OldGarbage:
    """Ask it now and then. `now` is a monotonic clock's."""

    def __init__(self, now: float, collect: Callable[[], object] = gc.collect) -> None:
        self._collect = collect
        self._collected_at = now

    def look(self, now: float, *, idle: bool) -> None:
        """Collects what is old, if it is time to."""
        if now - self._collected_at >= (IDLE_S if idle else BUSY_S):
            self._collect()
            self._collected_at = now
