"""Adds usage up and commits it, at most so often, while this reconciler holds the lease.

The ledger in Git says itself how far it goes: whoever takes over starts from there, counts what is
still in Redis, and so counts nothing twice. Only what is committed is acknowledged. Not here: the
sums (core.ledger).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from reconciler.again import backoff_s
from reconciler.core import ledger as core
from reconciler.core.ledger import CURSOR_PATH, Ledger, LedgerInvalid
from reconciler.errors import Fenced, ReconcileError, Stalled
from reconciler.loop.ports import Leadership
from reconciler.publish.lease import Held
from reconciler.publish.ledger_file import open_document, seal_document
from reconciler.publish.usage_source import BEGINNING, UsageSource
from schemas.wire.events import MonthToDate

log = logging.getLogger("detoserve.reconciler")

LOOK_EVERY_S = 1.0
LAST_WRITE_S = 10.0


class LedgerSink(Protocol):
    """Where the ledger's documents are."""

    async def paths(self, prefix: str) -> list[str]: ...

    async def read_paths(self, paths: Collection[str]) -> dict[str, bytes]: ...

    async def put(
        self, documents: dict[str, bytes], *, subject: str, lease: Held
    ) -> str | None: ...


def today_utc() -> str:
    return datetime.now(UTC).date().isoformat()


class LedgerTask:
    """One ledger on one branch.

    Args:
        interval_s: between two commits, while usage goes on.
    """

    def __init__(
        self,
        sink: Callable[[], LedgerSink],
        source: UsageSource,
        leadership: Leadership,
        key: Ed25519PrivateKey,
        *,
        interval_s: Callable[[], float],
        today: Callable[[], str] = today_utc,
    ) -> None:
        self._sink = sink
        self._source = source
        self._leadership = leadership
        self._key = key
        self._interval_s = interval_s
        self._today = today
        self._written_to: tuple[LedgerSink, int] | None = None
        self._there: frozenset[str] = frozenset()
        """Days that have a document on the branch."""
        self._committed = Ledger()
        self._ledger = Ledger()
        self._position = BEGINNING
        self._committed_through = BEGINNING
        self._commit_at = 0.0
        self._acknowledged = True

    def month_to_date(self) -> dict[str, MonthToDate]:
        """Tenant -> what is committed of this month."""
        month = core.month_of(self._today())
        return core.months_to_date(self._committed, [month])[month]

    async def run(self, stop: asyncio.Event) -> None:
        """Counts and commits until `stop`, and once more then."""
        failures = 0
        stopping = asyncio.create_task(stop.wait())
        while not stop.is_set():
            pause_s = LOOK_EVERY_S
            try:
                if self._leadership.held is not None:
                    await self.step()
                failures = 0
            except ReconcileError as error:
                failures += 1
                pause_s = backoff_s(
                    failures,
                    base_s=1.0,
                    cap_s=60.0,
                )
                log.warning("usage not committed, next try in %.0f s: %s", pause_s, error)
            except Exception:
                log.exception("the usage ledger failed")
                pause_s = 5.0
            await asyncio.wait({stopping}, timeout=pause_s)
        try:
            async with asyncio.timeout(LAST_WRITE_S):
                if self._leadership.held is not None:
                    await self.step(now=True)
        except (ReconcileError, TimeoutError) as error:
            log.warning("the last usage was not committed: %s", str(error) or "no answer in time")

    async def step(self, *, now: bool = False) -> str | None:
        """Counts what is there, and commits it if that is due; the commit, if one was made.

        Raises:
            ReconcileError: Redis or the branch could not be used; nothing is lost.
        """
        lease = self._leadership.held
        if lease is None:
            return None
        sink, generation = self._sink(), lease.require().generation
        if self._written_to != (sink, generation):
            await self._take_up(sink, lease)
            self._written_to = (sink, generation)
        await self._count(sink)
        changed = self._ledger is not self._committed
        if not changed or not (now or time.monotonic() >= self._commit_at):
            if not self._acknowledged:
                await self._acknowledge()
            return None
        try:
            return await self._commit(sink, lease)
        except Fenced:
            self._written_to = None
            raise

    async def _take_up(self, sink: LedgerSink, lease: Held) -> None:
        """Starts from what the branch says; what was counted and not committed is counted anew."""
        paths = await sink.paths("usage/")
        self._there = frozenset(day for path in paths if (day := core.day_in(path)))
        stored = await sink.read_paths([CURSOR_PATH])
        journals = {}
        if CURSOR_PATH in stored:
            try:
                journals = core.parse_cursor(self._opened(CURSOR_PATH, stored[CURSOR_PATH]))
            except LedgerInvalid as error:
                raise _broken(CURSOR_PATH, error) from None
        self._ledger = Ledger({}, journals)
        month = core.month_of(self._today())
        await self._load(sink, [day for day in self._there if core.month_of(day) == month])
        self._committed = self._ledger
        self._position = self._committed_through = BEGINNING
        lease.require()
        await self._acknowledge()

    async def _load(self, sink: LedgerSink, days: Collection[str]) -> None:
        """Puts days that the branch has into the ledger."""
        wanted = [day for day in days if day in self._there and day not in self._ledger.days]
        if not wanted:
            return
        stored = await sink.read_paths([core.day_path(day) for day in wanted])
        loaded = {}
        for path, data in stored.items():
            try:
                day, rows = core.parse_day(self._opened(path, data))
            except LedgerInvalid as error:
                raise _broken(path, error) from None
            loaded[day] = rows
        both = {**self._ledger.days, **loaded}
        if self._ledger is self._committed:
            self._committed = self._ledger = Ledger(both, self._ledger.journals)
        else:
            self._committed = Ledger({**self._committed.days, **loaded}, self._committed.journals)
            self._ledger = Ledger(both, self._ledger.journals)

    def _opened(self, path: str, data: bytes) -> object:
        opened = open_document(data, self._key.public_key())
        if not opened.signed:
            log.warning("%s is not signed by this reconciler's key; it is taken as it stands", path)
        return opened.document

    async def _count(self, sink: LedgerSink) -> None:
        while True:
            batch = await self._source.read(self._position)
            new = [record for record in batch.records if core.is_new(self._ledger, record)]
            if new:
                days = {day for record in new if (day := core.day_of(record)) is not None}
                # Whole months, so that sums of a month are over all of its days.
                months = {core.month_of(day) for day in days}
                await self._load(sink, [d for d in self._there if core.month_of(d) in months])
                self._ledger = core.counted(self._ledger, new)
            # Who sends what is counted already has not heard of it, or Redis has forgotten.
            if len(new) < len(batch.records) or not batch.acknowledged:
                self._acknowledged = False
            self._position = batch.position
            if not batch.more:
                return

    async def _commit(self, sink: LedgerSink, lease: Held) -> str | None:
        after = core.without_old_journals(self._ledger, self._today())
        days = core.changed_days(self._committed, after)
        documents = await asyncio.to_thread(self._documents, after, days)
        span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else "no new day"
        commit = await sink.put(documents, subject=f"usage: {span}", lease=lease)
        self._committed = self._ledger = after
        self._committed_through = self._position
        self._there |= set(days)
        self._commit_at = time.monotonic() + self._interval_s()
        await self._acknowledge()
        self._forget_old_months()
        return commit

    def _documents(self, ledger: Ledger, days: Collection[str]) -> dict[str, bytes]:
        documents = {
            core.day_path(day): seal_document(core.day_document(day, ledger.days[day]), self._key)
            for day in days
        }
        cursor = core.cursor_document(ledger.journals)
        return {**documents, CURSOR_PATH: seal_document(cursor, self._key)}

    async def _acknowledge(self) -> None:
        self._acknowledged = not self._committed.journals
        if self._acknowledged:
            return
        months = {core.month_of(day) for day in self._committed.days}
        await self._source.acknowledge(
            self._committed.journals,
            core.months_to_date(self._committed, months),
            self._committed_through,
        )
        self._acknowledged = True

    def _forget_old_months(self) -> None:
        """Days of past months are read again from the branch if a late record needs them."""
        month = core.month_of(self._today())
        days = {day: rows for day, rows in self._ledger.days.items() if core.month_of(day) >= month}
        self._committed = self._ledger = Ledger(days, self._ledger.journals)


def _broken(path: str, error: LedgerInvalid) -> Stalled:
    return Stalled(f"{path} on the status branch: {error}; restore the file from the commit before")
