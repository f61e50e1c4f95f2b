"""Sends finished requests' records from journals to Redis, in order, until the ledger has them.

A record stays in its journal until the reconciler has committed it to Git, so that Redis may be
away, be emptied or fail over in between: what it lost is sent again. One atomic call sends a batch,
and passes over what is there already. No request waits here. Not here: what a record says (meter),
or how it outlives this process (journal).
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.usage.journal import Journal, JournalBusy, journals_in
from schemas.wire import redis_keys

_log: Final = logging.getLogger(__name__)

INTERVAL_S: Final = 0.25
_ASK_EVERY: Final = 4
"""Intervals after which Redis is asked how far the ledger is, where there is nothing to send."""
_ADOPT_EVERY_S: Final = 5.0
_BATCH: Final = 1000
_FAREWELL_S: Final = 3.0
_FULL: Final = 1_000_000
"""Entries that nobody reads, at which no more are put into the stream."""

# KEYS usage, usage:sent, usage:acked
# ARGV journal, number before the first that the journal has, entries at which the stream is full,
#      number of the first record, the lengths of all in two bytes each, the records;
#      of one that nobody can read any more the length is 0
# Returns a word, the greatest number there, and the greatest one that the ledger has.
_SEND: Final = """
local acked = tonumber(redis.call('HGET', KEYS[3], ARGV[1]) or '0') or 0
local known = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0') or 0
local there = math.max(acked, known, tonumber(ARGV[2]))
local first = tonumber(ARGV[4])
if first > there + 1 then return {'lost', there, acked} end
local sizes, records, at, number = ARGV[5], ARGV[6], 1, first
if #sizes > 0 and redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[3]) then
  return {'full', there, acked}
end
for place = 1, #sizes, 2 do
  local size = struct.unpack('>I2', sizes, place)
  if number > there then
    if size > 0 then
      redis.call('XADD', KEYS[1], '*', 'r', string.sub(records, at, at + size - 1))
    end
    there = number
  end
  at, number = at + size, number + 1
end
if there > known then redis.call('HSET', KEYS[2], ARGV[1], there) end
return {'sent', there, acked}
"""


class UsageStream:
    """The sender of one router process.

    Args:
        journal: of this process.
        folder: where journals are, also those of processes that have died; None: nowhere.
    """

    def __init__(
        self,
        redis: Redis,
        journal: Journal,
        folder: Path | None,
        *,
        interval_s: float = INTERVAL_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._redis = redis
        self._own = journal
        self._folder = folder
        self._interval_s = interval_s
        self._now = now
        self._adopted: list[Journal] = []
        self._send = redis.register_script(_SEND)
        self._adopt_at = 0.0
        self._said = ""

    @property
    def kept(self) -> int:
        """Records that are not known to be in the ledger."""
        return sum(journal.kept for journal in (self._own, *self._adopted))

    @property
    def lost(self) -> int:
        """Requests whose records found no room."""
        return self._own.lost

    async def run(self) -> None:
        """Sends until cancelled, through everything that can happen to Redis."""
        quiet = 0
        while True:
            self._adopt()
            sending = any(journal.waiting for journal in (self._own, *self._adopted))
            quiet = 0 if sending else quiet + 1
            try:
                if quiet % _ASK_EVERY == 0:
                    await self.flush()
                    self._say("")
            except (RedisError, OSError, TimeoutError) as error:
                self._say(f"usage records wait for Redis: {type(error).__name__}")
                await asyncio.sleep(min(1.0, 4 * self._interval_s))
            await asyncio.sleep(self._interval_s)

    async def flush(self) -> None:
        """Sends all that waits, and forgets what the ledger has.

        Raises:
            RedisError, OSError, TimeoutError: Redis did not take it; it waits on.
        """
        for journal in [self._own, *self._adopted]:
            while await self._flush(journal):
                pass
        for journal in [journal for journal in self._adopted if not journal.kept]:
            await self._redis.hdel(redis_keys.USAGE_SENT, journal.name)
            self._adopted.remove(journal)
            journal.close(remove=True)

    async def close(self) -> None:
        """Sends what is left, if Redis takes it soon. The rest is for whoever finds the journal."""
        with suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self.flush()
        if self._folder is None and self._own.waiting:
            _log.error(
                "%d usage records are lost: Redis does not take them, and there is no state_dir",
                self._own.waiting,
            )
        self._own.close(remove=not self._own.kept)
        for journal in self._adopted:
            journal.close(remove=not journal.kept)
        self._adopted.clear()

    async def _flush(self, journal: Journal) -> bool:
        """One batch; whether there is more to do at once."""
        if not journal.kept:
            return False
        sizes, batch = journal.unsent(_BATCH)
        word, there, acked = await self._send(
            keys=[redis_keys.USAGE_STREAM, redis_keys.USAGE_SENT, redis_keys.USAGE_ACKED],
            args=[
                *(journal.name, journal.oldest - 1, _FULL, journal.newest + 1),
                # Two for all: a client of Redis looks at each argument.
                *(struct.pack(f">{len(sizes)}H", *sizes), batch),
            ],
        )
        if word == b"lost":
            journal.send_again()
            return True
        if word == b"full":
            self._say("usage records wait: nobody reads the stream in Redis")
            return False
        journal.sent(there)
        journal.acknowledge(acked)
        # What came meanwhile goes with the next batch: sent at once, each would go by itself.
        return len(sizes) == _BATCH

    def _adopt(self) -> None:
        """Takes over the journals of processes that have died."""
        if self._folder is None or time.monotonic() < self._adopt_at:
            return
        self._adopt_at = time.monotonic() + _ADOPT_EVERY_S
        for path in journals_in(self._folder):
            try:
                journal = Journal.adopt(path, ended_at=self._now())
            except JournalBusy:
                continue
            except OSError as error:
                _log.warning("usage journal %s: %s", path.name, error.strerror)
                continue
            if journal.kept:
                _log.info("took over %d usage records of another process", journal.kept)
                self._adopted.append(journal)
            else:
                journal.close(remove=True)

    def _say(self, text: str) -> None:
        if text and text != self._said:
            _log.warning("%s", text)
        self._said = text
