"""Who may write: a lease in Redis with a fencing generation.

Of several reconcilers one holds the lease. Each taking of it gets a generation greater than all
before, and every writer (routes, status branch) refuses an older generation than it has seen: a
holder that slept through its lease can do no harm however late it wakes. An emptied Redis cannot
turn the generation back, because whoever takes the lease passes the newest one known elsewhere.

Not here: what is written under it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, Self

from redis.asyncio import Redis

from reconciler.ending import end
from reconciler.errors import Fenced, Stalled, Transient, Waiting
from reconciler.publish.redis_edge import answered
from schemas.wire.redis_keys import LEASE, LEASE_GENERATION


def boottime_s() -> float:
    """Seconds that no clock change moves and that go on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseHeld(Waiting):
    """Another reconciler holds it; ask again when it could have run out."""

    def __init__(self, holder: str, generation: int, *, retry_after_s: float) -> None:
        super().__init__(
            f"{holder} holds the lease, generation {generation}", retry_after_s=retry_after_s
        )
        self.holder = holder
        self.generation = generation


class LeaseLost(Fenced):
    """It ran out or was taken; nothing may be written until it is acquired anew."""


class Held(Protocol):
    """What a writer asks right before it writes."""

    def require(self) -> Lease:
        """The lease, if it surely still holds.

        Raises:
            LeaseLost: it may have run out.
        """
        ...


@dataclass(frozen=True, slots=True)
class Lease:
    """One holding. `expires_at` is on this machine's boot-time clock, and on the safe side."""

    generation: int
    expires_at: float
    owner: str

    def require(self) -> Lease:
        if boottime_s() >= self.expires_at:
            raise LeaseLost(f"lease generation {self.generation} may have run out")
        return self


# Both scripts: KEYS lease, lease:generation. Everything under these names is ours and can be rebuilt,
# so a key of the wrong type counts as an emptied one.
_PRELUDE: Final = """
local function drop_unless(key, kind)
  local is = redis.call('TYPE', key)['ok']
  if is ~= kind and is ~= 'none' then redis.call('DEL', key) end
end
drop_unless(KEYS[1], 'hash')
drop_unless(KEYS[2], 'string')
local newest = tonumber(redis.call('GET', KEYS[2]) or '0') or 0
local holder = redis.call('HGET', KEYS[1], 'holder')
local held = tonumber(redis.call('HGET', KEYS[1], 'generation') or '0') or 0
local left_ms = redis.call('PTTL', KEYS[1])
if left_ms <= 0 then holder = false end
local function hold(generation)
  redis.call('SET', KEYS[2], string.format('%d', generation))
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'generation', string.format('%d', generation))
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
"""

_ACQUIRE: Final = (
    _PRELUDE
    + """
-- ARGV owner, ttl in ms, floor
if holder and holder ~= ARGV[1] then return {0, holder, held, left_ms} end
local generation = math.max(newest, held, tonumber(ARGV[3])) + 1
hold(generation)
return {1, ARGV[1], generation, tonumber(ARGV[2])}
"""
)

# A lease that ran out, or that Redis forgot, is taken up again as long as nobody came between.
_RENEW: Final = (
    _PRELUDE
    + """
-- ARGV owner, ttl in ms, generation
local mine = tonumber(ARGV[3])
if newest > mine then return {0, holder or '', newest, left_ms} end
if holder and (holder ~= ARGV[1] or held ~= mine) then return {0, holder, held, left_ms} end
hold(mine)
return {1, ARGV[1], mine, tonumber(ARGV[2])}
"""
)

_RELEASE: Final = (
    _PRELUDE
    + """
-- ARGV owner, unused, generation
if holder == ARGV[1] and held == tonumber(ARGV[3]) then redis.call('DEL', KEYS[1]) end
return {1, ARGV[1], held, 0}
"""
)


class Leaser:
    """Acquires, renews and releases, each in one atomic step.

    Args:
        redis: where the lease is.
        owner: unique to this process, readable to people (host, pid, a random part).
        ttl_s: how long a holding lasts without renewal.
        timeout_s: bound on one conversation with Redis.
    """

    def __init__(
        self, redis: Redis, owner: str, *, ttl_s: float = 15.0, timeout_s: float = 2.0
    ) -> None:
        if not 0 < timeout_s < ttl_s:
            raise ValueError("timeout_s must be shorter than ttl_s, or no lease could be renewed")
        self.owner = owner
        self.ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._acquire = redis.register_script(_ACQUIRE)
        self._renew = redis.register_script(_RENEW)
        self._release = redis.register_script(_RELEASE)

    async def acquire(self, floor: int = 0) -> Lease:
        """A new holding, of a generation above every one Redis knows and above `floor`.

        Args:
            floor: the newest generation known from elsewhere (status branch, state file).

        Raises:
            LeaseHeld: by another.
            Transient: Redis did not answer.
        """
        asked_at = boottime_s()
        async with answered("acquiring the lease", self._timeout_s):
            taken, holder, generation, left_ms = await self._acquire(
                keys=[LEASE, LEASE_GENERATION], args=[self.owner, self._ttl_ms, floor]
            )
        if not taken:
            raise LeaseHeld(
                holder.decode(errors="replace"), generation, retry_after_s=max(left_ms, 0) / 1000
            )
        return Lease(generation, asked_at + self.ttl_s, self.owner)

    async def renew(self, lease: Lease) -> Lease:
        """The same holding for another `ttl_s`.

        Raises:
            LeaseLost: somebody else took it; this generation will never hold again.
            Transient: Redis did not answer.
        """
        asked_at = boottime_s()
        async with answered("renewing the lease", self._timeout_s):
            kept, holder, generation, _ = await self._renew(
                keys=[LEASE, LEASE_GENERATION], args=[self.owner, self._ttl_ms, lease.generation]
            )
        if not kept:
            who = holder.decode(errors="replace") or "another reconciler"
            raise LeaseLost(
                f"{who} took the lease with generation {generation}; ours was {lease.generation}"
            )
        return Lease(lease.generation, asked_at + self.ttl_s, self.owner)

    async def release(self, lease: Lease) -> None:
        """Lets another take it at once. Not ours any more: nothing happens.

        Raises:
            Transient: Redis did not answer; the lease then runs out by itself.
        """
        async with answered("releasing the lease", self._timeout_s):
            await self._release(
                keys=[LEASE, LEASE_GENERATION], args=[self.owner, self._ttl_ms, lease.generation]
            )

    @property
    def _ttl_ms(self) -> int:
        return int(self.ttl_s * 1000)


class LeaseHolder:
    """One holding kept alive in the background, from `acquired` until it is lost or closed.

    `lost` tells why it ended; `on_lost` is called once when it does.
    """

    def __init__(
        self, leaser: Leaser, lease: Lease, *, on_lost: Callable[[LeaseLost], None] | None = None
    ) -> None:
        self._leaser = leaser
        self._lease = lease
        self._on_lost = on_lost
        self._task: asyncio.Task[None] | None = None
        self.lost: LeaseLost | None = None

    @classmethod
    async def acquired(
        cls,
        leaser: Leaser,
        floor: int = 0,
        *,
        on_lost: Callable[[LeaseLost], None] | None = None,
    ) -> Self:
        """Acquires and starts renewing; raises as `Leaser.acquire`."""
        holder = cls(leaser, await leaser.acquire(floor), on_lost=on_lost)
        holder._task = asyncio.create_task(holder._keep(), name="lease")
        return holder

    def require(self) -> Lease:
        if self.lost is not None:
            raise LeaseLost(str(self.lost))
        return self._lease.require()

    async def close(self) -> None:
        """Stops renewing and releases; an unreachable Redis is no error here."""
        if self._task is not None:
            await end([self._task])
        if self.lost is None:
            self.lost = LeaseLost(f"lease generation {self._lease.generation} was released")
            try:
                await self._leaser.release(self._lease)
            except (Transient, Stalled):
                return

    async def _keep(self) -> None:
        pause_s = self._leaser.ttl_s / 3
        while True:
            await asyncio.sleep(pause_s)
            try:
                self._lease = await self._leaser.renew(self._lease)
                pause_s = self._leaser.ttl_s / 3
            except LeaseLost as lost:
                self.lost = lost
                if self._on_lost is not None:
                    self._on_lost(lost)
                return
            except (Transient, Stalled):
                # Writers stop by themselves when it runs out; it may come back with Redis.
                pause_s = self._leaser.ttl_s / 15
