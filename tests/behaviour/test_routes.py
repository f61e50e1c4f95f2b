from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis.asyncio import Redis

from reconciler.errors import Fenced, Stalled, Transient
from reconciler.publish.lease import LeaseLost, Leaser
from reconciler.publish.redis_edge import connect
from reconciler.publish.routes import RoutesPublisher
from reconciler.publish.valkey import EmbeddedValkey
from schemas.wire import redis_keys
from schemas.wire.envelope import seal, unseal
from schemas.wire.routing import Freshness, Function, RoutingTable
from tests.behaviour.publish_fixtures import lease, running_valkey
from tests.support import eventually

KEY = Ed25519PrivateKey.generate()


def table(name: str, revision: str = "r1") -> RoutingTable:
    return RoutingTable(
        generation=0,
        revision=revision,
        published_at=0.0,
        functions=(Function(name=name, served_name=name),),
    )


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[tuple[EmbeddedValkey, Redis]]:
    async with running_valkey(tmp_path / "valkey") as pair:
        yield pair


@pytest.fixture
def redis(valkey: tuple[EmbeddedValkey, Redis]) -> Redis:
    return valkey[1]


@pytest.fixture
def publisher(redis: Redis, tmp_path: Path) -> RoutesPublisher:
    return RoutesPublisher(redis, KEY, tmp_path / "a" / "routes", timeout_s=0.5)


async def there(redis: Redis) -> RoutingTable:
    data = await redis.get(redis_keys.ROUTES_CURRENT)
    assert data is not None
    return unseal(data, RoutingTable, KEY.public_key())


async def test_a_table_is_whole_signed_and_announced(
    redis: Redis, publisher: RoutesPublisher
) -> None:
    heard = redis.pubsub(ignore_subscribe_messages=True)
    await heard.subscribe(redis_keys.ROUTES_CHANNEL)
    assert await publisher.current() is None
    assert await publisher.publish(table("chat"), lease=lease(4)) == 1

    message: Any = await eventually(lambda: heard.get_message(timeout=1))
    assert message["data"] == b"1"
    current = await there(redis)
    assert (current.generation, current.lease, current.revision) == (1, 4, "r1")
    assert current.published_at > 0
    assert await publisher.current() == current
    assert await redis.get(redis_keys.routes(1)) == await redis.get(redis_keys.ROUTES_CURRENT)
    assert 0 < await redis.pttl(redis_keys.routes(1)) <= 3600_000
    assert await redis.get(redis_keys.ROUTES_GENERATION) == b"1"
    fresh = await redis.get(redis_keys.ROUTES_FRESH)
    assert fresh is not None
    assert unseal(fresh, Freshness, KEY.public_key()).generation == 1
    await heard.aclose()


async def test_equal_content_gets_no_new_generation_but_is_confirmed(
    redis: Redis, tmp_path: Path
) -> None:
    clock = iter([100.0, 200.0, 200.0, 150.0, 300.0])
    publisher = RoutesPublisher(redis, KEY, tmp_path / "routes", now=lambda: next(clock))
    assert await publisher.publish(table("chat"), lease=lease(1)) == 1

    async def said_at() -> float:
        data = await redis.get(redis_keys.ROUTES_FRESH)
        assert data is not None
        return unseal(data, Freshness, KEY.public_key()).at

    assert await said_at() == 200.0
    assert await publisher.publish(table("chat", revision="r2"), lease=lease(1)) == 1
    assert await publisher.refresh(lease(1)) == 1
    assert await said_at() == 200.0, "a clock that is set back does not make it older"
    assert await publisher.refresh(lease(1)) == 1
    assert await said_at() == 300.0
    assert (await there(redis)).revision == "r1"


async def test_generations_never_go_back(redis: Redis, tmp_path: Path) -> None:
    path = tmp_path / "routes"
    publisher = RoutesPublisher(redis, KEY, path)
    for n in range(3):
        assert await publisher.publish(table(f"m{n}"), lease=lease(1)) == n + 1
    assert await publisher.publish(table("m2"), lease=lease(1), floor=10) == 11
    await redis.flushall()
    restarted = RoutesPublisher(redis, KEY, path)
    assert await restarted.publish(table("m4"), lease=lease(1)) == 12
    path.unlink()
    without_file = RoutesPublisher(redis, KEY, path)
    assert await without_file.publish(table("m5"), lease=lease(1)) == 13


async def test_a_restarted_reconciler_knows_the_last_table(
    redis: Redis, publisher: RoutesPublisher, tmp_path: Path
) -> None:
    await publisher.publish(table("chat"), lease=lease(1))
    from_redis = RoutesPublisher(redis, KEY, tmp_path / "b" / "routes")
    from_file = RoutesPublisher(
        connect("redis://127.0.0.1:1"), KEY, tmp_path / "a" / "routes", timeout_s=0.5
    )
    for other in (from_redis, from_file):
        assert other.newest_lease == 0
        current = await other.current()
        assert current is not None
        assert current.functions[0].name == "chat"
        assert other.newest_lease == 1
    assert await from_redis.publish(table("chat"), lease=lease(2)) == 1


async def test_an_older_lease_is_refused_and_changes_nothing(
    redis: Redis, publisher: RoutesPublisher, tmp_path: Path
) -> None:
    newer = RoutesPublisher(redis, KEY, tmp_path / "b" / "routes")
    assert await publisher.publish(table("old"), lease=lease(1)) == 1
    assert await newer.publish(table("new"), lease=lease(2)) == 2
    for attempt in (
        lambda: publisher.publish(table("late"), lease=lease(1)),
        lambda: publisher.publish(table("new"), lease=lease(1)),
        lambda: publisher.refresh(lease(1)),
    ):
        with pytest.raises(Fenced, match="lease generation 2 came after ours, 1"):
            await attempt()
    assert (await there(redis)).functions[0].name == "new"
    assert await publisher.publish(table("again"), lease=lease(3)) == 3


async def test_a_lease_that_was_taken_but_has_not_written_fences_already(
    redis: Redis, publisher: RoutesPublisher
) -> None:
    first = await Leaser(redis, "a").acquire()
    await publisher.publish(table("chat"), lease=first)
    await redis.delete(redis_keys.LEASE)
    await Leaser(redis, "b").acquire()
    with pytest.raises(Fenced):
        await publisher.publish(table("late"), lease=first)


async def test_a_lease_that_ran_out_writes_nothing(
    redis: Redis, publisher: RoutesPublisher
) -> None:
    with pytest.raises(LeaseLost):
        await publisher.publish(table("chat"), lease=lease(1, ttl_s=-1))
    assert await redis.dbsize() == 0


async def test_a_table_of_a_fenced_writer_is_not_taken_for_the_current_one(
    redis: Redis, publisher: RoutesPublisher, tmp_path: Path
) -> None:
    newer = RoutesPublisher(redis, KEY, tmp_path / "b" / "routes")
    await publisher.publish(table("a"), lease=lease(1))
    # Both give out generation 2; only the newer one's reaches routers.
    await redis.set(redis_keys.LEASE_GENERATION, 2)
    with pytest.raises(Fenced):
        await publisher.publish(table("fenced"), lease=lease(1))
    assert await newer.publish(table("b"), lease=lease(2)) == 2
    restarted = RoutesPublisher(redis, KEY, tmp_path / "a" / "routes")
    for reader in (restarted, publisher):
        current = await reader.current()
        assert current is not None
        assert current.functions[0].name == "b"
    assert await restarted.publish(table("fenced"), lease=lease(3)) == 3
    assert await publisher.publish(table("fenced"), lease=lease(3)) == 3


@pytest.mark.parametrize("spoil", ["flushall", "wrong types", "forged", "deleted"])
async def test_what_redis_lost_is_put_back_as_it_was(
    redis: Redis, publisher: RoutesPublisher, spoil: str
) -> None:
    await publisher.publish(table("chat"), lease=lease(5))
    before = await there(redis)
    keys = (redis_keys.ROUTES_CURRENT, redis_keys.ROUTES_GENERATION, redis_keys.ROUTES_FRESH)
    match spoil:
        case "flushall":
            await redis.flushall()
        case "wrong types":
            for key in (*keys, redis_keys.LEASE_GENERATION, redis_keys.routes(1)):
                await redis.delete(key)
                await redis.rpush(key, "x")
        case "forged":
            forged = seal(table("evil"), Ed25519PrivateKey.generate())
            await redis.set(redis_keys.ROUTES_CURRENT, forged)
        case "deleted":
            await redis.delete(redis_keys.ROUTES_CURRENT)
    forged_generation = spoil == "forged"
    assert await publisher.refresh(lease(5)) == 1 + forged_generation
    after = await there(redis)
    assert after.functions == before.functions
    assert (after == before) != forged_generation
    assert await redis.get(redis_keys.LEASE_GENERATION) == b"5"


async def test_it_is_put_back_by_itself_soon_after_redis_was_emptied_or_died(
    valkey: tuple[EmbeddedValkey, Redis], publisher: RoutesPublisher
) -> None:
    server, redis = valkey
    await publisher.publish(table("chat"), lease=lease(5))
    task = asyncio.create_task(publisher.keep_current(lease(5), interval_s=0.02))
    await redis.flushall()
    assert (await eventually(lambda: there(redis))).generation == 1
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    await eventually(lambda: server.starts == 2)
    assert (await eventually(lambda: there(redis))).generation == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_keeping_current_ends_when_a_newer_lease_writes(
    redis: Redis, publisher: RoutesPublisher
) -> None:
    await publisher.publish(table("chat"), lease=lease(5))
    await redis.set(redis_keys.LEASE_GENERATION, 6)
    with pytest.raises(Fenced):
        await publisher.keep_current(lease(5), interval_s=0.01)


async def test_a_hanging_redis_is_bounded_and_what_was_meant_follows_later(
    valkey: tuple[EmbeddedValkey, Redis], publisher: RoutesPublisher
) -> None:
    server, redis = valkey
    await publisher.publish(table("a"), lease=lease(1))
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(3):
            with pytest.raises(Transient, match=r"within 0\.5 s"):
                await publisher.publish(table("b"), lease=lease(1))
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert await eventually(lambda: publisher.refresh(lease(1))) == 2
    assert (await there(redis)).functions[0].name == "b"


async def test_a_foreign_generation_number_is_passed_over(
    redis: Redis, publisher: RoutesPublisher
) -> None:
    await redis.set(redis_keys.ROUTES_GENERATION, 90)
    await redis.set(redis_keys.ROUTES_CURRENT, b"signed by a key that is gone")
    assert await publisher.current() is None
    assert await publisher.publish(table("chat"), lease=lease(1)) == 91


async def test_two_that_publish_at_once_leave_one_whole_table(redis: Redis, tmp_path: Path) -> None:
    both = [RoutesPublisher(redis, KEY, tmp_path / f"r{n}") for n in range(2)]

    async def many(publisher: RoutesPublisher, name: str) -> list[int]:
        made = []
        for n in range(10):
            try:
                made.append(await publisher.publish(table(f"{name}{n}"), lease=lease(1)))
            except Transient:
                continue
        return made

    a, b = await asyncio.gather(many(both[0], "a"), many(both[1], "b"))
    assert len(set(a) & set(b)) == 0
    assert a == sorted(a)
    assert b == sorted(b)
    assert (await there(redis)).generation == max(*a, *b)


async def test_a_full_disk_is_said_and_nothing_is_published(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    publisher = RoutesPublisher(redis, KEY, tmp_path / "routes")
    fsync: Callable[[int], None] = os.fsync
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Stalled, match="No space left"):
        await publisher.publish(table("chat"), lease=lease(1))
    assert await redis.get(redis_keys.ROUTES_CURRENT) is None
    assert list(tmp_path.glob("*routes*")) == []
    monkeypatch.setattr(os, "fsync", fsync)
    assert await publisher.publish(table("chat"), lease=lease(1)) == 1
