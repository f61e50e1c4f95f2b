from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from reconciler.errors import Fenced, Stalled, Transient
from reconciler.publish.lease import Held, LeaseHeld, LeaseHolder, LeaseLost, Leaser
from reconciler.publish.redis_edge import connect
from reconciler.publish.valkey import EmbeddedValkey
from schemas.wire.redis_keys import LEASE, LEASE_GENERATION
from tests.behaviour.publish_fixtures import running_valkey
from tests.support import eventually


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[tuple[EmbeddedValkey, Redis]]:
    async with running_valkey(tmp_path) as pair:
        yield pair


@pytest.fixture
def redis(valkey: tuple[EmbeddedValkey, Redis]) -> Redis:
    return valkey[1]


def has_lost(held: Held) -> bool:
    try:
        held.require()
    except LeaseLost:
        return True
    return False


async def test_one_holds_and_the_other_is_told_who_and_how_long(redis: Redis) -> None:
    a, b = Leaser(redis, "a"), Leaser(redis, "b")
    held = await a.acquire()
    with pytest.raises(LeaseHeld, match="a holds the lease, generation 1") as error:
        await b.acquire()
    assert 14 < error.value.retry_after_s <= 15
    await a.release(held)
    assert (await b.acquire()).generation == 2


async def test_of_many_that_ask_at_once_one_gets_it(redis: Redis) -> None:
    asked = [Leaser(redis, f"r{n}").acquire() for n in range(20)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(not isinstance(r, LeaseHeld) for r in results) == 1


async def test_the_generation_grows_over_every_floor_and_survives_an_emptied_store(
    redis: Redis,
) -> None:
    a, b = Leaser(redis, "a"), Leaser(redis, "b")
    first = await a.acquire(floor=41)
    assert first.generation == 42
    await redis.flushall()
    assert (await b.acquire(floor=first.generation)).generation == 43
    with pytest.raises(LeaseLost, match="b took the lease with generation 43; ours was 42"):
        await a.renew(first)


async def test_a_forgotten_lease_is_taken_up_again_if_nobody_came_between(redis: Redis) -> None:
    a = Leaser(redis, "a")
    held = await a.acquire(floor=6)
    await redis.flushall()
    assert (await a.renew(held)).generation == 7
    assert await redis.get(LEASE_GENERATION) == b"7"
    with pytest.raises(LeaseHeld):
        await Leaser(redis, "b").acquire()


async def test_an_expired_lease_holds_no_more_on_either_side(redis: Redis) -> None:
    a, b = Leaser(redis, "a", ttl_s=0.3, timeout_s=0.2), Leaser(redis, "b")
    held = await a.acquire()
    taken = await eventually(b.acquire)
    assert taken.generation == 2
    with pytest.raises(LeaseLost, match="may have run out"):
        held.require()
    with pytest.raises(LeaseLost, match="b took the lease"):
        await a.renew(held)
    await a.release(held)
    assert await redis.hget(LEASE, "holder") == b"b"


async def test_foreign_values_under_our_names_count_as_none(redis: Redis) -> None:
    await redis.set(LEASE, "text")
    await redis.rpush(LEASE_GENERATION, "x")
    a = Leaser(redis, "a")
    held = await a.acquire(floor=3)
    assert held.generation == 4
    await redis.delete(LEASE_GENERATION)
    await redis.set(LEASE_GENERATION, "no number")
    assert (await a.renew(held)).generation == 4


async def test_a_lease_without_an_end_is_none(redis: Redis) -> None:
    await redis.hset(LEASE, mapping={"holder": "ghost", "generation": "9"})
    assert (await Leaser(redis, "a").acquire()).generation == 10


async def test_a_holder_renews_by_itself_and_releases_at_the_end(redis: Redis) -> None:
    holder = await LeaseHolder.acquired(Leaser(redis, "a", ttl_s=0.6, timeout_s=0.5))
    first = holder.require()
    await eventually(lambda: holder.require().expires_at > first.expires_at)
    assert holder.require().generation == 1
    await holder.close()
    with pytest.raises(LeaseLost, match="was released"):
        holder.require()
    assert not await redis.exists(LEASE)


async def test_a_holder_tells_once_that_it_lost(redis: Redis) -> None:
    told: list[LeaseLost] = []
    leaser = Leaser(redis, "a", ttl_s=0.6, timeout_s=0.5)
    holder = await LeaseHolder.acquired(leaser, on_lost=told.append)
    await redis.delete(LEASE)
    await Leaser(redis, "b").acquire()
    await eventually(lambda: told)
    with pytest.raises(Fenced, match="b took the lease"):
        holder.require()
    await holder.close()
    assert len(told) == 1
    assert await redis.hget(LEASE, "holder") == b"b"


async def test_a_hanging_store_ends_the_holding_and_its_return_restores_it(
    valkey: tuple[EmbeddedValkey, Redis],
) -> None:
    server, redis = valkey
    holder = await LeaseHolder.acquired(Leaser(redis, "a", ttl_s=0.6, timeout_s=0.1))
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        await eventually(lambda: has_lost(holder))
        assert holder.lost is None
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert (await eventually(holder.require)).generation == 1
    await holder.close()


async def test_an_acquisition_whose_answer_was_lost_hinders_only_others(
    valkey: tuple[EmbeddedValkey, Redis],
) -> None:
    server, redis = valkey
    a = Leaser(redis, "a", timeout_s=0.1)
    assert server.pid is not None
    await redis.ping()
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Transient, match=r"did not answer within 0\.1 s"):
            await a.acquire()
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert (await eventually(a.acquire)).generation in {1, 2}


async def test_a_dead_store_is_transient() -> None:
    with pytest.raises(Transient, match="acquiring the lease"):
        await Leaser(connect("redis://127.0.0.1:1/0"), "a").acquire()


async def test_a_wrong_url_is_said_without_its_password() -> None:
    with pytest.raises(Stalled, match="redis://host:port") as error:
        connect("postgres://u:canary@host")
    assert "canary" not in str(error.value)


SLEEPER = """
import asyncio, sys
from reconciler.publish.lease import Leaser
from reconciler.publish.redis_edge import connect

async def main():
    leaser = Leaser(connect(sys.argv[1]), "sleeper", ttl_s=0.5, timeout_s=0.4)
    held = await leaser.acquire()
    print(held.generation, flush=True)
    sys.stdin.readline()
    try:
        held.require()
        print("wrote", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
    try:
        await leaser.renew(held)
        print("renewed", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)

asyncio.run(main())
"""


async def test_one_that_slept_through_its_lease_stops_by_itself(
    valkey: tuple[EmbeddedValkey, Redis],
) -> None:
    server, redis = valkey
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER, server.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as sleeper:
        assert sleeper.stdout is not None
        assert await asyncio.to_thread(sleeper.stdout.readline) == "1\n"
        sleeper.send_signal(signal.SIGSTOP)
        assert (await eventually(Leaser(redis, "b").acquire)).generation == 2
        sleeper.send_signal(signal.SIGCONT)
        out, _ = await asyncio.to_thread(sleeper.communicate, "\n")
    assert out.split() == ["LeaseLost", "LeaseLost"]
