"""Python's collector of reference cycles, kept from holding up streams.

Requests leave it nothing, and what libraries leave is mostly found while it is young. That is looked
at often, for it takes a fifth of a millisecond each time; to look through all that is old takes tens
where a thousand streams run. By itself Python would do that while they begin. Here it is done when
nothing runs, or where that is never so, now and then. Not here: memory that is kept on purpose.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Final

MIDDLE_S: Final = 30.0
"""Between two looks at what outlived one look and no more: it takes some milliseconds."""
IDLE_S: Final = 60.0
"""Between two looks at everything where nothing runs."""
BUSY_S: Final = 900.0
"""Between two looks at everything in any case."""
_ALLOCATIONS: Final = 1_000
"""So many more objects than went are looked at in one go; every stream has some twenty while it runs."""
_NEVER: Final = 2**30


def calm() -> None:
    """Once, before the event loop: what is there now stays, and `OldGarbage` alone looks at what is old."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, _NEVER, _NEVER)


class OldGarbage:
    """Ask it now and then. `now` is a monotonic clock's."""

    def __init__(self, now: float, collect: Callable[[int], object] = gc.collect) -> None:
        self._collect = collect
        self._all_at = self._middle_at = now

    def look(self, now: float, *, idle: bool) -> None:
        """Collects what is old, if it is time to."""
        if now - self._all_at >= (IDLE_S if idle else BUSY_S):
            self._collect(2)
            self._all_at = self._middle_at = now
        elif now - self._middle_at >= MIDDLE_S:
            self._collect(1)
            self._middle_at = now
