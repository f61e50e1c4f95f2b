"""What is to be published, gathered until the publisher takes it.

Bounded: while nothing can be published, newer reports take the place of older ones, and batches
that do not fit are dropped; their readers see a gap in the numbers. Not here: the way out (publishing).
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Final

from schemas.wire.events import EngineReport, KvBatch

MAX_BATCHES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Parcel:
    """What goes out together."""

    reports: tuple[EngineReport, ...] = ()
    batches: tuple[tuple[str, KvBatch], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reports or self.batches)


class Outbox:
    def __init__(self, max_batches: int = MAX_BATCHES) -> None:
        self._reports: dict[str, EngineReport] = {}
        self._batches: deque[tuple[str, KvBatch]] = deque(maxlen=max_batches)
        self._filled = asyncio.Event()

    def report(self, report: EngineReport) -> None:
        self._reports[report.replica] = report
        self._filled.set()

    def batch(self, replica: str, batch: KvBatch) -> None:
        self._batches.append((replica, batch))
        self._filled.set()

    async def filled(self) -> None:
        """Returns when there is something to take."""
        await self._filled.wait()

    def take(self) -> Parcel:
        parcel = Parcel(tuple(self._reports.values()), tuple(self._batches))
        self._reports.clear()
        self._batches.clear()
        self._filled.clear()
        return parcel

    def give_back(self, parcel: Parcel) -> None:
        """It could not be published: what is newer stays, the rest waits for the next turn."""
        for report in parcel.reports:
            self._reports.setdefault(report.replica, report)
        room = (self._batches.maxlen or 0) - len(self._batches)
        if room > 0:
            self._batches.extendleft(reversed(parcel.batches[-room:]))
        if parcel:
            self._filled.set()
