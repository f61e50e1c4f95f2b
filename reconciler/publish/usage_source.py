"""The stream of usage records in Redis, as the ledger reads it.

What is read stays there until the ledger is committed; then the stream is cut off behind it and
routers are told how far they may forget. Not here: adding records up (core.ledger).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from redis.asyncio import Redis

from reconciler.core.ledger import Position
from reconciler.publish.redis_edge import answered
from schemas.wire import redis_keys
from schemas.wire.events import VERSION, MonthToDate, UsageRecord, usage_record

log = logging.getLogger("detoserve.reconciler")

BEGINNING = "0-0"
_MONTH_KEPT_S = 63 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Batch:
    """Records in the stream's order. `position` is of the last entry that was looked at."""

    records: Sequence[UsageRecord]
    position: str
    more: bool
    acknowledged: bool
    """Whether Redis still has what was last acknowledged."""


class UsageSource:
    """Reads the stream `usage`; writes `usage:acked` and the months to date."""

    def __init__(self, redis: Redis, *, timeout_s: float = 5.0) -> None:
        # redis-py's types do not tell what a stream's entries are.
        self._redis: Any = redis
        self._timeout_s = timeout_s

    async def read(self, after: str, *, limit: int = 5000) -> Batch:
        """What follows a position; from the beginning where the stream is another one than it was.

        Raises:
            Transient: Redis did not answer.
        """
        async with answered("reading usage", self._timeout_s):
            # Nobody else writes this key, and what is in it is with the routers too.
            if await self._redis.type(redis_keys.USAGE_STREAM) not in (b"stream", b"none"):
                await self._redis.delete(redis_keys.USAGE_STREAM)
            known = bool(await self._redis.exists(redis_keys.USAGE_ACKED))
            last = await self._redis.xrevrange(redis_keys.USAGE_STREAM, count=1)
            if not last:
                return Batch((), after, more=False, acknowledged=known)
            newest = last[0][0].decode()
            if _order(newest) < _order(after):
                after = BEGINNING
            if newest == after:
                return Batch((), after, more=False, acknowledged=known)
            entries = await self._redis.xrange(
                redis_keys.USAGE_STREAM, min=f"({after}", count=limit
            )
        records = []
        for entry, fields in entries:
            record = _read(fields.get(b"r", b""))
            if record is None:
                log.error("usage: the entry %s is no record; it is left out", entry.decode())
            else:
                records.append(record)
        position = entries[-1][0].decode() if entries else after
        return Batch(records, position, more=len(entries) == limit, acknowledged=known)

    async def acknowledge(
        self,
        journals: Mapping[str, Position],
        months: Mapping[str, Mapping[str, MonthToDate]],
        through: str,
    ) -> None:
        """What the ledger in Git has: how far each journal, and the sums of whole months.

        Raises:
            Transient: Redis did not answer.
        """
        async with answered("acknowledging usage", self._timeout_s):
            pipe = self._redis.pipeline(transaction=True)
            if journals:
                pipe.hset(
                    redis_keys.USAGE_ACKED, mapping={name: at.seq for name, at in journals.items()}
                )
            for month, tenants in months.items():
                key = redis_keys.usage_month(month)
                if tenants:
                    pipe.hset(
                        key,
                        mapping={
                            name: msgspec.msgpack.encode(sums) for name, sums in tenants.items()
                        },
                    )
                    pipe.expire(key, _MONTH_KEPT_S)
            if through != BEGINNING:
                milliseconds, number = _order(through)
                pipe.xtrim(
                    redis_keys.USAGE_STREAM, minid=f"{milliseconds}-{number + 1}", approximate=False
                )
            await pipe.execute()


def _order(position: str) -> tuple[int, int]:
    milliseconds, _, number = position.partition("-")
    return int(milliseconds), int(number)


def _read(data: bytes) -> UsageRecord | None:
    try:
        record = usage_record(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return record if record.version == VERSION else None
