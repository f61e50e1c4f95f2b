"""The router's word that it lives, which generation it serves, and what it still carries.

Expires by itself when the router does not renew it. Told at once on the channel when a new
generation serves, and when a replica that is on its way out has no request left. Redis away costs
nothing but the word. Not here: load that routers share to route by.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.core.snapshot import Snapshot
from router.state import RouterState
from schemas.wire import redis_keys
from schemas.wire.events import RouterHeartbeat

_log: Final = logging.getLogger(__name__)


class Heartbeat:
    """Writes `router:<id>` and the channel."""

    def __init__(
        self,
        state: RouterState,
        redis: Redis,
        *,
        router_id: str,
        interval_s: float,
        version: str,
    ) -> None:
        self._state = state
        self._redis = redis
        self._id = router_id
        self._interval_s = interval_s
        self._version = version
        self._news = asyncio.Event()
        state.on_install.append(self._installed)
        state.in_flight.on_idle = self._idle

    def message(self) -> RouterHeartbeat:
        snapshot = self._state.snapshot
        return RouterHeartbeat(
            id=self._id,
            at=time.time(),
            generation=snapshot.generation if snapshot else 0,
            revision=snapshot.revision if snapshot else "",
            in_flight=dict(self._state.in_flight.by_replica),
            draining=self._state.draining,
            version_text=self._version,
        )

    async def run(self) -> None:
        """Beats until cancelled."""
        failing = False
        while True:
            tell = self._news.is_set()
            self._news.clear()
            try:
                await self._beat(tell=tell)
                failing = False
            except (RedisError, OSError, TimeoutError) as error:
                if tell:
                    self._news.set()
                if not failing:
                    _log.warning("no heartbeat: Redis: %s", type(error).__name__)
                failing = True
                await asyncio.sleep(min(1.0, self._interval_s))
                continue
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def farewell(self) -> None:
        """Says that this router serves nothing any more."""
        with suppress(RedisError, OSError, TimeoutError):  # it expires anyway
            await self._redis.delete(redis_keys.router(self._id))

    def say_now(self) -> None:
        """Something worth telling has changed."""
        self._news.set()

    async def _beat(self, *, tell: bool) -> None:
        data = msgspec.msgpack.encode(self.message())
        await self._redis.set(
            redis_keys.router(self._id), data, px=max(1, int(self._interval_s * 3000))
        )
        if tell:
            await self._redis.publish(redis_keys.ROUTERS_CHANNEL, data)

    def _installed(self, _: Snapshot) -> None:
        self._news.set()

    def _idle(self, replica: str) -> None:
        snapshot = self._state.snapshot
        known = snapshot.replicas.get(replica) if snapshot else None
        if known is None or known.draining:
            self._news.set()
