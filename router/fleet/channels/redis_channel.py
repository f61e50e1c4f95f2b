"""Messages by a channel of Redis: to every router that uses the same one.

Two connections: one listens, one publishes, message after message. What does not get out in time is
dropped, oldest first, because a newer message says more. Not here: tables or reports from Redis.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.ending import end
from router.fleet.channels import Receive
from schemas.wire import redis_keys

_log: Final = logging.getLogger(__name__)
_WAITING_MAX: Final = 64
_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 2.0
_LISTEN_S: Final = 5.0


class RedisChannel:
    """A `Channel`. The client is the caller's, and stays open."""

    name = "redis"

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: deque[bytes] = deque()
        self._news = asyncio.Event()
        self.connected = False
        self.lost = 0

    def send(self, data: bytes) -> None:
        if not self.connected:
            self.lost += 1
            return
        if len(self._waiting) >= _WAITING_MAX:
            self._waiting.popleft()
            self.lost += 1
        self._waiting.append(data)
        self._news.set()

    async def run(self, receive: Receive) -> None:
        listening = asyncio.create_task(self._listen(receive))
        try:
            await self._publish()
        finally:
            await end([listening])

    async def _publish(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                try:
                    await self._redis.publish(redis_keys.LOAD_CHANNEL, self._waiting.popleft())
                except (RedisError, OSError, TimeoutError):
                    self.lost += 1 + len(self._waiting)
                    self._waiting.clear()

    async def _listen(self, receive: Receive) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(redis_keys.LOAD_CHANNEL)
                    self.connected = True
                    wait_s = _FIRST_WAIT_S
                    while True:
                        message = await channel.get_message(timeout=_LISTEN_S)
                        if message is not None and isinstance(message["data"], bytes):
                            receive(message["data"])
            except (RedisError, OSError, TimeoutError) as error:
                if self.connected:
                    _log.warning("loads are not shared: Redis: %s", type(error).__name__)
            finally:
                self.connected = False
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
