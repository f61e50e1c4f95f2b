"""One suite over every way that routers' messages travel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis

from router.fleet.channels import Channel
from router.fleet.channels.redis_channel import RedisChannel
from router.fleet.channels.socket_channel import SocketChannel
from tests.behaviour.publish_fixtures import running_valkey
from tests.support import eventually

Make = Callable[[], Channel]


@pytest.fixture(params=["redis", "socket"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Make]:
    """Another end of the same channel with each call."""
    async with AsyncExitStack() as stack:
        if request.param == "socket":

            def end() -> Channel:
                made = SocketChannel(tmp_path)
                stack.callback(made.close)
                return made

        else:
            server, _ = await stack.enter_async_context(running_valkey(tmp_path))

            def end() -> Channel:
                redis = Redis.from_url(server.url, socket_timeout=2)
                stack.push_async_callback(redis.aclose)
                return RedisChannel(redis)

        yield end


@asynccontextmanager
async def running(channel: Channel) -> AsyncIterator[list[bytes]]:
    """What comes by it, while it runs."""
    heard: list[bytes] = []
    task = asyncio.create_task(channel.run(heard.append))
    try:
        yield heard
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=0.2)
        with suppress(asyncio.CancelledError):
            task.result()


async def reaches(sender: Channel, heard: list[bytes], data: bytes) -> None:
    """Says it until it is heard: the other end may not be there yet."""

    def said() -> bool:
        sender.send(data)
        return data in heard

    await eventually(said)


async def test_each_hears_all_others(make: Make) -> None:
    ends = [make() for _ in range(3)]
    async with running(ends[0]) as a, running(ends[1]) as b, running(ends[2]) as c:
        for sender, word in zip(ends, (b"a", b"b", b"c"), strict=True):
            for other, heard in zip(ends, (a, b, c), strict=True):
                if other is not sender:
                    await reaches(sender, heard, word)


async def test_messages_keep_their_order_and_their_bytes(make: Make) -> None:
    one, other = make(), make()
    async with running(one), running(other) as heard:
        await reaches(one, heard, b"hello")
        sent = [bytes([i]) * 1000 for i in range(8)] + [b"\x00\xff" * 25_000]
        for data in sent:
            one.send(data)
        await eventually(lambda: heard[-1:] == sent[-1:])
        assert [data for data in heard if data != b"hello"] == sent


async def test_one_that_ended_holds_up_nobody(make: Make) -> None:
    one, other, gone = make(), make(), make()
    async with running(one), running(other) as heard:
        async with running(gone) as there:
            await reaches(one, there, b"first")
        await reaches(one, heard, b"second")


async def test_sending_never_waits_nor_fails(make: Make) -> None:
    deaf = make()
    one = make()
    # Nobody reads at the other end, and this one does not run either.
    for _ in range(2000):
        one.send(b"x" * 1000)
    assert one.lost
    del deaf
