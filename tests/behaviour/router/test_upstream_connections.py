"""Connections to engines: some to spare where it is busy, kept while they are good, and not for longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.behaviour.router.harness import (
    CHAT,
    ROUND_ROBIN,
    SSE_HEAD,
    STREAM,
    FakeEngine,
    RunningRouter,
    chunk,
    fake_engine,
    function,
    post,
    raw,
    routing_table,
    running_router,
)
from tests.support import eventually


async def endless(_, writer):
    writer.write(SSE_HEAD + chunk(b"data: 1\n\n"))
    await asyncio.Event().wait()


class Streams:
    """Of one router before one engine; all end with the test."""

    def __init__(self, router: RunningRouter, engine: FakeEngine) -> None:
        self.router = router
        self.engine = engine
        self._writers: list[asyncio.StreamWriter] = []

    async def begin(self, count: int = 1) -> None:
        for _ in range(count):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.router.port)
            self._writers.append(writer)
            writer.write(post(STREAM))
            assert b"200 OK" in await reader.readuntil(b"data: 1")

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def streams(folder) -> AsyncIterator[Streams]:
    async with (
        fake_engine(endless) as engine,
        running_router(routing_table(function(engine.url)), folder) as router,
    ):
        running = Streams(router, engine)
        yield running
        running.close()


async def test_a_busy_replica_has_two_to_spare_and_an_idle_one_none(tmp_path):
    async with streams(tmp_path) as running:
        engine = running.engine
        await running.begin(4)
        assert engine.connections == 4
        for count in (5, 6, 7):
            await running.begin()
            await eventually(lambda count=count: engine.connections == count + 2)
            assert len(engine.received) == count


async def test_a_spare_that_the_engine_closed_does_no_harm(tmp_path):
    async with streams(tmp_path) as running:
        await running.begin(5)
        await eventually(lambda: running.engine.connections == 7)
        for spare in running.engine.writers[5:]:
            spare.transport.abort()
        await running.begin()
        assert not running.router.router.state.breakers


async def test_an_idle_connection_is_kept_as_long_as_the_engine_keeps_it(tmp_path):
    async with (
        fake_engine() as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        for _ in range(3):
            assert b" 200 OK" in await raw(router.port, post(CHAT))
        assert engine.connections == 1
        engine.writers[0].close()
        await eventually(lambda: not engine.open)
        assert b" 200 OK" in await raw(router.port, post(CHAT))
        assert engine.connections == 2
        assert not router.router.state.breakers


async def test_who_acknowledges_nothing_any_more_is_given_up_for_another(tmp_path):
    async with (
        fake_engine() as silent,
        fake_engine() as good,
        running_router(
            routing_table(function(silent.url, good.url, policy=ROUND_ROBIN)),
            tmp_path,
            upstream_silence_s=3,
        ) as router,
    ):
        for _ in range(2):
            assert b" 200 OK" in await raw(router.port, post(CHAT))
        # As a machine that is gone: what is sent is not taken, and nobody says why.
        silent.writers[0].transport.pause_reading()
        long = CHAT.replace(b"hi", b"hi" * 8 * 2**20)
        for _ in range(2):
            assert b" 200 OK" in await raw(router.port, post(long), timeout_s=30)
        assert len(silent.received) == 1
        assert len(good.received) == 3
        assert list(router.router.state.breakers) == ["sim-r0"]


async def test_an_engine_that_hangs_up_at_once_is_no_fault_of_the_router(tmp_path):
    async def hang_up(_, writer):
        writer.transport.abort()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with (
        fake_engine() as good,
        running_router(
            routing_table(function(url, good.url, policy=ROUND_ROBIN)), tmp_path
        ) as router,
    ):
        for _ in range(20):
            router.router.state.breakers.clear()
            assert b" 200 OK" in await raw(router.port, post(CHAT))
        assert len(good.received) == 20
    server.close()
