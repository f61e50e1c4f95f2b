"""This process's part of counters that all routers share: leased ahead, used without asking, given back.

The shared counter stays exact: what is leased is counted as used until it is given back, and whatever
is not known (an answer that never came, a router that died) counts as used until it expires. Pure: time is
passed in, messages are built and read here, and somebody else carries them (limiter). Not here: which counters a
request needs (limits), or the counting across routers (shared_limits.lua).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Literal

import msgspec

from router.core.pocket import Pocket
from router.core.shares import (
    FIRST_LEASE,
    WINDOW_S,
    Amounts,
    Ask,
    Failing,
    Limit,
    Share,
    Wants,
    take,
)

HOLD_S: Final = 10.0
"""What a router holds (slots, reservations) is free again so long after its last word."""
RENEW_S: Final = 3.0
TELL_S: Final = 1.0
"""How long a change may wait to be told where there is plenty left."""
MEMBER_S: Final = 15.0
"""A router counts among those that share the limits for so long after its last word."""
MOST_SHARES: Final = 256
"""Told of in one message, besides those that requests wait for."""
_LARGEST_LEASE: Final = 2**44
_RELIEF_S: Final = 0.02
"""How long a refusal is repeated without asking where something may be given back at any time."""


_decode: Final = msgspec.msgpack.Decoder(
    tuple[int, str, int, list[tuple[int, int, int, int]], list[list[int]]]
).decode
"""An answer: the store's clock (ms), its epoch, how many routers, counters, what becomes of each ask."""
_encode: Final = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class Message:
    """What is sent to the store, and what is needed to read its answer."""

    keys: list[str]
    body: bytes
    shares: list[Share]
    asks: list[Ask]
    sent_at: float
    charged: list[list[int]]
    """By share: seconds and amounts that were to be added; those above 0 must not be lost."""
    used: list[int]
    """By share, when the message was made."""
    tells_all: bool
    """Whether it says what was let in while the store was away."""


Verdict = Literal["granted", "refused", "pending"]


@dataclass(slots=True)
class Book:
    """All shares of one process, and the conversation with the store. `now` is a monotonic clock's."""

    me: str
    epoch_key: str
    routers_key: str
    expected_routers: int = 1
    shares: dict[str, Share] = field(default_factory=dict)
    routers: int = 0
    """That share the limits; 0: never heard."""
    away: bool = False
    pockets: set[Pocket] = field(default_factory=set)
    """That may hold something. Nothing is said or heard of shares before they are empty."""
    news: dict[int, Share] = field(default_factory=dict)
    """Shares that the next message tells of, by identity. Not empty: better now than later."""
    _epoch: str = ""
    _offset_s: float = 0.0
    """The store's clock less ours."""
    _messages: int = 0
    _told_at: float = float("-inf")

    def share(self, limit: Limit) -> Share:
        """The process's share of this counter, with the newest limit."""
        found = self.shares.get(limit.key)
        if found is None:
            found = self.shares[limit.key] = Share(limit)
        elif found.limit != limit:
            found.free += limit.limit - found.limit.limit
            found.set_limit(limit)
            found.blocked_until = 0.0
        return found

    def forget(self, keep: Iterable[str]) -> None:
        """Shares that no plan names any more, once nothing runs under them."""
        self.empty_pockets()
        kept = set(keep)
        for key in [k for k in self.shares if k not in kept]:
            share = self.shares[key]
            held = share.window if share.is_rate else share.used
            if not share.pool and not share.dirty and not held:
                del self.shares[key]

    # Beginnings and ends of requests

    def take(self, pocket: Pocket, amounts: Amounts, now: float) -> bool:
        """All of what a request needs that its pocket does not have, from what is leased here; or nothing."""
        pocket.empty(self)
        if not take(pocket.wants, amounts, now):
            if not self.pockets:
                return False
            self.empty_pockets()
            if not take(pocket.wants, amounts, now):
                return False
        pocket.fill(amounts, now)
        if pocket.is_open:
            self.pockets.add(pocket)
        return True

    def empty_pockets(self) -> None:
        """Leaves every share as if each request had taken its own."""
        for pocket in self.pockets:
            pocket.empty(self)
        self.pockets.clear()

    def settle_tokens(self, share: Share, estimated: int, actual: int, admitted_at: float) -> None:
        """Corrects a rate of tokens at a request's end."""
        apart = share.apart_since is not None and admitted_at >= share.apart_since
        if actual < estimated:
            # In the second of the admission or before it: what is given back too early expires early.
            second = int(admitted_at + self._offset_s) if self._offset_s else 0
            if not apart:
                corrections = share.corrections
                corrections[second] = corrections.get(second, 0) + actual - estimated
            share.dirty = True
            share.unlog(admitted_at, estimated - actual)
            share.blocked_until = 0.0
            if share.free < share.tight_below:
                self.news[id(share)] = share
        elif actual > estimated:
            share.used += actual - estimated
            if share.apart_since is None:
                share.correct(0, actual - estimated)

    def release(self, share: Share, amount: int, spent: int = 0, unused: int | None = None) -> None:
        """Slots or reservations are free again; of a budget, `spent` is gone for good.

        `unused`: of the amount, where it is not the rest: of several requests, one may have spent more.
        """
        share.used -= amount
        share.spent += spent
        share.blocked_until = 0.0
        if unused is None:
            unused = amount - spent
        if unused > 0 and share.free >= share.tight_below and not self.away:
            share.pool += unused
        share.dirty = True
        if share.free < share.tight_below:
            self.news[id(share)] = share

    # Messages

    def look(self, now: float) -> bool:
        """Looks through all shares for what the store should hear: something changed, or it might think
        us dead. Whether there is anything. Call it every quarter of a second or so.
        """
        self.empty_pockets()
        for share in self.shares.values():
            if share.is_rate:
                if share.used != share.logged or share.window:
                    share.log(now)
            elif (share.used or share.pool) and now - share.renewed_at >= RENEW_S:
                share.dirty = True
            share.expire(now)
            if share.dirty and (now - share.renewed_at >= TELL_S or share.free < share.tight_below):
                self.news[id(share)] = share
        return bool(self.news)

    def leave(self) -> None:
        """Gives back all that is not used, before the end."""
        self.empty_pockets()
        for share in self.shares.values():
            share.empty_pool()
            if share.dirty:
                self.news[id(share)] = share

    def is_renewal_due(self, now: float) -> bool:
        """Whether the store should hear that this process lives."""
        return now - self._told_at >= RENEW_S

    def recall(self, key: str) -> bool:
        """Another router needs what is unused here. False: there is no such share."""
        self.empty_pockets()
        share = self.shares.get(key)
        if share is None:
            return False
        share.empty_pool()
        share.lease = FIRST_LEASE
        self.news[id(share)] = share
        return True

    def message(self, asks: Sequence[Ask], now: float, now_ms: int = 0) -> Message:
        """The news, and what these requests need. Send it, then `answered` or `unanswered`.

        `now_ms` is what the store is to take for the time; 0: its own clock.
        """
        self.empty_pockets()
        shares: dict[int, int] = {}
        order: list[Share] = []
        wanted: dict[int, int] = {}
        for ask in asks:
            for (share, _), need in zip(ask.wants, ask.needs, strict=True):
                if need:
                    name = id(share)
                    if name not in shares:
                        order.append(share)
                        shares[name] = len(order)
                    wanted[name] = max(wanted.get(name, 0), need)
        for name in list(islice(self.news, MOST_SHARES)):
            share = self.news.pop(name)
            if name not in shares:
                order.append(share)
                shares[name] = len(order)
        keys = [self.epoch_key, self.routers_key, *(share.limit.key for share in order)]
        counters, charged, used = [], [], []
        for share in order:
            share.expire(now)
            limit = share.limit
            lease = max(share.lease, FIRST_LEASE * wanted[id(share)]) if id(share) in wanted else 0
            left_ms = int((share.pool_until - now) * 1000) if share.pool else 0
            ledger = 0
            if limit.ledger:
                keys.append(limit.ledger)
                ledger = len(keys)
            flat: list[int] = [part for pair in share.corrections.items() for part in pair]
            charged.append(flat)
            if share.apart_since is not None:
                flat = [*flat, *share.taken_apart(now)]
            used.append(share.used)
            part = 1 if limit.role == "budget_usd" else 2
            a: object = flat if share.is_rate else share.used
            counters.append(
                (
                    *(0 if share.is_rate else 1, limit.limit, lease, share.pool, left_ms, a),
                    *(share.spent, ledger, limit.tenant, part),
                )
            )
            share.corrections = {}
            share.dirty = False
            share.renewed_at = now
        flat_asks = [
            [
                part
                for (share, _), need in zip(ask.wants, ask.needs, strict=True)
                if need
                for part in (shares[id(share)], need)
            ]
            for ask in asks
        ]
        # Another one each time: a store that forgets twice must not come by the same again.
        self._messages += 1
        epoch_if_none = f"{self.me}.{self._messages}"
        body = _encode(
            (
                *(self.me, int(HOLD_S * 1000), int(MEMBER_S * 1000), epoch_if_none),
                *(counters, flat_asks, now_ms, self._epoch),
            )
        )
        self._told_at = now
        return Message(keys, body, order, list(asks), now, charged, used, self.away)

    def answered(
        self, message: Message, data: bytes, now: float
    ) -> list[tuple[Verdict, list[Failing]]]:
        """Reads the store's answer; for each ask what became of it.

        Raises:
            msgspec.DecodeError: it is no answer; treat it as none.
        """
        self.empty_pockets()
        now_ms, epoch, self.routers, counters, asks = _decode(data)
        # By the earlier end of the conversation, so that a lease ends here no later than there.
        self._offset_s = now_ms / 1000 - now
        if self._epoch and epoch != self._epoch:
            self._tell_all(now)
        self._epoch = epoch
        if self.away and message.tells_all:
            self.away = False
            for share in self.shares.values():
                share.outage_base = None
        for share, used in zip(message.shares, message.used, strict=True):
            if share.apart_since is not None:
                share.apart_since = None
                if share.is_rate:
                    share.correct(0, share.used - used)
        for share, (extra, life_ms, free, spent) in zip(message.shares, counters, strict=True):
            share.free, share.spent_by_all = free, spent
            if extra:
                until = message.sent_at + life_ms / 1000
                bucket = (now_ms + life_ms) // 1000
                if share.pool and share.pool_until > now:
                    share.pool_until = min(share.pool_until, until)
                    share.bucket = min(share.bucket, bucket)
                else:
                    # It was used up before its time: a larger one would have saved a question.
                    if now < share.pool_until:
                        share.lease = min(_LARGEST_LEASE, max(share.lease, extra) * 2)
                    share.empty_pool()
                    share.pool_until, share.bucket = until, bucket
                share.pool += extra
                if self.away:
                    # A late answer: the store does not know yet what was let in without it.
                    share.empty_pool()
        return [
            self._verdict(message, ask, said, now)
            for ask, said in zip(message.asks, asks, strict=True)
        ]

    def _verdict(
        self, message: Message, ask: Ask, said: list[int], now: float
    ) -> tuple[Verdict, list[Failing]]:
        if said[0] == 1:
            ask.granted()
            return "granted", []
        ask.put_back()
        failing = []
        for at, wait_ms in zip(said[1::2], said[2::2], strict=True):
            share = message.shares[at - 1]
            unit = next(u for s, u in ask.wants if s is share)
            wait_s = wait_ms / 1000 if wait_ms > 0 else None
            failing.append(Failing(share, ask.amounts[unit], wait_s, never=wait_ms < 0))
            if said[0] == 0 and wait_ms >= 0:
                relief_s = wait_s if share.limit.role == "requests" and wait_s else _RELIEF_S
                share.blocked_until = now + min(relief_s, 1.0)
                share.blocked_wait_s = now + wait_s if wait_s else 0.0
                share.blocked_amount = ask.amounts[unit]
        return ("refused" if said[0] == 0 else "pending"), failing

    def unanswered(self, message: Message) -> None:
        """No answer came: nobody knows whether it was read. What it added must not be lost."""
        self.empty_pockets()
        for share, flat in zip(message.shares, message.charged, strict=True):
            for second, amount in zip(flat[::2], flat[1::2], strict=True):
                if amount > 0:
                    share.correct(second, amount)
            self.news[id(share)] = share
        for ask in message.asks:
            ask.put_back()

    def _tell_all(self, now: float) -> None:
        """The store has forgotten everything: says again what was taken here."""
        for share in self.shares.values():
            share.pool = 0
            share.blocked_until = 0.0
            self.news[id(share)] = share
            if share.is_rate:
                share.log(now)
                share.apart_since = None
                share.corrections = {}
                for second, amount in share.window:
                    share.correct(min(0, second - int(now)), amount)

    # Without the store

    def lost(self) -> None:
        """The store does not answer: from now on requests go by this process's part of each limit."""
        if self.away:
            return
        self.empty_pockets()
        self.away = True
        for share in self.shares.values():
            if not share.is_rate:
                rest = max(0, share.free) // self.sharers + share.pool
                share.outage_base = share.used + share.spent, rest
            share.pool = 0
            share.blocked_until = 0.0

    @property
    def sharers(self) -> int:
        return max(self.routers, self.expected_routers, 1)

    def part_of(self, limit: int) -> int:
        """This process's part of a limit: never nothing of something."""
        return max(1, limit // self.sharers) if limit else 0

    def take_part(self, wants: Wants, amounts: Amounts, now: float) -> Failing | None:
        """Takes from this process's part of each limit; None when it could."""
        for share, unit in wants:
            amount = amounts[unit]
            part = self.part_of(share.limit.limit)
            if share.is_rate:
                share.log(now)
                if share.window_total + amount > part:
                    return Failing(share, amount, self._room_s(share, amount, part, now))
            elif share.limit.role == "concurrent":
                if share.used + amount > part:
                    return Failing(share, amount, None)
            else:
                base, rest = share.outage_base or (0, self.part_of(share.free))
                if share.used + share.spent - base + amount > rest:
                    return Failing(share, amount, None)
        for share, unit in wants:
            share.used += amounts[unit]
            if share.is_rate:
                if share.apart_since is None:
                    share.apart_since = int(now)
                share.log(now)
            self.news[id(share)] = share
        return None

    def _room_s(self, share: Share, amount: int, part: int, now: float) -> float | None:
        total = share.window_total
        for second, taken in share.window:
            total -= taken
            if total + amount <= part:
                return max(0.001, second + WINDOW_S + 1 - now)
        return None
