"""Pins of sessions, shared between router processes through Redis.

No request waits here: it reads and writes this process's own map, and what changes is told in
batches. A process that starts reads what there is; what others change afterwards comes by a channel. Redis
away costs only that: a session met for the first time is then placed by its cache alone. Not here:
what a pin means (core.sessions).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from itertools import islice
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from router.core.sessions import KEY_BYTES, Pins
from router.ending import together
from schemas.wire import redis_keys
from schemas.wire.events import VERSION, SessionBatch, SessionPin

_log: Final = logging.getLogger(__name__)
_FLUSH_S: Final = 0.05
"""After the first change of a batch."""
_BATCH: Final = 100
"""So small that requests need not wait for one to be written."""
_READ: Final = 500
_UNTOLD_MAX: Final = 20_000
_SWEEP_S: Final = 5.0
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_batch: Final = msgspec.msgpack.Decoder(SessionBatch)
_pin: Final = msgspec.msgpack.Decoder(SessionPin)


class SessionStore:
    """Owned by one event loop. `run` shares the pins; without it they are this process's alone."""

    def __init__(
        self, limit: int, secret: bytes, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`secret` keys the hashes that sessions are known by; the same in all routers of a fleet."""
        self.pins = Pins(limit)
        self.secret = secret
        self.lost = 0
        """Changes that others were not told of."""
        self._clock = clock
        self._process = secrets.token_hex(8)
        self._shared = False
        self._news = asyncio.Event()
        self._untold: dict[bytes, SessionPin | None] = {}
        """None: released."""

    def replica(self, key: bytes) -> str | None:
        """The replica that served this session last."""
        return self.pins.replica(key, self._clock())

    def served(self, key: bytes, replica: str, ttl_s: float) -> None:
        """A request of the session goes there."""
        now = self._clock()
        if self.pins.served(key, replica, now, ttl_s) and self._shared:
            self._tell(key, SessionPin(key, replica, now + ttl_s))

    def release(self, key: bytes) -> bool:
        """The session is over, everywhere. False: nothing was known of it here."""
        if self._shared:
            self._tell(key, None)
        return self.pins.release(key)

    def _tell(self, key: bytes, pin: SessionPin | None) -> None:
        self._untold.pop(key, None)
        self._untold[key] = pin
        if len(self._untold) > _UNTOLD_MAX:
            del self._untold[next(iter(self._untold))]
            self.lost += 1
        self._news.set()

    async def run(self, redis: Redis) -> None:
        """Tells and hears until cancelled, through everything that can happen to Redis."""
        self._shared = True
        try:
            await together(
                asyncio.create_task(self._hear(redis)),
                asyncio.create_task(self._telling(redis)),
                asyncio.create_task(self._sweep()),
            )
        finally:
            self._shared = False

    async def _hear(self, redis: Redis) -> None:
        while True:
            try:
                async with redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(redis_keys.SESSIONS_CHANNEL)
                    # After the subscription, so that no change falls between.
                    await self._load(redis)
                    while True:
                        message = await channel.get_message(timeout=1.0)
                        if message is not None and isinstance(message["data"], bytes):
                            self._heard(message["data"])
            except (RedisError, OSError, TimeoutError) as error:
                _log.debug("sessions: Redis: %s", type(error).__name__)
                await asyncio.sleep(1.0)

    async def _load(self, redis: Redis) -> None:
        cursor, read = 0, 0
        while True:
            cursor, keys = await redis.scan(cursor, match=redis_keys.SESSION_PATTERN, count=_READ)
            for value in await redis.mget(keys) if keys else ():
                if isinstance(value, bytes):
                    self._keep(value)
            read += len(keys)
            if not cursor or read >= self.pins.limit:
                return
            await asyncio.sleep(0)

    def _keep(self, value: bytes) -> None:
        try:
            pin = _pin.decode(value)
        except _UNREADABLE:
            return
        self._apply(pin)

    def _apply(self, pin: SessionPin) -> None:
        # What was released here a moment ago is not brought back by an older word.
        if len(pin.key) == KEY_BYTES and self._untold.get(pin.key, pin) is not None:
            self.pins.heard(pin.key, pin.replica, pin.expires_at)

    def _heard(self, data: bytes) -> None:
        try:
            batch = _batch.decode(data)
        except _UNREADABLE:
            return
        if batch.version != VERSION or batch.process == self._process:
            return
        for key in batch.released:
            self.pins.release(key)
        for pin in batch.pins:
            self._apply(pin)

    async def _telling(self, redis: Redis) -> None:
        while True:
            await self._news.wait()
            await asyncio.sleep(_FLUSH_S if len(self._untold) < _BATCH else 0)
            self._news.clear()
            batch = dict(islice(self._untold.items(), _BATCH))
            try:
                await self._flush(redis, batch)
            except (RedisError, OSError, TimeoutError):
                self._news.set()
                await asyncio.sleep(1.0)
                continue
            for key, pin in batch.items():
                if self._untold.get(key, False) is pin:
                    del self._untold[key]
            if self._untold:
                self._news.set()

    async def _flush(self, redis: Redis, batch: dict[bytes, SessionPin | None]) -> None:
        now = self._clock()
        pipe = redis.pipeline(transaction=False)
        pins, released = [], []
        for key, pin in batch.items():
            name = redis_keys.session(key.hex())
            if pin is None:
                released.append(key)
                pipe.delete(name)
            elif pin.expires_at > now:
                pins.append(pin)
                left_ms = max(1, int((pin.expires_at - now) * 1000))
                pipe.set(name, msgspec.msgpack.encode(pin), px=left_ms)
        told = SessionBatch(process=self._process, pins=tuple(pins), released=tuple(released))
        pipe.publish(redis_keys.SESSIONS_CHANNEL, msgspec.msgpack.encode(told))
        await pipe.execute()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.pins.sweep(self._clock())
