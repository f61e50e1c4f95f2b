"""What one process has of counters that all routers share, and how a request takes its part of them.

Pure: time is passed in. Not here: how more is leased and what is told of it (leases), requests that
need not touch every share (pocket), or which counters a request needs (limits).
"""

from __future__ import annotations

from collections import deque
from typing import Final, Literal, NamedTuple

Role = Literal["requests", "tokens", "concurrent", "budget_usd", "budget_tokens"]
Level = Literal["tenant", "key", "function"]

WINDOW_S: Final = 60
FIRST_LEASE: Final = 16
_TIGHT_PART: Final = 16
"""Below this part of a limit what is given back is told at once: others may be waiting for it."""

Amounts = tuple[int, int, int]
"""What one request takes: 1, its tokens, its price in nano-USD."""


class Limit(NamedTuple):
    """One ceiling, as a plan of limits names it."""

    key: str
    """Of the shared counter."""
    role: Role
    level: Level
    limit: int
    unit: Literal[0, 1, 2]
    """Which of a request's Amounts it counts."""
    tenant: str = ""
    ledger: str = ""
    """For budgets: the hash of the months to date."""


class Share:
    """This process's part of one counter. Amounts are requests, tokens, slots or nano-USD."""

    __slots__ = (
        "apart_since",
        "blocked_amount",
        "blocked_until",
        "blocked_wait_s",
        "bucket",
        "corrections",
        "dirty",
        "free",
        "is_rate",
        "lease",
        "limit",
        "logged",
        "outage_base",
        "pool",
        "pool_until",
        "renewed_at",
        "spent",
        "spent_by_all",
        "tight_below",
        "used",
        "window",
        "window_total",
    )

    def __init__(self, limit: Limit) -> None:
        self.set_limit(limit)
        self.is_rate = limit.role in ("requests", "tokens")
        self.pool = 0
        """Leased and not used."""
        self.pool_until = 0.0
        self.bucket = 0
        """Second of the store that the pool is counted in."""
        self.used = 0
        """A rate: in all so far. Else: held by requests that run."""
        self.spent = 0
        """Of a budget, by this process; only grows."""
        self.spent_by_all = 0
        self.free = limit.limit
        """For all routers, when last heard."""
        self.lease = FIRST_LEASE
        self.corrections: dict[int, int] = {}
        """Second of the store (0 and less: from now) -> what it is to be changed by."""
        self.dirty = False
        self.renewed_at = 0.0
        self.blocked_until = 0.0
        self.blocked_amount = 0
        self.blocked_wait_s = 0.0
        self.window: deque[list[int]] = deque()
        """A rate: [second, taken here], for when the store is away or has forgotten."""
        self.window_total = 0
        self.logged = 0
        self.apart_since: int | None = None
        """A rate: the second since which the store knows nothing of what was taken here."""
        self.outage_base: tuple[int, int] | None = None
        """A budget while the store is away: (used and spent when it went, this process's part of the rest)."""

    def set_limit(self, limit: Limit) -> None:
        self.limit = limit
        self.tight_below = limit.limit // _TIGHT_PART + 1
        """With less free, others may be refused for want of what this process gives back."""

    def correct(self, second: int, amount: int) -> None:
        if amount:
            self.corrections[second] = self.corrections.get(second, 0) + amount
            self.dirty = True

    def log(self, now: float) -> None:
        """Notes what was taken since the last time, and forgets what is older than the window."""
        taken, second, window = self.used - self.logged, int(now), self.window
        if taken:
            if window and window[-1][0] == second:
                window[-1][1] += taken
            else:
                window.append([second, taken])
            self.window_total += taken
            self.logged = self.used
        while window and window[0][0] < second - WINDOW_S:
            self.window_total -= window.popleft()[1]

    def unlog(self, at: float, amount: int) -> None:
        """Less was taken at `at` than was noted."""
        found = None
        for entry in reversed(self.window):
            if entry[0] < int(at):
                break
            found = entry
        if found is not None:
            found[1] -= amount
            self.window_total -= amount

    def put_back(self, amount: int, until: float, bucket: int) -> None:
        """Into the pool again, as of the older of both leases: what expires early was counted long enough."""
        if self.pool:
            until, bucket = min(until, self.pool_until), min(bucket, self.bucket)
        self.pool += amount
        self.pool_until, self.bucket = until, bucket

    def taken_apart(self, now: float) -> list[int]:
        """What the store does not know of, as corrections by age: [-seconds, amount, ...]."""
        self.log(now)
        since = self.apart_since
        if since is None:
            return []
        known = [(second, taken) for second, taken in self.window if second >= since]
        return [part for second, taken in known for part in (second - int(now), taken)]

    def expire(self, now: float) -> None:
        """Gives back what was leased too long ago."""
        if self.pool and self.pool_until <= now:
            if self.pool * 2 > self.lease:
                self.lease = max(FIRST_LEASE, self.lease // 2)
            self.empty_pool()

    def empty_pool(self) -> None:
        """Gives back what is leased and not used."""
        if not self.pool:
            return
        if self.is_rate:
            self.correct(self.bucket, -self.pool)
        self.pool = 0
        self.dirty = True


Wants = tuple[tuple[Share, int], ...]
"""The shares a request needs, each with the index of its amount."""


def take(wants: Wants, amounts: Amounts, now: float) -> bool:
    """All of it from what is leased, or nothing."""
    for share, unit in wants:
        amount = amounts[unit]
        left = share.pool - amount
        if amount and (left < 0 or share.pool_until <= now):
            break  # what costs nothing needs no lease: a free model under a budget in USD
        share.pool = left
        share.used += amount
    else:
        return True
    for taken, unit in wants:
        if taken is share:
            break
        taken.pool += amounts[unit]
        taken.used -= amounts[unit]
    return False


class Failing(NamedTuple):
    """Why a request may not enter, and when it might (seconds; None: nobody knows)."""

    share: Share
    amount: int
    wait_s: float | None
    never: bool = False


def blocked(wants: Wants, amounts: Amounts, now: float) -> Failing | None:
    """The share that was out a moment ago and cannot have recovered."""
    for share, unit in wants:
        if share.blocked_until > now and amounts[unit] >= share.blocked_amount:
            left = share.blocked_wait_s - now
            return Failing(share, amounts[unit], left if share.blocked_wait_s else None)
        if amounts[unit] > share.limit.limit:
            return Failing(share, amounts[unit], None, never=True)
    return None


class Ask:
    """One request that needs more than is leased here."""

    __slots__ = ("amounts", "here", "leases", "needs", "wants")

    def __init__(self, wants: Wants, amounts: Amounts, now: float) -> None:
        """Takes what is here; the store is asked for the rest."""
        self.wants = wants
        self.amounts = amounts
        self.here: list[int] = []
        self.leases = [(share.pool_until, share.bucket) for share, _ in wants]
        self.needs: list[int] = []
        for share, unit in wants:
            here = min(share.pool, amounts[unit]) if share.pool_until > now else 0
            share.pool -= here
            self.here.append(here)
            self.needs.append(amounts[unit] - here)
            if not share.is_rate:
                # Held from now on, so that every message says so.
                share.used += here

    def granted(self) -> None:
        for (share, _), here, need in zip(self.wants, self.here, self.needs, strict=True):
            share.used += need + here if share.is_rate else need

    def put_back(self) -> None:
        """It is not admitted: what it took here is here again."""
        for (share, _), here, lease in zip(self.wants, self.here, self.leases, strict=True):
            if here:
                share.put_back(here, *lease)
                if not share.is_rate:
                    share.used -= here
                    share.dirty = True
        self.here = [0] * len(self.here)
