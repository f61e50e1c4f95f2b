from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from redis.asyncio import Redis

from reconciler.publish.routers import RouterWatch
from reconciler.publish.valkey import EmbeddedValkey
from schemas.wire import redis_keys
from schemas.wire.events import RouterHeartbeat
from tests.behaviour.publish_fixtures import running_valkey
from tests.support import eventually


class Watched:
    """A running watch that counts how often it told of a change."""

    def __init__(self, redis: Redis) -> None:
        self.changes = 0
        self.watch = RouterWatch(
            redis, self._count, check_s=0.03, scan_s=0.1, forget_s=0.3, timeout_s=0.3
        )

    def _count(self) -> None:
        self.changes += 1

    @property
    def generations(self) -> dict[str, int] | None:
        beats = self.watch.alive()
        return None if beats is None else {name: b.generation for name, b in beats.items()}


async def report(redis: Redis, beat: RouterHeartbeat, *, ttl_ms: int = 60_000) -> None:
    data = msgspec.msgpack.encode(beat)
    await redis.set(redis_keys.router(beat.id), data, px=ttl_ms)


async def announce(redis: Redis, beat: RouterHeartbeat) -> None:
    await report(redis, beat)
    await redis.publish(redis_keys.ROUTERS_CHANNEL, msgspec.msgpack.encode(beat))


def beat(
    name: str, generation: int, *, at: float = 1.0, draining: bool = False, **busy: int
) -> RouterHeartbeat:
    return RouterHeartbeat(id=name, at=at, generation=generation, in_flight=busy, draining=draining)


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[tuple[EmbeddedValkey, Redis]]:
    async with running_valkey(tmp_path) as pair:
        yield pair


@pytest.fixture
def redis(valkey: tuple[EmbeddedValkey, Redis]) -> Redis:
    return valkey[1]


@pytest.fixture
async def watched(redis: Redis) -> AsyncIterator[Watched]:
    watched = Watched(redis)
    assert watched.watch.alive() is None
    task = asyncio.create_task(watched.watch.run())
    yield watched
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_routers_are_found_heard_and_forgotten(redis: Redis, watched: Watched) -> None:
    await report(redis, beat("a", 3, r1=2))
    await eventually(lambda: watched.generations == {"a": 3})
    await announce(redis, beat("b", 4))
    await eventually(lambda: watched.generations == {"a": 3, "b": 4})
    await announce(redis, beat("a", 4, at=2.0))
    await eventually(lambda: watched.generations == {"a": 4, "b": 4})
    await redis.delete(redis_keys.router("b"))
    await eventually(lambda: watched.generations == {"a": 4})


async def test_an_announcement_is_heard_at_once(redis: Redis) -> None:
    watched = Watched(redis)
    watched.watch._check_s = watched.watch._scan_s = 60.0
    task = asyncio.create_task(watched.watch.run())
    await eventually(lambda: watched.generations == {})
    await announce(redis, beat("a", 1))
    await eventually(lambda: watched.generations == {"a": 1}, timeout_s=2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_only_changes_that_matter_are_told(redis: Redis, watched: Watched) -> None:
    await report(redis, beat("a", 1, r1=1))
    await eventually(lambda: watched.generations == {"a": 1})
    told = watched.changes
    for n in range(2, 6):
        await announce(redis, beat("a", 1, at=float(n), r1=n))
    await eventually(lambda: (watched.watch.alive() or {})["a"].in_flight == {"r1": 5})
    assert watched.changes == told
    await announce(redis, beat("a", 1, at=9.0))
    await eventually(lambda: watched.changes == told + 1)


async def test_an_emptied_redis_does_not_mean_that_nobody_serves(
    redis: Redis, watched: Watched
) -> None:
    await report(redis, beat("a", 1, r1=1))
    await report(redis, beat("leaving", 1, draining=True))
    await eventually(lambda: watched.generations == {"a": 1, "leaving": 1})
    await redis.flushall()
    await eventually(lambda: watched.generations == {"a": 1})
    told = watched.changes
    await report(redis, beat("a", 1, at=2.0, r1=1))
    await asyncio.wait_for(redis.ping(), 1)
    await eventually(lambda: (watched.watch.alive() or {})["a"].at == 2.0)
    assert watched.changes == told
    await redis.flushall()
    await eventually(lambda: watched.generations == {})


async def test_while_redis_hangs_or_is_away_nobody_can_tell(
    valkey: tuple[EmbeddedValkey, Redis], watched: Watched
) -> None:
    server, redis = valkey
    await report(redis, beat("a", 1))
    await eventually(lambda: watched.generations == {"a": 1})
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        await eventually(lambda: watched.generations is None)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await eventually(lambda: watched.generations == {"a": 1})
    os.kill(server.pid, signal.SIGKILL)
    await eventually(lambda: server.starts == 2)
    await eventually(redis.ping)
    await report(redis, beat("a", 2, at=2.0))
    await eventually(lambda: watched.generations == {"a": 2})


async def test_what_cannot_be_read_is_there_and_serves_nothing_known(
    redis: Redis, watched: Watched
) -> None:
    await redis.set(redis_keys.router("odd"), b"\xc1 no message")
    await redis.set(
        redis_keys.router("newer"),
        msgspec.msgpack.encode(RouterHeartbeat(version=99, id="newer", at=1.0, generation=7)),
    )
    await redis.set(redis_keys.router("liar"), msgspec.msgpack.encode(beat("another", 7)))
    await redis.rpush(redis_keys.router("list"), "x")
    await redis.publish(redis_keys.ROUTERS_CHANNEL, b"noise")
    await eventually(lambda: watched.generations == {"odd": 0, "newer": 0, "liar": 0})


async def test_a_router_whose_clock_was_set_back_is_still_heard(
    redis: Redis, watched: Watched
) -> None:
    await announce(redis, beat("a", 1, at=5000.0))
    await eventually(lambda: watched.generations == {"a": 1})
    await announce(redis, beat("a", 2, at=1400.0))
    await eventually(lambda: watched.generations == {"a": 2})
    await announce(redis, beat("a", 3, at=1401.0))
    await eventually(lambda: watched.generations == {"a": 3})
