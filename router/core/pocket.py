"""What the next requests of one plan need, taken out of its shares at once.

A request under limits at three levels and a budget touches ten shares when it comes and when it ends.
Out of a pocket it changes three numbers, and the shares hear of many requests together. Only where
there is plenty, and never while anything is said to the store or heard from it: the Book empties
pockets first, which leaves every share as if each request had taken its own. Pure. Not here: when
that is (leases).
"""

from __future__ import annotations

from typing import Final, Protocol, get_args

from router.core.shares import Amounts, Role, Share, Wants, take

_BUSY: Final = 8
"""Requests in one second from which on a pocket is worth filling."""
_MOST: Final = 64
_FEWEST: Final = 8
"""Requests that a pocket is filled for."""
_MOST_SLOTS: Final = 64
_FEWEST_SLOTS: Final = 4
_PLENTY: Final = 2**62
"""Of what nothing limits."""


class Ends(Protocol):
    """Where ends of requests are noted in shares."""

    def settle_tokens(self, share: Share, estimated: int, actual: int, admitted_at: float) -> None:
        """Corrects a rate of tokens."""

    def release(self, share: Share, amount: int, spent: int = 0, unused: int | None = None) -> None:
        """Slots or reservations are free again."""


class Pocket:
    """For requests under the same shares. `is_open`: it holds something of theirs."""

    __slots__ = (
        "_by_units",
        "_ended",
        "_in_tokens",
        "_in_usd",
        "_rates",
        "_second",
        "_seen",
        "_slots",
        "_until",
        "filled",
        "is_open",
        "nano_usd",
        "requests",
        "slots",
        "tokens",
        "wants",
    )

    def __init__(self, wants: Wants) -> None:
        self.wants = wants
        self.is_open = False
        self.filled = 0
        """How often; so that others know whether what they made of it is still true."""
        self.requests = self.slots = self.tokens = self.nano_usd = 0
        """What can be taken."""
        self._ended: list[tuple[Amounts, int, int, float]] = []
        """Requests that have ended since it was opened, of it or not: what each had taken, tokens and
        nano-USD that it used, and when it was admitted."""
        of_role = {role: [s for s, _ in wants if s.limit.role == role] for role in get_args(Role)}
        self._slots, self._rates = of_role["concurrent"], of_role["tokens"]
        self._in_usd, self._in_tokens = of_role["budget_usd"], of_role["budget_tokens"]
        self._by_units = tuple(want for want in wants if want[0] not in self._slots)
        self._until = 0.0
        self._second = self._seen = 0

    def take(self, amounts: Amounts, now: float) -> bool:
        """One request's amounts, or nothing."""
        _, tokens, nano_usd = amounts
        if not self.requests or not self.slots or now >= self._until:
            return False
        if tokens > self.tokens or nano_usd > self.nano_usd:
            return False
        self.requests -= 1
        self.slots -= 1
        self.tokens -= tokens
        self.nano_usd -= nano_usd
        return True

    def end(
        self, ends: Ends, amounts: Amounts, tokens: int, nano_usd: int, admitted_at: float
    ) -> None:
        """A request that took these amounts has ended and used so much; noted later while it is open."""
        if self.is_open:
            self.slots += 1
            self._ended.append((amounts, tokens, nano_usd, admitted_at))
            return
        for share in self._slots:
            ends.release(share, 1)
        self._note(ends, [(amounts, tokens, nano_usd, admitted_at)])

    def fill(self, amounts: Amounts, now: float) -> None:
        """Takes out what many requests like this one would need, if they come often and there is plenty.

        At most half of what is leased: others stand under the same shares.
        """
        second = int(now)
        if second != self._second:
            self._second, self._seen = second, 0
        self._seen += 1
        if self._seen < _BUSY or self.is_open:
            return
        many, until = _MOST, now + 1
        for share, unit in self._by_units:
            amount = amounts[unit]
            if share.free < share.tight_below:
                return
            if amount:
                many = min(many, share.pool // (2 * amount))
                until = min(until, share.pool_until)
        slots = _MOST_SLOTS
        for share in self._slots:
            if share.free < share.tight_below:
                return
            slots = min(slots, share.pool // 2)
            until = min(until, share.pool_until)
        out = many, many * amounts[1], many * amounts[2]
        if many < _FEWEST or slots < _FEWEST_SLOTS or not take(self._by_units, out, now):
            return
        for share in self._slots:
            share.pool -= slots
            share.used += slots
        self.requests, self.tokens, self.nano_usd = out
        self.slots = slots if self._slots else _PLENTY
        self._until = until
        self.is_open = True
        self.filled += 1

    def empty(self, ends: Ends) -> None:
        """Puts back what was not taken, and notes all ends in the shares."""
        if not self.is_open:
            return
        self.is_open = False
        left = self.requests, self.tokens, self.nano_usd
        for share, unit in self._by_units:
            share.pool += left[unit]
            share.used -= left[unit]
        for share in self._slots:
            ends.release(share, self.slots)
        self.requests = self.slots = self.tokens = self.nano_usd = 0
        if self._ended:
            ended, self._ended = self._ended, []
            self._note(ends, ended)

    def _note(self, ends: Ends, ended: list[tuple[Amounts, int, int, float]]) -> None:
        freed: dict[int, int] = {}
        more = tokens_held = tokens_used = usd_held = usd_used = usd_unused = 0
        for (_, held, reserved), tokens, nano_usd, admitted_at in ended:
            tokens_held += held
            tokens_used += tokens
            if tokens < held:
                second = int(admitted_at)
                freed[second] = freed.get(second, 0) + held - tokens
            else:
                more += tokens - held
            usd_held += reserved
            usd_used += nano_usd
            if nano_usd < reserved:
                usd_unused += reserved - nano_usd
        for share in self._rates:
            for second, amount in freed.items():
                ends.settle_tokens(share, amount, 0, second)
            ends.settle_tokens(share, 0, more, self._until)
        for share in self._in_tokens:
            ends.release(share, tokens_held, tokens_used, sum(freed.values()))
        for share in self._in_usd:
            ends.release(share, usd_held, usd_used, usd_unused)
