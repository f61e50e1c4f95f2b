"""The many ways a request can end, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import json
import random

import aiohttp
import pytest
from openai import APIError, AsyncOpenAI

from schemas.wire.routing import Policy
from tests.behaviour.router.harness import (
    CHAT,
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
    simulated,
)
from tests.support import eventually

EVENT = b'data: {"choices":[]}\n\n'


async def hang(_, __):
    await asyncio.Event().wait()


async def stream_for_ever(_, writer):
    writer.write(SSE_HEAD)
    while True:
        writer.write(chunk(EVENT))
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("answer", [hang, stream_for_ever])
async def test_a_client_that_leaves_ends_the_engines_work_within_a_second(tmp_path, answer):
    async with (
        fake_engine(answer) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(post(STREAM))
        await eventually(lambda: engine.received)
        assert router.router.state.in_flight.by_replica == {"sim-r0": 1}
        writer.close()
        async with asyncio.timeout(1):
            await engine.gone.wait()
        await eventually(lambda: router.router.state.in_flight.total == 0)
        router.assert_idle()


async def test_an_engine_that_dies_mid_stream_yields_an_error_event_and_no_done(tmp_path):
    async with simulated("--itl-s", "0.002") as engine:
        table = routing_table(function(engine.url))
        async with (
            running_router(table, tmp_path) as router,
            AsyncOpenAI(base_url=f"{router.url}/v1", api_key=KEY.text, max_retries=0) as client,
        ):
            stream = await client.chat.completions.create(
                model="sim",
                messages=[{"role": "user", "content": "hi"}],
                max_tokens=5000,
                stream=True,
            )
            for _ in range(5):
                assert (await anext(stream)).choices
            engine.process.kill()

            async def read_on() -> None:
                async for _ in stream:
                    pass

            with pytest.raises(APIError, match="incomplete"):
                await read_on()
            await eventually(lambda: router.router.state.in_flight.total == 0)
            router.assert_idle()


@pytest.mark.parametrize("sent", [EVENT, EVENT + b'data: {"choi'])
async def test_the_error_event_stands_alone_whatever_came_before(tmp_path, sent):
    async def die(_, writer):
        writer.write(SSE_HEAD + chunk(sent))
        await writer.drain()
        writer.transport.abort()

    async with (
        fake_engine(die) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        answer = await raw(router.port, post(STREAM))
        assert answer.endswith(b"\r\n0\r\n\r\n")
        assert b"[DONE]" not in answer
        chunks = answer.partition(b"\r\n\r\n")[2].split(b"\r\n")[1::2]
        events = b"".join(chunks).split(b"\n\n")
        assert events[0] + b"\n\n" == EVENT
        assert json.loads(events[-2].removeprefix(b"data: "))["error"]["code"]


async def test_an_answer_of_known_length_that_breaks_off_stays_visibly_short(tmp_path):
    async def die(_, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 40)
        await writer.drain()
        writer.close()

    async with (
        fake_engine(die) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        head, _, body = (await raw(router.port, post(CHAT))).partition(b"\r\n\r\n")
        assert b"Content-Length: 100" in head
        assert body == b"x" * 40


async def test_deadlines_before_the_first_byte_and_between_chunks(tmp_path):
    async def one_then_hang(_, writer):
        writer.write(SSE_HEAD + chunk(EVENT))
        await asyncio.Event().wait()

    quick = Policy(name="least-load", first_byte_timeout_s=0.2, between_chunks_timeout_s=0.2)
    for answer, mark in ((hang, b" 504 "), (one_then_hang, b'data: {"error":')):
        async with (
            fake_engine(answer) as engine,
            running_router(routing_table(function(engine.url, policy=quick)), tmp_path) as router,
        ):
            assert mark in await raw(router.port, post(STREAM))
            async with asyncio.timeout(1):
                await engine.gone.wait()
            router.assert_idle()


async def test_a_slow_but_steady_stream_has_no_total_deadline(tmp_path):
    async def slowly(_, writer):
        writer.write(SSE_HEAD)
        for _ in range(12):
            writer.write(chunk(EVENT))
            await asyncio.sleep(0.05)
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    quick = Policy(name="least-load", first_byte_timeout_s=0.2, between_chunks_timeout_s=0.2)
    async with (
        fake_engine(slowly) as engine,
        running_router(routing_table(function(engine.url, policy=quick)), tmp_path) as router,
    ):
        answer = await raw(router.port, post(STREAM))
        assert answer.count(b"choices") == 12
        assert b"[DONE]" in answer


async def refuse_connections() -> str:
    """A URL at which nothing listens."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return f"http://127.0.0.1:{port}"


async def reset(_, writer):
    writer.transport.abort()


async def reset_after_the_head(_, writer):
    writer.write(SSE_HEAD)
    await writer.drain()
    await asyncio.sleep(0.02)  # so that the head is on its way alone
    writer.transport.abort()


@pytest.mark.parametrize(
    "answer",
    [
        None,
        reset,
        reset_after_the_head,
        http(b"{}", "503 Service Unavailable"),
        http(b"{}", "502 Bad Gateway"),
        http(b"{}", "429 Too Many Requests", "Retry-After: 1\r\n"),
        http(b'{"error":"cannot schedule new futures after shutdown"}', "500 Oops"),
    ],
    ids=["refused", "reset", "reset-after-head", "503", "502", "429", "vllm-shutting-down"],
)
async def test_a_failure_before_the_first_byte_is_tried_elsewhere(tmp_path, answer):
    policy = Policy(name="round-robin", retry_budget_percent=100)
    async with fake_engine(answer) as bad, fake_engine() as good:
        first = await refuse_connections() if answer is None else bad.url
        table = routing_table(function(first, good.url, policy=policy))
        async with running_router(table, tmp_path) as router:
            for _ in range(4):
                response = await raw(router.port, post(CHAT))
                assert response.startswith(b"HTTP/1.1 200 ")
                assert b"x-detoserve-route: sim-r1;" in response
            assert len(good.received) == 4
            router.assert_idle()


async def test_other_errors_of_an_engine_pass_through_untouched(tmp_path):
    body = b'{"error":{"message":"boom"}}'
    async with fake_engine(http(body, "500 Internal Server Error")) as bad, fake_engine() as good:
        table = routing_table(
            function(bad.url, good.url, policy=Policy(name="round-robin", retry_attempts=2))
        )
        async with running_router(table, tmp_path) as router:
            answers = [await raw(router.port, post(CHAT)) for _ in range(2)]
            assert sorted(b" 500 " in a.partition(b"\r\n")[0] for a in answers) == [False, True]
            assert any(a.endswith(body) for a in answers)


async def test_the_last_replicas_503_reaches_the_client_with_retry_after(tmp_path):
    async with (
        fake_engine(http(b'{"error":"busy"}', "503 Service Unavailable")) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        answer = await raw(router.port, post(CHAT))
        assert b" 503 " in answer
        assert answer.endswith(b'{"error":"busy"}')
        assert b"Retry-After: 1" in answer


async def test_a_connection_closed_while_idle_costs_no_error(tmp_path):
    async def once(_, writer):
        await http()(_, writer)
        await writer.drain()
        writer.close()

    async with (
        fake_engine(once) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        for _ in range(20):
            assert (await raw(router.port, post(CHAT))).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nab",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabHTTP/1.1 200 OK\r\n",
    ],
)
async def test_an_engine_that_speaks_no_http_is_a_502(tmp_path, answer):
    async def odd(_, writer):
        writer.write(answer)

    async with (
        fake_engine(odd) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        assert (await raw(router.port, post(CHAT))).startswith(b"HTTP/1.1 502 ")
        router.assert_idle()


async def test_informational_answers_and_bodies_that_end_with_the_connection(tmp_path):
    async def early(_, writer):
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        await writer.drain()
        writer.close()

    async with (
        fake_engine(early) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        answer = await raw(router.port, post(CHAT))
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"9\r\nall of it\r\n0\r\n\r\n" in answer


async def test_a_slow_reader_holds_back_its_engine_and_nobody_else(tmp_path):
    sent = 0

    async def flood(received, writer):
        nonlocal sent
        if b'"n":1' in received.body:
            await http()(received, writer)
            return
        writer.write(SSE_HEAD)
        piece = chunk(b"data: " + b"x" * 65_000 + b"\n\n")
        for _ in range(2000):
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
        writer.write(b"0\r\n\r\n")

    async with (
        fake_engine(flood) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=2**14)
        writer.write(post(STREAM))
        await reader.readexactly(1000)
        before = -1
        while before != sent:
            before = sent
            for _ in range(5):
                fast = post(CHAT[:-1] + b',"n":1}')
                assert (await raw(router.port, fast)).startswith(b"HTTP/1.1 200")
        assert sent < 40 * 2**20  # kernel buffers, not the 130 MB that were to come
        total = 1000
        while data := await reader.read(2**20):
            total += len(data)
        assert total > 2000 * 65_000
        writer.close()
        await eventually(lambda: router.router.state.in_flight.total == 0)


async def test_a_client_that_never_reads_is_cut(tmp_path):
    async def flood(_, writer):
        writer.write(SSE_HEAD)
        while True:
            writer.write(chunk(b"x" * 65_000))
            await writer.drain()

    async with (
        fake_engine(flood) as engine,
        running_router(
            routing_table(function(engine.url)), tmp_path, client_stall_timeout_s=0.3
        ) as router,
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=2**14)
        writer.write(post(STREAM))
        async with asyncio.timeout(5):
            await engine.gone.wait()
        router.assert_idle()
        writer.close()


async def test_after_a_storm_of_disconnects_every_counter_is_zero(tmp_path):
    async with simulated("--itl-s", "0.002") as engine:
        table = routing_table(function(engine.url))
        async with running_router(table, tmp_path) as router:
            chance = random.Random(7)

            async def leave() -> None:
                reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
                writer.write(post(STREAM[:-1] + b',"max_tokens":2000}'))
                await asyncio.sleep(chance.random() * 0.3)
                if chance.random() < 0.5:
                    await reader.read(chance.randrange(1, 3000))
                writer.close()

            await asyncio.gather(*(leave() for _ in range(150)))
            await eventually(lambda: router.router.state.in_flight.total == 0)
            router.assert_idle()
            # The engine was told too.
            async with aiohttp.ClientSession() as session:

                async def idle() -> bool:
                    async with session.get(f"{engine.url}/stats") as response:
                        stats = await response.json()
                        return stats["running"] == stats["waiting"] == 0

                await eventually(idle, timeout_s=3)


async def flood(_, writer):
    writer.write(SSE_HEAD)
    while True:
        for _ in range(50):
            writer.write(chunk(EVENT))
        await writer.drain()
        await asyncio.sleep(0)


async def test_bytes_that_come_as_the_client_leaves_raise_nothing(tmp_path):
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    async with (
        fake_engine(flood) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):

        async def leave() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writer.write(post(STREAM))
            await reader.readuntil(b"data: ")
            writer.transport.abort()

        for _ in range(20):
            await asyncio.gather(*(leave() for _ in range(5)))
        await eventually(lambda: engine.open == 0)
        router.assert_idle()
    assert errors == []
