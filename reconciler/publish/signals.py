"""Listens to what routers see of load and health. Not here: adding it up (core.signals)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import msgspec
from redis.asyncio import Redis

from reconciler.core.signals import Signals
from reconciler.errors import Stalled, Transient
from reconciler.publish.redis_edge import answered
from schemas.wire import redis_keys
from schemas.wire.events import VERSION
from schemas.wire.signals import RouterSignals

_LISTEN_S: Final = 1.0
_TIMEOUT_S: Final = 5.0
_ROUTERS_KEPT: Final = 1024


class SignalsWatch:
    """Keeps `signals` current while `run` runs.

    `notify` is called after each message, with whether a request waits where none waited before: that
    one should not wait for the next pass.
    """

    def __init__(
        self,
        redis: Redis,
        signals: Signals,
        notify: Callable[[bool], None],
        clock: Callable[[], float],
    ) -> None:
        self._redis = redis
        self._signals = signals
        self._notify = notify
        self._clock = clock
        self._waiting: dict[str, frozenset[str]] = {}
        self._decode = msgspec.msgpack.Decoder(RouterSignals).decode

    async def run(self) -> None:
        """Listens until cancelled; an outage of Redis leaves silence, from which nothing follows."""
        while True:
            try:
                await self._follow()
            except (Transient, Stalled):
                await asyncio.sleep(_LISTEN_S)

    async def _follow(self) -> None:
        subscription = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            async with answered("subscribing to signals", _TIMEOUT_S):
                await subscription.subscribe(redis_keys.SIGNALS_CHANNEL)
            while True:
                async with answered("listening to signals", _LISTEN_S + _TIMEOUT_S):
                    message = await subscription.get_message(timeout=_LISTEN_S)
                if message is not None:
                    self._heard(message["data"])
        finally:
            with contextlib.suppress(Exception):
                await subscription.aclose()  # type: ignore[no-untyped-call]

    def _heard(self, data: bytes) -> None:
        try:
            message = self._decode(data)
        except msgspec.DecodeError:
            return
        if message.version != VERSION:
            return
        self._signals.take(message, self._clock())
        before = self._waiting.get(message.router, frozenset())
        named = {f.function for f in message.functions}
        now = {f.function for f in message.functions if f.waiting}
        kept = frozenset() if message.full else before - named
        self._waiting.pop(message.router, None)
        self._waiting[message.router] = kept | now
        while len(self._waiting) > _ROUTERS_KEPT:
            # Each start of a router is another one; those heard longest ago are no more.
            del self._waiting[next(iter(self._waiting))]
        self._notify(bool(now - before))
