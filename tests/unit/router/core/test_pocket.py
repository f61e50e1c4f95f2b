"""A pocket changes what a request costs and nothing else: beside shares that every request touches."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from router.core.leases import Book
from router.core.pocket import Pocket
from router.core.shares import Amounts, Limit, Share, take

PLENTY = 10**9


def limits(level: str) -> tuple[Limit, ...]:
    return (
        Limit(f"{level}:requests", "requests", level, PLENTY, 0),
        Limit(f"{level}:tokens", "tokens", level, PLENTY, 1),
        Limit(f"{level}:concurrent", "concurrent", level, PLENTY, 0),
        Limit(f"{level}:usd", "budget_usd", level, PLENTY, 2),
        Limit(f"{level}:budget", "budget_tokens", level, PLENTY, 1),
    )


@dataclass
class Side:
    """One process's shares: those of two keys, each under the tenant's as well."""

    book: Book = field(default_factory=lambda: Book("me", "epoch", "routers"))

    def __post_init__(self) -> None:
        self.book._offset_s = 1000.0
        tenant = limits("tenant")
        self.wants = [
            tuple((self.book.share(limit), limit.unit) for limit in (*limits(key), *tenant))
            for key in ("key", "other")
        ]
        self.pockets = [Pocket(wants) for wants in self.wants]

    def lease(self, requests: int, until: float) -> None:
        """As after an answer of the store: so much for requests of 100 tokens each."""
        self.book.empty_pockets()
        for share in self.book.shares.values():
            unit = next(u for wants in self.wants for s, u in wants if s is share)
            share.pool = requests * (1, 100, 300)[unit]
            share.pool_until = until

    def state(self) -> dict[str, tuple[object, ...]]:
        return {key: shown(share) for key, share in self.book.shares.items()}


def shown(share: Share) -> tuple[object, ...]:
    corrections = {second: amount for second, amount in share.corrections.items() if amount}
    return (
        *(share.pool, share.used, share.spent, share.window_total, share.logged),
        *(corrections, [tuple(entry) for entry in share.window]),
    )


requests = st.tuples(
    st.just("request"), st.integers(0, 1), st.integers(0, 400), st.integers(0, 600)
)
ends = st.tuples(st.just("end"), st.integers(0, 10**6), st.integers(0, 500), st.integers(0, 700))
waits = st.tuples(st.just("wait"), st.sampled_from([0.01, 0.3, 1.0, 11.0]))
leases = st.tuples(st.just("lease"), st.integers(0, 300), st.sampled_from([0.5, 10.0]))
looks = st.just(("look",))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(requests, requests, requests, ends, ends, waits, leases, looks), max_size=300
    )
)
def test_each_request_and_every_share_is_as_without_it(steps):
    plain, pocketed = Side(), Side()
    now = 50.0
    running: list[tuple[int, Amounts, float]] = []
    plain.lease(200, now + 10)
    pocketed.lease(200, now + 10)
    often = [("request", key, 100, 300) for key in (0, 1) for _ in range(12)]
    for step in (*often, *steps):
        match step:
            case "request", key, tokens, nano_usd:
                amounts = 1, tokens, nano_usd
                expected = take(plain.wants[key], amounts, now)
                pocket = pocketed.pockets[key]
                got = pocket.take(amounts, now) or pocketed.book.take(pocket, amounts, now)
                assert got == expected
                if got:
                    running.append((key, amounts, now))
            case "end", which, tokens, nano_usd if running:
                key, amounts, since = running.pop(which % len(running))
                finish(plain, key, amounts, tokens, nano_usd, since)
                pocket = pocketed.pockets[key]
                event("of an open pocket" if pocket.is_open else "by itself")
                pocket.end(pocketed.book, amounts, tokens, nano_usd, since)
            case "wait", seconds:
                now += seconds
            case "lease", count, life_s:
                plain.lease(count, now + life_s)
                pocketed.lease(count, now + life_s)
            case ("look",):
                plain.book.look(now)
                pocketed.book.look(now)
                assert pocketed.state() == plain.state()
    pocketed.book.empty_pockets()
    assert pocketed.state() == plain.state()


def finish(
    side: Side, key: int, amounts: Amounts, tokens: int, nano_usd: int, since: float
) -> None:
    """An end by itself, as the limiter notes it."""
    for share, unit in side.wants[key]:
        match share.limit.role:
            case "tokens":
                side.book.settle_tokens(share, amounts[1], tokens, since)
            case "concurrent":
                side.book.release(share, 1)
            case "budget_usd" | "budget_tokens":
                side.book.release(share, amounts[unit], (0, tokens, nano_usd)[unit])


def busy(side: Side, amounts: Amounts = (1, 100, 300), now: float = 50.0) -> Pocket:
    pocket = side.pockets[0]
    side.lease(1000, now + 10)
    for _ in range(20):
        assert pocket.take(amounts, now) or side.book.take(pocket, amounts, now)
    return pocket


def test_it_is_filled_where_requests_come_often():
    side = Side()
    pocket = busy(side)
    assert pocket.is_open
    assert side.book.pockets == {pocket}
    before = side.state()
    assert pocket.take((1, 100, 300), 50.1)
    assert side.state() == before  # no share was touched
    side.book.empty_pockets()
    assert not pocket.is_open
    assert {share.used for share, unit in pocket.wants if unit == 0} == {21}


@pytest.mark.parametrize(
    "say",
    [
        lambda book: book.look(50.2),
        lambda book: book.message([], 50.2),
        lambda book: book.recall("tenant:requests"),
        lambda book: book.lost(),
        lambda book: book.leave(),
    ],
)
def test_it_is_empty_before_anything_is_said_of_shares(say):
    side = Side()
    pocket = busy(side)
    say(side.book)
    assert not pocket.is_open
    assert {share.used for share, unit in pocket.wants if unit == 0} == {20}


def test_nothing_is_kept_out_of_what_is_scarce():
    side = Side()
    for share in side.book.shares.values():
        share.free = share.tight_below - 1
    assert not busy(side).is_open


def test_it_lasts_no_longer_than_the_lease():
    side = Side()
    pocket = busy(side)
    assert not pocket.take((1, 100, 300), 60.0)
    assert not side.book.take(pocket, (1, 100, 300), 60.0)
