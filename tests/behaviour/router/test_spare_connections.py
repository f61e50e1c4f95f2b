"""Where a replica is busy, whoever comes next finds a connection that is open already."""

from __future__ import annotations

import asyncio

from tests.behaviour.router.harness import (
    SSE_HEAD,
    STREAM,
    chunk,
    fake_engine,
    function,
    post,
    routing_table,
    running_router,
)
from tests.support import eventually


async def endless(_, writer):
    writer.write(SSE_HEAD + chunk(b"data: 1\n\n"))
    await asyncio.Event().wait()


async def test_a_busy_replica_has_two_to_spare_and_an_idle_one_none(tmp_path):
    async with (
        fake_engine(endless) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        writers = []

        async def begin() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writers.append(writer)
            writer.write(post(STREAM))
            await reader.readuntil(b"data: 1")

        for _ in range(4):
            await begin()
        assert engine.connections == 4
        for streams in (5, 6, 7):
            await begin()
            await eventually(lambda streams=streams: engine.connections == streams + 2)
            assert len(engine.received) == streams
        for writer in writers:
            writer.close()


async def test_a_spare_that_the_engine_closed_does_no_harm(tmp_path):
    async with (
        fake_engine(endless) as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        writers = []
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writers.append(writer)
            writer.write(post(STREAM))
            await reader.readuntil(b"data: 1")
        await eventually(lambda: engine.connections == 7)
        for spare in engine.writers[5:]:
            spare.transport.abort()
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writers.append(writer)
        writer.write(post(STREAM))
        assert b"200 OK" in await reader.readuntil(b"data: 1")
        assert not router.router.state.breakers
        for writer in writers:
            writer.close()
