"""What computing a prompt on a replica costs besides time: what its new blocks push out of the cache.

Where requests go by time alone, an idle fleet sends all to its nearest replica. Its cache turns over
while the others' stand empty, and prompts that one cache as large as all would still hold are gone. So
prefill counts for more where more has been stored of late than elsewhere, for its room. An empty cache
has nothing to lose, and what is cached already pushes out nothing: only what must be computed is
dearer. Not here: how dear prefill is for the time it takes (score).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import exp
from typing import Final

from router.core.index import PrefixIndex

DEARER: Final = 0.7
"""How much dearer prefill is where as much is stored as on average, and the cache is full."""
FULL: Final = 0.25
"""Of its room: beyond it a cache counts as full. Room is often not known, and then taken for large."""
WINDOW: Final = 1.0
"""What was stored is forgotten after so many times what the fleet has room for."""


@dataclass(slots=True)
class Turnover:
    """Replicas of one function, by slot."""

    _seen: dict[int, int] = field(default_factory=dict)
    _stored: dict[int, float] = field(default_factory=dict)

    def remove(self, slot: int) -> None:
        self._seen.pop(slot, None)
        self._stored.pop(slot, None)

    def dearer(self, index: PrefixIndex, slots: Iterable[int]) -> dict[int, float]:
        """By how many times prefill counts for more on each, after what was stored since the last call."""
        room = {slot: float(index.capacity(slot)) for slot in slots}
        new = {slot: index.inserted(slot) for slot in room}
        stored = {
            slot: self._stored.get(slot, 0.0) + count - self._seen.get(slot, count)
            for slot, count in new.items()
        }
        fresh = sum(count - self._seen.get(slot, count) for slot, count in new.items())
        keep = exp(-fresh / (WINDOW * sum(room.values()))) if room else 1.0
        self._seen = new
        self._stored = {slot: blocks * keep for slot, blocks in stored.items()}
        rate = {slot: blocks / room[slot] for slot, blocks in self._stored.items()}
        average = sum(rate.values()) / len(rate) if rate else 0.0
        if not average:
            return dict.fromkeys(room, 1.0)
        return {
            slot: 1
            + DEARER * min(1.0, index.held(slot) / (FULL * room[slot])) * rate[slot] / average
            for slot in room
        }
