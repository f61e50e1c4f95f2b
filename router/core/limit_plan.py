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


class _Lines:
    """Headers but for what is in the pocket: text, what remains of requests, text, of tokens, text.

    Below 0: there is no such limit, and no text on that side of it.
    """

    __slots__ = ("begin", "between", "end", "requests", "tokens")

    def __init__(self) -> None:
        self.begin = self.between = self.end = ""
        self.requests = self.tokens = -1

    def with_pocket(self, requests: int, tokens: int) -> bytes:
        """Whole, with what is in the pocket."""
        if self.tokens < 0:
            number = "" if self.requests < 0 else str(self.requests + requests)
            return f"{self.begin}{number}{self.end}".encode()
        if self.requests < 0:
            return f"{self.begin}{self.tokens + tokens}{self.end}".encode()
        return (
            f"{self.begin}{self.requests + requests}{self.between}{self.tokens + tokens}{self.end}"
        ).encode()


def _around(share: Share) -> tuple[str, str]:
    """What stands before and after the number that remains."""
    what = share.limit.role
    return (
        f"x-ratelimit-limit-{what}: {share.limit.limit}\r\nx-ratelimit-remaining-{what}: ",
        f"\r\nx-ratelimit-reset-{what}: {_RESET}\r\n",
    )


class Plan:
    """What requests of one key for one function stand under."""

    __slots__ = (
        "_lines",
        "_lines_for",
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
        own = [s for s, _ in wants if s.is_rate and s.limit.level != "function"]
        self.requests = [share for share in own if share.limit.role == "requests"]
        self.tokens = [share for share in own if share.limit.role == "tokens"]
        self._lines, self._lines_for = _Lines(), 0
        """Of the headers, and for which filling of the pocket they were made."""

    def amounts(self, input_tokens: int, output_tokens: int) -> Amounts:
        """What a request takes that needs so many tokens at most."""
        price = price_nano_usd(self.price, input_tokens, output_tokens) if self.has_usd else 0
        return 1, input_tokens + output_tokens, price

    def headers(self, remaining: Callable[[Share], int]) -> bytes:
        """As `Admission.headers`. While the pocket is open all but what is in it stays as it is."""
        pocket = self.pocket
        if not pocket.is_open:
            return self._narrowest(remaining).with_pocket(0, 0)
        if self._lines_for != pocket.filled:
            self._lines = self._narrowest(remaining)
            self._lines_for = pocket.filled
        return self._lines.with_pocket(pocket.requests, pocket.tokens)

    def _narrowest(self, remaining: Callable[[Share], int]) -> _Lines:
        out = _Lines()
        if self.requests:
            out.requests, share = min([(remaining(s), s) for s in self.requests], key=itemgetter(0))
            out.begin, out.end = _around(share)
        if self.tokens:
            out.tokens, share = min([(remaining(s), s) for s in self.tokens], key=itemgetter(0))
            before, after = _around(share)
            if self.requests:
                out.between, out.end = out.end + before, after
            else:
                out.begin, out.end = before, after
        for share in self.budgets:
            percent = 100 * share.spent_by_all / share.limit.limit if share.limit.limit else 100.0
            if percent >= self.soft_percent:
                out.end += f"x-detoserve-budget: {int(min(100, percent))}%\r\n"
                break
        return out
