"""The limiter's edge against a real Valkey: one answer for many, silence, outages, and their bounds."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from reconciler.publish.valkey import EmbeddedValkey
from router.core.errors import Refusal
from router.core.shares import WINDOW_S
from router.core.snapshot import Principal, snapshot
from router.limits.limiter import Admission, Limiter
from schemas.wire import redis_keys
from schemas.wire.routing import Budget, Function, Key, Limits, Price, RoutingTable, Tenant
from tests.support import eventually, free_port

KEY = Key(id="k", sha256=bytes(32))
GENEROUS_S = 20.0


def principal(key: Key = KEY, **more) -> Principal:
    return Principal(Tenant(name="team", keys=(key,), models=("*",), **more), key)


def function(**more) -> Function:
    return Function(**{"name": "chat", "served_name": "chat", **more})


def rate(**more) -> Principal:
    return principal(limits=Limits(**more))


def tables(who: Principal, what: Function) -> RoutingTable:
    return RoutingTable(
        generation=1, revision="r", published_at=0.0, functions=(what,), tenants=(who.tenant,)
    )


@asynccontextmanager
async def limiters(
    url: str | None, who: Principal, what: Function, count: int = 1, **more
) -> AsyncIterator[list[Limiter]]:
    """So many routers, as far as limits are concerned."""
    async with AsyncExitStack() as stack:
        made = []
        for n in range(count):
            redis = None
            if url is not None:
                redis = Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=None)
                stack.push_async_callback(redis.aclose)
            limiter = Limiter(redis, name=f"r{n}", **{"wait_s": GENEROUS_S, **more})
            limiter.installed(snapshot(tables(who, what)))
            task = asyncio.create_task(limiter.run())
            stack.push_async_callback(stop, limiter, task)
            made.append(limiter)
        if url is not None:
            for limiter in made:
                await eventually(lambda limiter=limiter: limiter.book.routers or limiter._fly())
        yield made


async def stop(limiter: Limiter, task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
    await limiter.close()


@pytest.fixture
async def valkey(tmp_path):
    async with EmbeddedValkey(tmp_path / "valkey") as running:
        yield running


async def storm(routers: list[Limiter], who: Principal, what: Function, each: int, **tokens):
    """So many requests at once to every router: (admissions, refusals)."""
    wanted = [
        router.admit(who, what, tokens.get("input", 10), tokens.get("output", 10))
        for _ in range(each)
        for router in routers
    ]
    answers = await asyncio.gather(*wanted)
    admitted = [a for a in answers if isinstance(a, Admission)]
    return admitted, [a for a in answers if isinstance(a, Refusal)]


async def test_without_limits_nobody_is_asked_and_everything_enters(valkey):
    async with limiters(None, principal(), function()) as (router,):
        assert not router.enabled
        admission = router.admit_now(principal(), function(), 1, 1)
        assert isinstance(admission, Admission)
        assert admission.headers() == b""
        admission.settle(1, 1)


async def test_a_storm_over_three_routers_is_admitted_exactly_to_the_limit(valkey):
    who = rate(requests_per_minute=700)
    async with limiters(valkey.url, who, function(), 3) as routers:
        admitted, refused = await storm(routers, who, function(), 500)
        assert len(admitted) == 700
        assert {r.status for r in refused} == {429}
        assert all(r.code == "rate_limit_exceeded" and r.retry for r in refused)
        assert all(50 < r.retry_after_s <= WINDOW_S + 11 for r in refused)
        # Most needed no question of their own.
        assert sum(router.round_trips for router in routers) < 200


async def test_concurrent_requests_are_exact_and_come_back_at_every_end(valkey):
    who = rate(concurrent=40)
    async with limiters(valkey.url, who, function(), 3) as routers:
        most = 0

        async def all_of_them() -> bool:
            nonlocal most
            admitted, _ = await storm(routers, who, function(), 60)
            most = max(most, len(admitted))
            for n, admission in enumerate(admitted):
                admission.settle(1, 1) if n % 2 else admission.release()
                admission.settle(5, 5)  # the first end counts
            return len(admitted) == 40

        for _ in range(5):
            # What has just been given back may not be known to all routers yet.
            await eventually(all_of_them)
        assert most == 40


async def test_tokens_are_counted_at_tenant_key_and_function(valkey):
    key = Key(id="k", sha256=bytes(32), limits=Limits(tokens_per_minute=1000))
    who = principal(key, limits=Limits(tokens_per_minute=5000))
    what = function(limits=Limits(requests_per_minute=80))
    async with limiters(valkey.url, who, what, 2) as routers:
        admitted, refused = await storm(routers, who, what, 50)
        assert len(admitted) == 50
        assert {(r.type, r.code) for r in refused} == {("tokens", "rate_limit_exceeded")}
        assert all("this API key" in r.message for r in refused)
        other = Key(id="other", sha256=bytes(32))
        mate = Principal(who.tenant, other)
        admitted, refused = await storm(routers, mate, what, 50)
        assert len(admitted) == 30
        assert all("all accounts" in r.message and "Used" not in r.message for r in refused)
        assert all(not r.more_headers for r in refused)


async def test_what_could_never_enter_is_said_to_be_too_large(valkey):
    who = rate(tokens_per_minute=100)
    async with limiters(valkey.url, who, function()) as (router,):
        refusal = await router.admit(who, function(), 90, 20)
        assert isinstance(refusal, Refusal)
        assert (refusal.status, refusal.retry, refusal.retry_after_s) == (429, False, None)
        assert "Limit 100, Requested 110" in refusal.message


async def test_headers_are_openais_and_count_down(valkey):
    who = rate(requests_per_minute=5, tokens_per_minute=1000)
    async with limiters(valkey.url, who, function()) as (router,):
        for left in range(4, -1, -1):
            admission = await router.admit(who, function(), 50, 50)
            assert isinstance(admission, Admission)
            lines = dict(line.split(b": ") for line in admission.headers().split(b"\r\n") if line)
            assert lines[b"x-ratelimit-limit-requests"] == b"5"
            assert lines[b"x-ratelimit-remaining-requests"] == b"%d" % left
            assert lines[b"x-ratelimit-limit-tokens"] == b"1000"
            assert lines[b"x-ratelimit-remaining-tokens"] == b"%d" % (500 + 100 * left)
            assert lines[b"x-ratelimit-reset-requests"] == b"1m1s"
        refusal = await router.admit(who, function(), 50, 50)
        assert isinstance(refusal, Refusal)
        shown = refusal.headers()
        assert shown["x-ratelimit-remaining-requests"] == "0"
        assert 55 <= int(shown["Retry-After"]) <= 62


async def test_a_budget_is_reserved_settled_and_warned_of(valkey):
    who = principal(budget=Budget(monthly_usd=1.0, soft_percent=50))
    what = function(price=Price(input=1000.0, output=2000.0))  # a token costs 0.1 and 0.2 cents
    async with limiters(valkey.url, who, what, 2) as routers:
        admitted, refused = await storm(routers, who, what, 100, input=10, output=20)
        assert len(admitted) == 20  # 5 cents each
        assert {(r.status, r.code, r.type, r.retry) for r in refused} == {
            (429, "insufficient_quota", "insufficient_quota", False)
        }
        for admission in admitted:
            admission.settle(10, 10)  # 3 cents each

        async def room() -> Admission | None:
            answer = await routers[0].admit(who, what, 100, 150)
            return answer if isinstance(answer, Admission) else None

        last = await eventually(room)  # exactly the rest: 40 cents
        assert last.headers() == b"x-detoserve-budget: 60%\r\n"
        last.settle(0, 0, nano_usd=400_000_000)

        async def full() -> bool:
            return isinstance(await routers[1].admit(who, what, 1, 0), Refusal)

        await eventually(full)


async def test_what_costs_nothing_asks_nobody_under_a_budget_in_usd(valkey):
    who = principal(limits=Limits(requests_per_minute=10**6), budget=Budget(monthly_usd=100.0))
    what = function()
    async with limiters(valkey.url, who, what) as (one,):
        for _ in range(30):  # until enough is leased
            answer = await one.admit(who, what, 10, 10)
            assert isinstance(answer, Admission)
            answer.settle(10, 10, 0)
        answer = one.admit_now(who, what, 10, 10)
        assert isinstance(answer, Admission)
        answer.release()


@pytest.mark.parametrize("role", ["requests", "concurrent"])
async def test_a_hanging_redis_delays_nobody_for_long_and_opens_nothing(valkey, role):
    limits = {"requests_per_minute": 90} if role == "requests" else {"concurrent": 90}
    who = rate(**limits)
    async with limiters(valkey.url, who, function(), 3, wait_s=0.05) as routers:
        assert all(router.book.routers for router in routers)
        await eventually(lambda: all(r.book.routers == 3 or r._fly() for r in routers))
        assert valkey.pid is not None
        os.kill(valkey.pid, signal.SIGSTOP)
        try:
            loop = asyncio.get_running_loop()
            began = loop.time()
            admitted, refused = await storm(routers, who, function(), 100)
            assert loop.time() - began < 10
            # One part of three for each router, and what was leased is among it.
            assert len(admitted) == 90
            assert all(r.status == 429 for r in refused)
            assert all(router.book.away for router in routers)
            began = loop.time()
            answers = [routers[0].admit_now(who, function(), 1, 1) for _ in range(100)]
            assert all(isinstance(a, Refusal) for a in answers)
        finally:
            os.kill(valkey.pid, signal.SIGCONT)
        # Redis hears what was let in without it.
        await eventually(lambda: not any(router.book.away for router in routers), timeout_s=20)
        admitted, _ = await storm(routers, who, function(), 30)
        assert admitted == []
        async with Redis.from_url(valkey.url) as redis:

            async def all_hear() -> bool:
                ((_, count),) = await redis.pubsub_numsub(redis_keys.LIMIT_RECALL)
                return count == len(routers)

            await eventually(all_hear)


async def test_a_redis_that_lost_everything_lets_nobody_in_twice(valkey):
    who = rate(requests_per_minute=50)
    async with limiters(valkey.url, who, function(), 3) as routers:
        admitted, _ = await storm(routers, who, function(), 10)
        assert len(admitted) == 30
        async with Redis.from_url(valkey.url) as redis:
            await redis.flushall()
        for router in routers:
            router._fly()

        async def told() -> bool:
            async with Redis.from_url(valkey.url) as redis:
                key = redis_keys.LIMIT + "tenant:team:requests"
                fields = await redis.hgetall(key)
                return sum(int(v) for k, v in fields.items() if k.isdigit()) >= 30

        await eventually(told)
        admitted, _ = await storm(routers, who, function(), 50)
        assert len(admitted) == 20


async def test_a_client_that_leaves_while_it_waits_holds_nothing(valkey):
    who = rate(concurrent=5)
    async with limiters(valkey.url, who, function(), 2) as routers:
        for _ in range(20):
            waiting = [
                asyncio.create_task(router.admit(who, function(), 1, 1))
                for router in routers
                for _ in range(10)
            ]
            await asyncio.sleep(0)
            for task in waiting[::2]:
                task.cancel()
            for answer in await asyncio.gather(*waiting, return_exceptions=True):
                if isinstance(answer, Admission):
                    answer.release()

        async def all_free() -> bool:
            admitted, _ = await storm(routers, who, function(), 5)
            for admission in admitted:
                admission.release()
            return len(admitted) == 5

        await eventually(all_free)


async def test_alone_without_redis_the_limit_is_this_processes_own(valkey):
    who = rate(requests_per_minute=10)
    async with limiters(None, who, function()) as routers:
        admitted, refused = await storm(routers, who, function(), 30)
        assert len(admitted) == 10
        assert all(0 < r.retry_after_s <= WINDOW_S + 1 for r in refused)
    async with limiters(None, who, function(), expected_routers=4) as routers:
        admitted, _ = await storm(routers, who, function(), 30)
        assert len(admitted) == 2


async def test_a_raised_limit_counts_from_its_commit_on(valkey):
    who = rate(requests_per_minute=10)
    async with limiters(valkey.url, who, function()) as (router,):
        admitted, _ = await storm([router], who, function(), 30)
        assert len(admitted) == 10
        more = rate(requests_per_minute=25)
        router.installed(snapshot(tables(more, function())))
        admitted, _ = await storm([router], more, function(), 30)
        assert len(admitted) == 15
        router.installed(snapshot(tables(principal(), function())))
        assert not router.enabled


async def test_a_router_that_ends_gives_back_what_it_leased(valkey):
    who = rate(requests_per_minute=1000, concurrent=1000)
    async with limiters(valkey.url, who, function()) as (router,):
        admitted, _ = await storm([router], who, function(), 5)
        assert router.book.shares[redis_keys.LIMIT + "tenant:team:requests"].pool
        for admission in admitted:
            admission.settle(1, 1)
    async with Redis.from_url(valkey.url) as redis:
        taken = await redis.hgetall(redis_keys.LIMIT + "tenant:team:requests")
        assert sum(int(v) for k, v in taken.items() if k.isdigit()) == 5
        held = await redis.hgetall(redis_keys.LIMIT + "tenant:team:concurrent")
        assert not [name for name in held if name.startswith((b"r", b"x"))]


async def test_a_router_that_has_no_requests_counts_among_those_that_share(valkey):
    async with (
        limiters(valkey.url, rate(concurrent=5), function(), 2) as routers,
        Redis.from_url(valkey.url) as redis,
    ):
        before = dict(await redis.zrange(redis_keys.LIMIT_ROUTERS, 0, -1, withscores=True))
        assert len(before) == len(routers)

        async def all_heard_again() -> bool:
            now = dict(await redis.zrange(redis_keys.LIMIT_ROUTERS, 0, -1, withscores=True))
            return all(now[name] > at for name, at in before.items())

        await eventually(all_heard_again, timeout_s=20)


async def test_a_redis_that_refuses_is_not_asked_with_every_request(valkey):
    who = rate(concurrent=1000)
    nowhere = f"redis://127.0.0.1:{free_port()}"
    limiter = Limiter(Redis.from_url(nowhere, retry=Retry(NoBackoff(), 0)), name="r")
    limiter.installed(snapshot(tables(who, function())))
    loop = asyncio.get_running_loop()
    began = loop.time()
    for _ in range(300):
        admission = await limiter.admit(who, function(), 1, 1)
        assert isinstance(admission, Admission)
        admission.settle(1, 1)
        await asyncio.sleep(0.001)
    assert limiter.round_trips <= 2 + (loop.time() - began) / 0.25
    await limiter.close()
