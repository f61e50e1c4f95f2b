"""Which routers live, what generation each serves, and what each still carries.

Not here: what follows from it for status or for a draining replica (core).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from redis.asyncio import Redis

from reconciler.errors import Stalled, Transient
from reconciler.publish.redis_edge import answered
from schemas.wire import redis_keys
from schemas.wire.events import VERSION, RouterHeartbeat

_KEY_PREFIX: Final = redis_keys.router("")


class RouterWatch:
    """Follows heartbeats: told by their channel within milliseconds, checked against their keys.

    Args:
        redis: where routers report.
        notify: called when a router came or went, serves another generation, starts to drain, or
            when a replica became busy or idle; not for every count.
        check_s: between looks at the keys of known routers; this is how fast an expired one is seen.
        scan_s: between searches for routers whose announcement was missed.
        forget_s: how long a router whose key vanished still counts with its last word, for an emptied
            Redis does not mean that nobody serves. One that was draining is forgotten at once.
        timeout_s: bound on one conversation with Redis.
    """

    def __init__(
        self,
        redis: Redis,
        notify: Callable[[], None],
        *,
        check_s: float = 1.0,
        scan_s: float = 10.0,
        forget_s: float = 5.0,
        timeout_s: float = 5.0,
    ) -> None:
        self._redis = redis
        self._notify = notify
        self._check_s = check_s
        self._scan_s = scan_s
        self._forget_s = forget_s
        self._timeout_s = timeout_s
        self._beats: dict[str, RouterHeartbeat] = {}
        self._missed_at: dict[str, float] = {}
        self._known = False

    def alive(self) -> Mapping[str, RouterHeartbeat] | None:
        """By router id; None while nobody can tell.

        A router whose heartbeat this program cannot read serves generation 0 here: it is there, and
        nothing may be concluded from it.
        """
        return self._beats if self._known else None

    async def run(self) -> None:
        """Follows until cancelled; during an outage of Redis `alive` is None."""
        while True:
            try:
                await self._follow()
            except (Transient, Stalled):
                self._set(self._beats, known=False)
                await asyncio.sleep(self._check_s)

    async def _follow(self) -> None:
        subscription = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            async with answered("subscribing to routers", self._timeout_s):
                await subscription.subscribe(redis_keys.ROUTERS_CHANNEL)
            loop = asyncio.get_running_loop()
            ids: frozenset[str] = frozenset()
            check_at = scan_at = loop.time()
            while True:
                if loop.time() >= scan_at:
                    ids = frozenset(self._beats) | await self._scan()
                    scan_at = loop.time() + self._scan_s
                    check_at = loop.time()
                if loop.time() >= check_at:
                    beats = await self._read(ids)
                    ids = frozenset(beats)
                    self._set(beats, known=True)
                    check_at = loop.time() + self._check_s
                async with answered("listening to routers", self._check_s + self._timeout_s):
                    message = await subscription.get_message(
                        timeout=max(0.0, min(check_at, scan_at) - loop.time())
                    )
                if message is not None and (beat := _decoded(message["data"])) is not None:
                    ids |= {beat.id}
                    known = self._beats.get(beat.id)
                    # Older than what the key says. The key itself always counts, because a router's
                    # clock may be set back.
                    if known is None or known.at <= beat.at:
                        self._set({**self._beats, beat.id: beat}, known=True)
        finally:
            with contextlib.suppress(Exception):
                await subscription.aclose()  # type: ignore[no-untyped-call]

    async def _scan(self) -> frozenset[str]:
        async with answered("looking for routers", self._timeout_s):
            keys = [
                key
                async for key in self._redis.scan_iter(
                    match=redis_keys.ROUTER_PATTERN, count=1000, _type="STRING"
                )
            ]
        return frozenset(key.decode(errors="replace").removeprefix(_KEY_PREFIX) for key in keys)

    async def _read(self, ids: frozenset[str]) -> dict[str, RouterHeartbeat]:
        ordered = sorted(ids)
        values: list[bytes | str | None] = []
        if ordered:
            async with answered("reading routers", self._timeout_s):
                values = await self._redis.mget([redis_keys.router(name) for name in ordered])
        now = time.monotonic()
        missed_at, self._missed_at = self._missed_at, {}
        beats = {}
        for name, value in zip(ordered, values, strict=True):
            before = self._beats.get(name)
            if value is not None:
                beat = _decoded(value)
                if beat is None or beat.id != name:
                    beat = RouterHeartbeat(id=name, at=0.0, generation=0)
                beats[name] = beat
            elif before is not None and not before.draining:
                since = missed_at.get(name, now)
                if now - since < self._forget_s:
                    self._missed_at[name] = since
                    beats[name] = before
        return beats

    def _set(self, beats: dict[str, RouterHeartbeat], *, known: bool) -> None:
        changed = known != self._known or _substance(beats) != _substance(self._beats)
        self._beats, self._known = beats, known
        if changed:
            self._notify()


def _substance(beats: Mapping[str, RouterHeartbeat]) -> dict[str, object]:
    return {
        name: (b.generation, b.draining, frozenset(r for r, count in b.in_flight.items() if count))
        for name, b in beats.items()
    }


def _decoded(data: bytes | str) -> RouterHeartbeat | None:
    """None for another form or version."""
    try:
        beat = msgspec.msgpack.decode(
            data if isinstance(data, bytes) else data.encode(), type=RouterHeartbeat
        )
    except msgspec.DecodeError:
        return None
    return beat if beat.version == VERSION else None
