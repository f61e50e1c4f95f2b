"""Engines' reports from Redis, told as they come and asked for besides.

Every report goes to `take`, which decides what it is worth. Redis that is away, empty or wrong
changes nothing: what was believed expires by itself. Not here: what a report does (core.engine_reports).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from schemas.wire import redis_keys
from schemas.wire.events import VERSION, EngineReport

_log: Final = logging.getLogger(__name__)
_MAX_WAIT_S: Final = 5.0
UNREADABLE: Final = "unreadable"

Take = Callable[[EngineReport], str]
"""Lets a report count; says why not, or nothing."""


class ReportReader:
    """From bytes to `take`. `counts` has how many counted ("") and why others did not."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._decode = msgspec.msgpack.Decoder(EngineReport).decode
        self.counts: dict[str, int] = {}

    def read(self, data: bytes) -> None:
        try:
            report = self._decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._count(UNREADABLE)
            return
        self.take(report)

    def take(self, report: EngineReport) -> str:
        """What `take` says, counted."""
        said = self._take(report) if report.version == VERSION else "of another version"
        self._count(said)
        return said

    def _count(self, said: str) -> None:
        self.counts[said] = self.counts.get(said, 0) + 1


class EngineWatch:
    """Follows the channel, and asks for the reports of all replicas whenever it (re)connects."""

    def __init__(
        self,
        redis: Redis,
        reader: ReportReader,
        replicas: Callable[[], Collection[str]],
        *,
        poll_interval_s: float = 5.0,
    ) -> None:
        self._redis = redis
        self._reader = reader
        self._replicas = replicas
        self._poll_interval_s = poll_interval_s

    async def run(self) -> None:
        """Follows until cancelled, through everything that can happen to Redis."""
        failing = False
        wait_s = 0.1
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(redis_keys.ENGINES_CHANNEL)
                    if failing:
                        _log.info("engines' reports are heard again")
                    failing = False
                    wait_s = 0.1
                    await self._follow(channel)
            except (RedisError, OSError, TimeoutError) as error:
                if not failing:
                    _log.warning("no reports of engines: Redis: %s", type(error).__name__)
                failing = True
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _MAX_WAIT_S)

    async def _follow(self, channel: object) -> None:
        loop = asyncio.get_running_loop()
        ask_at = 0.0
        known: set[str] = set()
        while True:
            replicas = set(self._replicas())
            if loop.time() >= ask_at or replicas - known:
                await self._ask(replicas)
                known, ask_at = replicas, loop.time() + self._poll_interval_s
            message = await channel.get_message(timeout=min(1.0, self._poll_interval_s))  # type: ignore[attr-defined]
            if message is not None and isinstance(message.get("data"), bytes):
                self._reader.read(message["data"])

    async def _ask(self, replicas: Collection[str]) -> None:
        if not replicas:
            return
        names = [redis_keys.engine(replica) for replica in replicas]
        for data in await self._redis.mget(names):
            if isinstance(data, bytes):
                self._reader.read(data)
