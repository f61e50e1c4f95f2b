"""Whole, signed, monotonic routing tables in Redis.

A table is on disk before it is in Redis, and in Redis before routers hear of it. What is current is
kept current: `refresh` says so in a signed word, and puts everything back where Redis lost it.

Not here: what a table says (core.routes), or what routers make of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis.asyncio import Redis

from reconciler.errors import Fenced, Transient
from reconciler.publish import table_file
from reconciler.publish.lease import Held
from reconciler.publish.redis_edge import answered
from schemas.wire import redis_keys
from schemas.wire.envelope import EnvelopeInvalid, seal, unseal
from schemas.wire.routing import Freshness, RoutingTable, content_digest

SIGNATURE_BYTES: Final = 64
"""Every envelope ends in its signature, by which two of them are told apart."""

# KEYS routes:current, routes:generation, lease:generation, routes:fresh, routes:<generation>
# ARGV generation, lease generation, freshness, last 64 bytes of the envelope,
#      [envelope, keep in ms, channel]
# Returns one word and a number: fenced (by), stale (the generation there), missing, done.
_WRITE: Final = """
local function drop_unless_string(key)
  local is = redis.call('TYPE', key)['ok']
  if is ~= 'string' and is ~= 'none' then redis.call('DEL', key) end
end
for _, key in ipairs(KEYS) do drop_unless_string(key) end
local generation, lease = tonumber(ARGV[1]), tonumber(ARGV[2])
local newest_lease = tonumber(redis.call('GET', KEYS[3]) or '0') or 0
if newest_lease > lease then return {'fenced', newest_lease} end
local there = tonumber(redis.call('GET', KEYS[2]) or '0') or 0
local same = there == generation and redis.call('GETRANGE', KEYS[1], -64, -1) == ARGV[4]
if #ARGV > 4 then
  if there > generation or (there == generation and not same
      and redis.call('EXISTS', KEYS[1]) == 1) then
    return {'stale', there}
  end
  redis.call('SET', KEYS[1], ARGV[5])
  redis.call('SET', KEYS[2], ARGV[1])
  redis.call('SET', KEYS[5], ARGV[5], 'PX', ARGV[6])
  if newest_lease < lease then redis.call('SET', KEYS[3], ARGV[2]) end
elseif there > generation then
  return {'stale', there}
elseif not same then
  return {'missing', there}
end
redis.call('SET', KEYS[4], ARGV[3])
if #ARGV > 4 then redis.call('PUBLISH', ARGV[7], ARGV[1]) end
return {'done', generation}
"""


class _Current(NamedTuple):
    table: RoutingTable
    envelope: bytes
    digest: str


class RoutesPublisher:
    """Publishes tables under a lease and keeps the last one there.

    Args:
        redis: where routers look.
        signing_key: whose public half routers have.
        path: file of the last table; its folder is made where missing.
        keep_s: how long past generations can be looked up.
        timeout_s: bound on one conversation with Redis.
        now: Unix seconds.
    """

    def __init__(
        self,
        redis: Redis,
        signing_key: Ed25519PrivateKey,
        path: Path,
        *,
        keep_s: float = 3600.0,
        timeout_s: float = 5.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._redis = redis
        self._key = signing_key
        self._path = path
        self._keep_ms = int(keep_s * 1000)
        self._timeout_s = timeout_s
        self._now = now
        self._script = redis.register_script(_WRITE)
        self._known: _Current | None = None
        self._said_at = 0.0
        self._lock = asyncio.Lock()

    @property
    def newest_lease(self) -> int:
        """Lease generation of the current table as last read or written: a floor for the next lease."""
        return 0 if self._known is None else self._known.table.lease

    async def current(self) -> RoutingTable | None:
        """The newest table that carries our signature, in Redis or on disk; None: there is none.

        Redis away is no error while the file has a table: it was written before Redis had it.

        Raises:
            Transient: Redis did not answer and there is no file.
            Stalled: the file cannot be read, or Redis refuses us.
        """
        async with self._lock:
            known = await self._load()
        return None if known is None else known.table

    async def publish(self, content: RoutingTable, *, lease: Held, floor: int = 0) -> int:
        """Makes `content` current and returns its generation.

        Generation, lease and time are filled in here. Content that equals what is current (its
        revision aside) gets no new generation; it is only confirmed, as by `refresh`.

        Args:
            content: the table to be.
            lease: asked right before each write.
            floor: a generation known to be taken, such as the greatest that a router serves.

        Raises:
            Fenced: the lease ran out, or a newer one has written.
            Transient: Redis did not answer; the table is on disk and `refresh` will publish it.
            Stalled: the file cannot be written.
        """
        async with self._lock:
            lease.require()
            digest = content_digest(content)
            known = await self._load()
            if known is None or known.digest != digest or known.table.generation < floor:
                return await self._publish_new(content, digest, lease, known, floor)
            await self._confirm(known, lease)
            return known.table.generation

    async def refresh(self, lease: Held) -> int | None:
        """Says that the current table still is, and restores it where Redis lost or changed it.

        Returns:
            The current generation; None while nothing was ever published.

        Raises:
            Fenced: the lease ran out, or a newer one has written.
            Transient: Redis did not answer.
        """
        async with self._lock:
            lease.require()
            known = self._known or await self._load()
            if known is None:
                return None
            return await self._confirm(known, lease)

    async def keep_current(
        self, lease: Held, *, interval_s: float = 1.0, freshness_s: float = 10.0
    ) -> None:
        """Refreshes every `freshness_s`, and looks every `interval_s` whether Redis lost the table.

        Runs until cancelled, or until the lease is lost.

        Raises:
            Fenced: see `refresh`.
        """
        said_at = float("-inf")
        while True:
            try:
                due = time.monotonic() - said_at >= freshness_s
                if due or not await self._is_there():
                    await self.refresh(lease)
                    said_at = time.monotonic()
            except Transient:
                said_at = float("-inf")
            await asyncio.sleep(interval_s)

    async def _is_there(self) -> bool:
        async with answered("looking for the routing table", self._timeout_s):
            generation = _number(await self._get(redis_keys.ROUTES_GENERATION))
        known = self._known
        return known is None or generation == known.table.generation

    async def _publish_new(
        self, content: RoutingTable, digest: str, lease: Held, known: _Current | None, floor: int
    ) -> int:
        taken = max(floor, known.table.generation if known else 0)
        for _ in range(3):
            generation = taken + 1
            holding = lease.require()
            table = msgspec.structs.replace(
                content,
                generation=generation,
                lease=holding.generation,
                published_at=self._now(),
            )
            new = _Current(table, seal(table, self._key), digest)
            await asyncio.to_thread(table_file.write, self._path, new.envelope)
            # From here on it is what `refresh` makes current, also when Redis is away now.
            self._known = new
            try:
                word, number = await self._write(new, lease, whole=True)
            except Fenced:
                # Whoever starts from the file must not take a refused table for the current one.
                self._known = None
                await asyncio.to_thread(
                    table_file.write, self._path, known.envelope if known else b""
                )
                raise
            if word == "done":
                return generation
            taken = max(taken, number)
        raise Transient("publishing routes: others publish at the same time")

    async def _confirm(self, known: _Current, lease: Held) -> int:
        word, number = await self._write(known, lease, whole=False)
        if word == "missing":
            word, number = await self._write(known, lease, whole=True)
        if word == "stale":
            self._known = None
            if number == known.table.generation and await self._load() == known:
                # What stands there under our generation is not signed by us.
                return await self._publish_new(known.table, known.digest, lease, known, number)
            # Another reconciler published meanwhile; the next publish compares with its table.
            self._known = None
            raise Transient(
                f"refreshing routes: Redis holds another table, of generation {number}; "
                f"ours is {known.table.generation}"
            )
        return known.table.generation

    async def _write(self, current: _Current, lease: Held, *, whole: bool) -> tuple[str, int]:
        generation = current.table.generation
        holding = lease.require()
        # A clock that was set back must not make an unchanged table look older.
        self._said_at = max(self._now(), self._said_at)
        freshness = seal(Freshness(generation=generation, at=self._said_at), self._key)
        args: list[bytes | int | str] = [
            generation,
            holding.generation,
            freshness,
            current.envelope[-SIGNATURE_BYTES:],
        ]
        if whole:
            args += [current.envelope, self._keep_ms, redis_keys.ROUTES_CHANNEL]
        async with answered("publishing routes", self._timeout_s):
            word, number = await self._script(
                keys=[
                    redis_keys.ROUTES_CURRENT,
                    redis_keys.ROUTES_GENERATION,
                    redis_keys.LEASE_GENERATION,
                    redis_keys.ROUTES_FRESH,
                    redis_keys.routes(generation),
                ],
                args=args,
            )
        if word == b"fenced":
            raise Fenced(
                f"routes: a reconciler with lease generation {number} came after ours, "
                f"{holding.generation}; nothing was written"
            )
        return word.decode(), number

    async def _load(self) -> _Current | None:
        """What is current, looked up again where Redis knows a newer one than we do."""
        known = self._known
        first = known is None
        if first:
            known = self._opened(await asyncio.to_thread(table_file.read, self._path))
        try:
            async with answered("reading routes", self._timeout_s):
                newest = _number(await self._get(redis_keys.ROUTES_GENERATION))
                if first or known is None or newest > known.table.generation:
                    there = self._opened(await self._get(redis_keys.ROUTES_CURRENT))
                    # Of two with one generation, the one that routers have seen counts.
                    if there and (not known or there.table.generation >= known.table.generation):
                        known = there
        except Transient:
            if known is None:
                raise
        self._known = known
        return known

    async def _get(self, key: str) -> bytes | None:
        """As GET, but a value of another type is none."""
        (value,) = await self._redis.mget([key])
        return value if isinstance(value, bytes) else None

    def _opened(self, envelope: bytes | None) -> _Current | None:
        """None also for bytes that we did not sign: they are replaced by the next table."""
        if envelope is None:
            return None
        try:
            table = unseal(envelope, RoutingTable, self._key.public_key())
        except EnvelopeInvalid:
            return None
        return _Current(table, envelope, content_digest(table))


def _number(value: bytes | None) -> int:
    try:
        return int(value or 0)
    except ValueError:
        return 0
