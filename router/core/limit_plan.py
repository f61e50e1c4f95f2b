"""What the requests of one key for one function stand under, and how their answers show it. Pure.

Made once a table. Not here: which ceilings these are (limits), or the counting (shares, pocket).
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Final

from router.core.limits import price_nano_usd
from router.core.pocket import Pocket
from router.core.shares import Amounts, Share, Wants
from schemas.wire.routing import Price

_RESET: Final = "1m1s"
"""When a window is whole again if nothing more is sent: this request leaves it last."""


class _Shown:
    """A rate as its headers show it: `line` but for what remains of it."""

    __slots__ = ("line", "share")

    def __init__(self, share: Share) -> None:
        self.share = share
        what = share.limit.role
        self.line = (
            f"x-ratelimit-limit-{what}: {share.limit.limit}\r\n"
            f"x-ratelimit-remaining-{what}: %d\r\nx-ratelimit-reset-{what}: {_RESET}\r\n"
        ).encode()


class Plan:
    """What requests of one key for one function stand under."""

    __slots__ = (
        "_lines",
        "_lines_for",
        "_rests",
        "budgets",
        "ends",
        "has_usd",
        "pocket",
        "price",
        "requests",
        "soft_percent",
        "tokens",
        "wants",
    )

    def __init__(self, wants: Wants, price: Price, soft_percent: float) -> None:
        self.wants = wants
        self.pocket = Pocket(wants)
        self.price = price
        self.soft_percent = soft_percent
        shares = [share for share, _ in wants]
        self.has_usd = any(s.limit.role == "budget_usd" for s in shares)
        self.budgets = [s for s in shares if s.limit.role in ("budget_usd", "budget_tokens")]
        self.ends = any(s.limit.role != "requests" for s in shares)
        """Whether anything is to be given back."""
        # A function's are everybody's: what is left of them is nobody's business.
        own = [_Shown(s) for s, _ in wants if s.is_rate and s.limit.level != "function"]
        self.requests = [shown for shown in own if shown.share.limit.role == "requests"]
        self.tokens = [shown for shown in own if shown.share.limit.role == "tokens"]
        self._lines, self._lines_for = b"", 0
        """Of the headers, and for which filling of the pocket they were made."""
        self._rests: tuple[int, ...] = ()
        """What remained besides the pocket, in the order of the lines."""

    def amounts(self, input_tokens: int, output_tokens: int) -> Amounts:
        """What a request takes that needs so many tokens at most."""
        price = price_nano_usd(self.price, input_tokens, output_tokens) if self.has_usd else 0
        return 1, input_tokens + output_tokens, price

    def headers(self, remaining: Callable[[Share], int]) -> bytes:
        """As `Admission.headers`. While the pocket is open all but what is in it stays as it is."""
        pocket = self.pocket
        if not pocket.is_open:
            lines, rests = self._narrowest(remaining)
            return lines % rests
        if self._lines_for != pocket.filled:
            self._lines, self._rests = self._narrowest(remaining)
            self._lines_for = pocket.filled
        rests = self._rests
        if len(rests) > 1:
            return self._lines % (rests[0] + pocket.requests, rests[1] + pocket.tokens)
        inside = pocket.requests if self.requests else pocket.tokens
        return self._lines % tuple([rest + inside for rest in rests])

    def _narrowest(self, remaining: Callable[[Share], int]) -> tuple[bytes, tuple[int, ...]]:
        lines, rests = b"", []
        for rates in (self.requests, self.tokens):
            if rates:
                left, shown = min([(remaining(s.share), s) for s in rates], key=itemgetter(0))
                lines += shown.line
                rests.append(left)
        for share in self.budgets:
            percent = 100 * share.spent_by_all / share.limit.limit if share.limit.limit else 100.0
            if percent >= self.soft_percent:
                lines += b"x-detoserve-budget: %d%%%%\r\n" % min(100, percent)
                break
        return lines, tuple(rests)
