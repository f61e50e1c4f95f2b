"""Limits, queues and wrong keys as clients of a router meet them."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import aiohttp
import pytest

from schemas import api_keys
from schemas.wire.routing import (
    Arm,
    Budget,
    Key,
    Limits,
    Policy,
    Price,
    Replica,
    RoutingTable,
    Tenant,
)
from tests.behaviour.router.harness import (
    CHAT,
    FOREIGN_KEY,
    KEY,
    SSE_HEAD,
    STREAM,
    chunk,
    fake_engine,
    function,
    http,
    post,
    raw,
    routing_table,
    running_router,
    tenant,
)
from tests.support import eventually

OTHER = api_keys.create()


def parsed(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, body


async def ask(router, body: bytes = CHAT, **more) -> tuple[int, dict[str, str], bytes]:
    return parsed(await raw(router.port, post(body, **more), timeout_s=20))


class Held:
    """An engine's answer that begins only when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, received, writer) -> None:
        await self.go.wait()
        await http()(received, writer)


def bounded(url: str, slots: int = 1, *, wait_s: float = 20.0, **more):
    """A function of one replica that carries so many."""
    arm = Arm(
        deployment="d", cluster="here", replicas=(Replica(id="r", url=url, max_concurrent=slots),)
    )
    policy = Policy(name="least-load", queue_max_wait_s=wait_s, queue_max_requests=8)
    return function(arms=(arm,), policy=policy, **more)


def two_tenants(*functions, **of_other) -> RoutingTable:
    other = Tenant(
        **{
            "name": "other",
            "keys": (Key(id=OTHER.id, sha256=bytes.fromhex(OTHER.sha256)),),
            "models": ("*",),
            **of_other,
        }
    )
    return routing_table(*functions, tenants=(tenant(), other))


async def test_answers_carry_the_headers_and_the_one_too_many_is_429(tmp_path):
    async with fake_engine() as engine:
        limits = Limits(requests_per_minute=3, tokens_per_minute=10_000)
        table = routing_table(function(engine.url), tenants=(tenant(limits=limits),))
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            for left in (2, 1, 0):
                status, headers, _ = await ask(router)
                assert status == 200
                assert headers["x-ratelimit-limit-requests"] == "3"
                assert headers["x-ratelimit-remaining-requests"] == str(left)
                assert headers["x-ratelimit-limit-tokens"] == "10000"
                assert int(headers["x-ratelimit-remaining-tokens"]) < 10_000
            status, headers, body = await ask(router)
            assert status == 429
            assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
            assert json.loads(body)["error"]["type"] == "requests"
            assert 0 < int(headers["retry-after"]) <= 61
            assert headers["x-should-retry"] == "true"
            assert headers["x-ratelimit-remaining-requests"] == "0"
            assert len(engine.received) == 3


async def test_a_bound_on_the_answer_is_reserved_and_a_prompt_by_its_size(tmp_path):
    async with fake_engine() as engine:
        who = tenant(limits=Limits(tokens_per_minute=1000))
        table = routing_table(function(engine.url), tenants=(who,))
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            body = json.dumps({"model": "sim", "messages": [], "max_tokens": 2000}).encode()
            status, headers, answer = await ask(router, body)
            assert (status, "retry-after" in headers) == (429, False)
            assert b"Request too large" in answer
            body = json.dumps({"model": "sim", "messages": [], "max_tokens": 900}).encode()
            assert (await ask(router, body))[0] == 200
            assert (await ask(router, body))[0] == 429


async def test_a_used_up_budget_is_insufficient_quota(tmp_path):
    async with fake_engine() as engine:
        what = function(engine.url, price=Price(input=0.0, output=1_000_000.0))
        who = tenant(budget=Budget(monthly_usd=512.0))
        async with running_router(
            routing_table(what, tenants=(who,)), tmp_path, probe_interval_s=0
        ) as router:
            assert (await ask(router))[0] == 200
            assert (await ask(router))[0] == 200
            status, headers, body = await ask(router)
            assert status == 429
            assert json.loads(body)["error"]["type"] == "insufficient_quota"
            assert headers["x-should-retry"] == "false"


async def test_every_end_of_a_request_frees_its_slot(tmp_path):
    async def never(received, writer) -> None:
        writer.write(SSE_HEAD + chunk(b"data: {}\n\n"))
        await asyncio.Event().wait()

    async with fake_engine(never) as engine, fake_engine() as good:
        who = tenant(limits=Limits(concurrent=2))
        table = routing_table(
            function(engine.url),
            function(good.url, name="good"),
            function("http://127.0.0.1:1", name="broken"),
            tenants=(who,),
        )
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            writers = []
            for _ in range(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
                writer.write(post(STREAM))
                await reader.readuntil(b"data: {}\n\n")
                writers.append(writer)
            good_one = CHAT.replace(b'"sim"', b'"good"')
            status, _, body = await ask(router, good_one)
            assert status == 429
            assert b"concurrent requests of this account" in body
            for writer in writers:
                writer.close()
            await eventually(lambda: router.router.state.in_flight.total == 0)
            for _ in range(5):
                assert (await ask(router, good_one))[0] == 200
                assert (await ask(router, CHAT.replace(b'"sim"', b'"broken"')))[0] == 502
                assert (await ask(router, b"{"))[0] == 400
            share = router.router.limiter.book.shares["detoserve:limit:tenant:team:concurrent"]
            assert share.used == 0


async def test_a_request_that_falls_back_counts_once(tmp_path):
    async with fake_engine() as engine:
        who = tenant(limits=Limits(requests_per_minute=2))
        table = routing_table(
            function("http://127.0.0.1:1", fallbacks=("good",)),
            function(engine.url, name="good"),
            tenants=(who,),
        )
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            assert [(await ask(router))[0] for _ in range(3)] == [200, 200, 429]


async def test_a_limit_of_a_function_holds_over_tenants_and_tells_nothing_of_others(tmp_path):
    async with fake_engine() as engine:
        what = function(engine.url, limits=Limits(requests_per_minute=2))
        async with running_router(two_tenants(what), tmp_path, probe_interval_s=0) as router:
            assert (await ask(router))[0] == 200
            status, headers, _ = await ask(router, key=OTHER.text)
            assert status == 200
            assert not any(name.startswith("x-ratelimit") for name in headers)
            status, _, body = await ask(router, key=OTHER.text)
            assert status == 429
            assert b"Used" not in body


async def test_a_function_over_its_own_limit_falls_back_and_a_tenant_over_its_own_does_not(
    tmp_path,
):
    async with fake_engine() as big, fake_engine() as small:
        table = routing_table(
            function(big.url, fallbacks=("small",), limits=Limits(requests_per_minute=2)),
            function(small.url, name="small"),
            tenants=(tenant(limits=Limits(requests_per_minute=5)),),
        )
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            assert [(await ask(router))[0] for _ in range(6)] == [200] * 5 + [429]
            assert (len(big.received), len(small.received)) == (2, 3)


async def test_requests_wait_for_room_and_all_are_answered(tmp_path):
    held = Held()
    async with (
        fake_engine(held) as engine,
        running_router(routing_table(bounded(engine.url)), tmp_path, probe_interval_s=0) as router,
    ):
        asking = [asyncio.create_task(ask(router)) for _ in range(5)]
        await eventually(lambda: len(router.router.proxy.queues) == 4)
        assert len(engine.received) == 1
        text = (await admin(router)).decode()
        assert 'detoserve_router_queue_requests{function="sim"} 4.0' in text
        held.go.set()
        assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 5
        assert len(router.router.proxy.queues) == 0
        router.assert_idle()


async def admin(router) -> bytes:
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"{router.router.admin_url}/metrics") as answer,
    ):
        return await answer.read()


async def test_no_more_run_at_once_than_replicas_may_carry(tmp_path):
    running = most = 0

    async def counting(received, writer) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        await http()(received, writer)

    async with fake_engine(counting) as engine:
        table = routing_table(bounded(engine.url, 3))
        async with running_router(table, tmp_path, probe_interval_s=0) as router:

            async def client() -> list[int]:
                return [(await ask(router))[0] for _ in range(10)]

            assert await asyncio.gather(*(client() for _ in range(10))) == [[200] * 10] * 10
            assert most == 3


async def test_a_client_that_leaves_the_queue_is_never_sent(tmp_path):
    held = Held()
    async with (
        fake_engine(held) as engine,
        running_router(routing_table(bounded(engine.url)), tmp_path, probe_interval_s=0) as router,
    ):
        first = asyncio.create_task(ask(router))
        await eventually(lambda: engine.received)
        _, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(post(CHAT.replace(b"hi", b"left")))
        await eventually(lambda: len(router.router.proxy.queues) == 1)
        writer.close()
        await eventually(lambda: len(router.router.proxy.queues) == 0)
        held.go.set()
        assert (await first)[0] == 200
        assert (await ask(router))[0] == 200
        assert not any(b"left" in received.body for received in engine.received)
        router.assert_idle()


async def test_who_waits_too_long_hears_so_and_may_come_again(tmp_path):
    held = Held()
    async with fake_engine(held) as engine:
        table = routing_table(bounded(engine.url, wait_s=0.1))
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            first = asyncio.create_task(ask(router))
            await eventually(lambda: engine.received)
            status, headers, body = await ask(router)
            assert status == 503
            assert json.loads(body)["error"]["code"] == "at_capacity"
            assert headers["retry-after"] == "1"
            held.go.set()
            assert (await first)[0] == 200


async def test_a_flood_does_not_keep_another_tenant_out_of_a_full_queue(tmp_path):
    held = Held()
    async with (
        fake_engine(held) as engine,
        running_router(two_tenants(bounded(engine.url)), tmp_path, probe_interval_s=0) as router,
    ):
        flood = [asyncio.create_task(ask(router)) for _ in range(9)]
        await eventually(lambda: len(router.router.proxy.queues) == 8)
        quiet = asyncio.create_task(ask(router, b'{"model":"sim"}', key=OTHER.text))
        displaced = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        assert {task.result()[0] for task in displaced[0]} == {503}
        held.go.set()
        assert (await quiet)[0] == 200
        order = [b"messages" not in received.body for received in engine.received]
        assert order.index(True) <= 2
        await asyncio.gather(*flood)


async def test_a_higher_priority_goes_first(tmp_path):
    held = Held()
    async with (
        fake_engine(held) as engine,
        running_router(
            two_tenants(bounded(engine.url), priority=5), tmp_path, probe_interval_s=0
        ) as router,
    ):
        asking = [asyncio.create_task(ask(router)) for _ in range(3)]
        await eventually(lambda: len(router.router.proxy.queues) == 2)
        asking += [
            asyncio.create_task(ask(router, b'{"model":"sim"}', key=OTHER.text)) for _ in range(3)
        ]
        await eventually(lambda: len(router.router.proxy.queues) == 5)
        held.go.set()
        await asyncio.gather(*asking)
        order = [b"messages" not in received.body for received in engine.received]
        assert order == [False, True, True, True, False, False]


async def test_wrong_keys_of_one_address_are_limited_and_right_ones_go_on(tmp_path):
    async with (
        fake_engine() as engine,
        running_router(
            routing_table(function(engine.url)),
            tmp_path,
            probe_interval_s=0,
            auth_failures_per_minute=5,
        ) as router,
    ):
        statuses = [(await ask(router, key="wrong"))[0] for _ in range(8)]
        assert statuses == [401] * 5 + [429] * 3
        status, headers, body = await ask(router, key="another guess")
        assert status == 429
        assert json.loads(body)["error"]["code"] == "too_many_auth_failures"
        assert int(headers["retry-after"]) > 0
        assert (await ask(router, key=OTHER.text))[0] == 429
        assert (await ask(router))[0] == 200
        # A key that might be guessed is not looked at from there.
        assert (await ask(router, key=FOREIGN_KEY))[0] == 429
        assert (await ask(router, key=KEY.text))[0] == 200


@pytest.mark.parametrize("limit", [0, 1])
async def test_a_limit_of_nothing_lets_nothing_through(tmp_path, limit):
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(fake_engine())
        table = routing_table(
            function(engine.url), tenants=(tenant(limits=Limits(requests_per_minute=limit)),)
        )
        router = await stack.enter_async_context(running_router(table, tmp_path))
        assert [(await ask(router))[0] for _ in range(2)].count(200) == limit
