"""Recorded decisions on their way to Redis: some of them, in batches, after the fact.

A request that is recorded leaves references behind; they are written out between requests. How many are
recorded has a ceiling a second, and what Redis keeps has one too, so that neither a busy day nor one
loud tenant costs more than was set. Redis away: what does not fit in the buffer is counted and lost. Not
here: what a record says (core.record).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.core.record import Seen, written
from router.records import RequestRecord
from schemas.wire import redis_keys
from schemas.wire.decisions import Outcome

_log: Final = logging.getLogger(__name__)
_TICK_S: Final = 0.1
_UNFINISHED_AFTER: Final = 20
"""Ticks after which a running request is written without its outcome, and again with it."""
_TTL_S: Final = 86_400
_LEAST_KEPT: Final = 100
_BATCH: Final = 200


def outcome(record: RequestRecord) -> Outcome:
    """What became of a request that has ended."""
    began, used = record.started, record.usage
    told = used is not None and not used.estimated
    return Outcome(
        status=record.status,
        outcome=record.outcome,
        attempts=record.attempts,
        replica=record.replica,
        ttft_s=record.first_body - began if record.first_body else None,
        duration_s=record.ended - began,
        input_tokens=used.input_tokens if used and told else None,
        cached_tokens=used.cached_tokens if used and told else None,
        output_tokens=used.output_tokens if used and told else None,
    )


class _Entry:
    __slots__ = ("age", "attempts", "outcome", "told")

    def __init__(self, seen: Seen) -> None:
        self.attempts = [seen]
        self.age = 0
        self.told = False
        self.outcome: Outcome | None = None


class DecisionLog:
    """Owned by one event loop. Nothing is wanted until `run` has somewhere to write to."""

    def __init__(self, router: str, *, per_s: float, kept: int) -> None:
        self.wanted = 0.0
        """How many more may be recorded just now: ask before making a `Seen`."""
        self.skipped = 0
        """Requests since the last that was recorded: for its `Seen`."""
        self.recorded = 0
        """Decisions written."""
        self.lost = 0
        """Decisions that Redis did not take."""
        self._router = router
        self._per_s = per_s
        self._kept = kept
        self._most = int(max(1.0, 20 * per_s))
        self._open: dict[str, _Entry] = {}
        self._ended: list[_Entry] = []

    def noted(self, seen: Seen) -> None:
        """One choice, before the request is sent."""
        self.wanted -= 1
        self.skipped = 0
        entry = self._open.get(seen.id)
        if entry is not None:
            entry.attempts.append(seen)
        else:
            self._open[seen.id] = _Entry(seen)

    def ended(self, decision: str, outcome: Outcome) -> None:
        """What became of a request that was recorded: ask `is_open` first."""
        entry = self._open.pop(decision, None)
        if entry is None:
            return
        entry.outcome = outcome
        self._ended.append(entry)
        if len(self._ended) > self._most:
            del self._ended[0]
            self.lost += 1

    def is_open(self, decision: str) -> bool:
        """Whether a choice of this request was recorded."""
        return decision in self._open

    async def run(self, redis: Redis) -> None:
        """Writes until cancelled."""
        failing = False
        try:
            while True:
                # A burst may take what a second allows.
                self.wanted = (
                    min(max(1.0, self._per_s), self.wanted + self._per_s * _TICK_S)
                    if self._per_s
                    else 0.0
                )
                await asyncio.sleep(_TICK_S)
                try:
                    await self.flush(redis)
                    failing = False
                except (RedisError, OSError, TimeoutError) as error:
                    if not failing:
                        _log.warning("no decisions are recorded: Redis: %s", type(error).__name__)
                    failing = True
                    await asyncio.sleep(1.0)
        finally:
            self.wanted = 0.0

    async def farewell(self, redis: Redis) -> None:
        """Writes what has ended, if Redis takes it."""
        with suppress(RedisError, OSError, TimeoutError):
            while self._ended:
                await self.flush(redis)

    async def flush(self, redis: Redis) -> None:
        """One batch.

        Raises:
            RedisError, OSError, TimeoutError: Redis cannot be reached; the batch is kept.
        """
        batch = self._ended[:_BATCH]
        late = []
        for entry in self._open.values():
            entry.age += 1
            if entry.age >= _UNFINISHED_AFTER and not entry.told:
                late.append(entry)
        if not batch and not late:
            return
        pipe = redis.pipeline(transaction=False)
        streams: set[str] = set()
        for entry in (*batch, *late[:_BATCH]):
            for seen in entry.attempts:
                kept = max(_LEAST_KEPT, self._kept // max(1, len(seen.snapshot.table.tenants)))
                decision = written(seen, self._router, entry.outcome)
                stream = redis_keys.decisions(decision.tenant)
                streams.add(stream)
                fields = {"i": decision.id, "d": msgspec.msgpack.encode(decision)}
                pipe.xadd(stream, fields, maxlen=kept, approximate=True)  # type: ignore[arg-type]
        for stream in streams:
            pipe.expire(stream, _TTL_S)
        answers = await pipe.execute(raise_on_error=False)
        refused = sum(isinstance(answer, RedisError) for answer in answers)
        self.lost += refused
        if refused:
            _log.warning("decisions that Redis refused: %d", refused)
        for entry in late[:_BATCH]:
            entry.told = True
        # `ended` may have dropped the oldest meanwhile.
        gone = set(map(id, batch))
        self._ended = [entry for entry in self._ended if id(entry) not in gone]
        self.recorded += len(batch)
