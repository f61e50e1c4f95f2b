"""Loads and caches between routers, over real sockets and a real Valkey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from redis.asyncio import Redis

from router.core.route import States
from router.fleet.channels import Channel
from router.fleet.channels.redis_channel import RedisChannel
from router.fleet.channels.socket_channel import SocketChannel
from router.fleet.sharing import Sharing
from schemas.wire import redis_keys
from tests.behaviour.publish_fixtures import running_valkey
from tests.support import eventually

NAMES = {0: "r0", 1: "r1"}


class Member:
    """A router as far as sharing goes."""

    def __init__(self, name: str) -> None:
        self.states = States()
        for slot in NAMES:
            self.states.index.add(slot)
            self.states.load.add(slot)
        self.samples: list[tuple[Any, ...]] = []
        self.sharing = Sharing(
            name,
            self.states,
            names=NAMES,
            slots={name: slot for slot, name in NAMES.items()},
            learn=lambda *sample: self.samples.append(sample),
            now=perf_counter,
        )

    def send(self, slot: int, blocks: Sequence[int] = ()) -> Any:
        self.sharing.dispatched(slot, blocks)
        return self.states.load.dispatch(slot, 1.0, 100, perf_counter())

    def finish(self, ticket: Any) -> None:
        self.sharing.changed(ticket.slot)
        self.states.load.finish(ticket, perf_counter())

    @property
    def requests(self) -> list[int]:
        return self.states.load.requests


@asynccontextmanager
async def member(name: str, *channels: Channel) -> AsyncIterator[Member]:
    one = Member(name)
    task = asyncio.create_task(one.sharing.run(channels))
    try:
        yield one
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=0.2)


@asynccontextmanager
async def over_redis(url: str, name: str, *more: Channel) -> AsyncIterator[Member]:
    redis = Redis.from_url(url, socket_timeout=2)
    async with redis, member(name, RedisChannel(redis), *more) as one:
        yield one


async def met(*members: Member) -> None:
    await eventually(lambda: all(len(one.sharing.peers) == len(members) - 1 for one in members))


async def test_three_routers_count_what_each_sends(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        server, _ = await stack.enter_async_context(running_valkey(tmp_path))
        a, b, c = [await stack.enter_async_context(over_redis(server.url, n)) for n in "abc"]
        await met(a, b, c)
        ticket = a.send(0, [1, 2, 3])
        b.send(1)
        await eventually(lambda: a.requests == b.requests == c.requests == [1, 1])
        assert c.states.index.match([1, 2, 3]) == [(3, (0,))]
        a.finish(ticket)
        await eventually(lambda: a.requests == b.requests == c.requests == [0, 1])


async def test_one_word_by_two_ways_counts_once(tmp_path: Path) -> None:
    (tmp_path / "peers").mkdir()
    async with AsyncExitStack() as stack:
        server, _ = await stack.enter_async_context(running_valkey(tmp_path))
        members = []
        for name in "ab":
            sockets = SocketChannel(tmp_path / "peers")
            stack.callback(sockets.close)
            members.append(await stack.enter_async_context(over_redis(server.url, name, sockets)))
        a, b = members
        await met(a, b)
        a.send(0)
        a.sharing.sampled(0, 0.0, 100.0, 1.0)
        await eventually(lambda: b.samples)
        a.send(1)
        await eventually(lambda: b.requests == [1, 1])
        assert b.samples == [(0, 0.0, 100.0, 1.0)]


async def test_a_dead_routers_share_expires(tmp_path: Path) -> None:
    ends = [SocketChannel(tmp_path) for _ in range(2)]
    try:
        async with member("a", ends[0]) as a:
            async with member("b", ends[1]) as b:
                await met(a, b)
                b.send(0)
                await eventually(lambda: a.requests == [1, 0])
                # Its last word, that it has nothing, must not get out: it is killed.
                ends[1].send = lambda _: None  # type: ignore[method-assign]
            ends[1].close()
            assert a.requests == [1, 0]
            await eventually(lambda: a.requests == [0, 0])
            assert a.sharing.alone
    finally:
        for end in ends:
            end.close()


async def test_a_newcomer_is_told_what_is_cached_where(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        ends = [SocketChannel(tmp_path) for _ in range(3)]
        for end in ends:
            stack.callback(end.close)
        a = await stack.enter_async_context(member("a", ends[0]))
        b = await stack.enter_async_context(member("b", ends[1]))
        await met(a, b)
        # They brief one another too, and have nothing to tell yet.
        await eventually(lambda: not (a.sharing._briefings or b.sharing._briefings))
        chains = [list(range(n * 1000, n * 1000 + 300)) for n in range(40)]
        for n, chain in enumerate(chains):
            a.states.index.insert(n % 2, chain)
        c = await stack.enter_async_context(member("c", ends[2]))
        await eventually(lambda: len(c.states.index) == 40 * 300)
        for chain in chains:
            assert c.states.index.match(chain) == a.states.index.match(chain)
        # It was for the newcomer alone, and no message was missed for that.
        assert len(b.states.index) == 0
        assert b.sharing.peers.gaps == c.sharing.peers.gaps == 0


async def test_redis_away_is_only_a_loss_of_words(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        server, redis = await stack.enter_async_context(running_valkey(tmp_path))
        a = await stack.enter_async_context(over_redis(server.url, "a"))
        b = await stack.enter_async_context(over_redis(server.url, "b"))
        await met(a, b)
        await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda: a.sharing.lost["redis"] and b.sharing.lost["redis"])
        a.send(0)
        assert a.requests == [1, 0]
        await eventually(lambda: b.requests == [1, 0])


async def test_rubbish_on_the_channel_changes_nothing(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        server, redis = await stack.enter_async_context(running_valkey(tmp_path))
        a = await stack.enter_async_context(over_redis(server.url, "a"))
        b = await stack.enter_async_context(over_redis(server.url, "b"))
        await met(a, b)
        for rubbish in (b"", b"\xc1", b"\x81\xa6router\x01", b"\x90", b"hello"):
            await redis.publish(redis_keys.LOAD_CHANNEL, rubbish)
        a.send(1)
        await eventually(lambda: b.requests == [0, 1])
        assert b.sharing.refused == 5


async def test_a_router_alone_gathers_nothing() -> None:
    alone = Member("a")
    alone.send(0, [1, 2])
    heard: list[bytes] = []

    class Listener:
        name, lost = "list", 0

        def send(self, data: bytes) -> None:
            heard.append(data)

        async def run(self, _: Any) -> None:
            await asyncio.get_running_loop().create_future()

    async with asyncio.timeout(5):
        task = asyncio.create_task(alone.sharing.run([Listener()]))
        await eventually(lambda: heard)
        task.cancel()
        await asyncio.wait({task})
    assert b"\x01\x00\x00\x00\x00\x00\x00\x00" not in heard[0]
