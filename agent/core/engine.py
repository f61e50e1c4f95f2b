"""One engine as its agent knows it: which process, what it holds, what it says of its load.

Turns readings and changes of its caches into what is published. A new process, an emptied cache and
lost events all show as another (epoch, clears), upon which readers forget. Not here: how any of it
was learned (engine_link, kv_source).
"""

from __future__ import annotations

from agent.core.cache import Cache, Change
from agent.core.metrics import Reading
from schemas.wire.events import EngineReport, KvBatch
from schemas.wire.token_blocks import pack


class EngineState:
    """Time is passed in, in Unix seconds."""

    def __init__(self, replica: str, now: float, *, agent: str = "") -> None:
        self.replica = replica
        self._agent = agent
        self.epoch = int(now * 1000)
        self._clears = 0
        self._started_at = 0.0
        self._reading = Reading()
        self._caches: dict[str, Cache] = {}
        self._next_batch = 0
        self._stored_tokens = 0
        self._removed_tokens = 0
        self.hears_events = False
        """Whether every event of its publishers arrives just now."""

    def add_cache(self, source: str, cache: Cache) -> None:
        """One publisher's cache; an engine has one for each data-parallel rank."""
        self._caches[source] = cache

    def remove_caches(self) -> None:
        self._caches.clear()

    def read(self, reading: Reading) -> bool:
        """A look at its metrics. True when they show that it is another process than before."""
        self._reading = reading
        known = self._started_at
        # Never back: several processes may answer by turns, and none of them is a new one then.
        if reading.started_at <= known:
            return False
        self._started_at = reading.started_at
        self._begin(int(reading.started_at * 1000))
        return bool(known)

    def restarted(self, now: float) -> None:
        """Its events show that it is another process, though its metrics do not say since when."""
        self._begin(int(now * 1000))

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self._clears = self._next_batch = 0
        self._stored_tokens = self._removed_tokens = 0
        for cache in self._caches.values():
            cache.forget()

    def lost(self) -> KvBatch:
        """Nobody knows any more what it holds: events were lost, or its process is gone."""
        self._clears += 1
        self._reading = Reading(
            capacity_blocks=self._reading.capacity_blocks,
            block_tokens=self._reading.block_tokens,
            started_at=self._reading.started_at,
        )
        for cache in self._caches.values():
            cache.forget()
        return self._batch(cleared=True)

    def changed(self, change: Change) -> KvBatch | None:
        """What readers should hear of a change; None when it has no names for them."""
        self._clears += change.cleared
        self._stored_tokens += change.stored_tokens
        self._removed_tokens += change.removed_tokens
        if not (change.cleared or change.removed or change.stored):
            return None
        return self._batch(
            cleared=change.cleared, removed=pack(change.removed), stored=pack(change.stored)
        )

    def _batch(self, *, cleared: bool, removed: bytes = b"", stored: bytes = b"") -> KvBatch:
        number = self._next_batch
        self._next_batch += 1
        return KvBatch(
            epoch=self.epoch, seq=number, cleared=cleared, removed=removed, stored=stored
        )

    def snapshot(self) -> KvBatch:
        """All that is held under names, after the newest batch."""
        names = [name for cache in self._caches.values() for name in cache.names]
        return KvBatch(epoch=self.epoch, seq=self._next_batch - 1, stored=pack(names))

    def report(self, now: float) -> EngineReport:
        reading = self._reading
        return EngineReport(
            replica=self.replica,
            at=now,
            agent=self._agent,
            epoch=self.epoch,
            clears=self._clears,
            running=reading.running,
            waiting=reading.waiting,
            kv_usage=reading.kv_usage,
            capacity_blocks=reading.capacity_blocks,
            block_tokens=reading.block_tokens,
            events=self.hears_events,
            stored_tokens=self._stored_tokens,
            removed_tokens=self._removed_tokens,
        )
