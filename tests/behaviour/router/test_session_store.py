"""Pins shared through a real Valkey: told, heard, kept over restarts, and not waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import pytest
from redis.asyncio import Redis

from router.core.sessions import session_key
from router.fleet.secret import derived, fleet_secret
from router.session_store import SessionStore
from router.settings import Settings, SettingsInvalid
from schemas.wire import redis_keys
from tests.behaviour.publish_fixtures import running_valkey
from tests.support import eventually

NAME = b"a-name-nobody-may-read"


def key(name: bytes = NAME) -> bytes:
    return session_key(b"secret", "team", "chat", name)


@asynccontextmanager
async def running(redis: Redis, limit: int = 100) -> AsyncIterator[SessionStore]:
    before = await subscribers(redis)
    store = SessionStore(limit, b"secret")
    task = asyncio.create_task(store.run(redis))

    async def subscribed() -> bool:
        assert not task.done()
        return await subscribers(redis) > before

    try:
        await eventually(subscribed)
        yield store
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=0.1)


async def subscribers(redis: Redis) -> int:
    ((_, count),) = await redis.pubsub_numsub(redis_keys.SESSIONS_CHANNEL)
    return int(count)


async def test_what_one_process_pins_another_knows(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (_, redis), running(redis) as one, running(redis) as two:
        one.served(key(), "r0", 60.0)
        assert one.replica(key()) == "r0"
        await eventually(lambda: two.replica(key()) == "r0")
        two.served(key(), "r1", 60.0)
        await eventually(lambda: one.replica(key()) == "r1")
        two.release(key())
        await eventually(lambda: one.replica(key()) is None)
        await eventually(lambda: empty(redis))


async def empty(redis: Redis) -> bool:
    return not await redis.keys(redis_keys.SESSION_PATTERN)


async def test_a_process_that_starts_reads_what_there_is(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (_, redis):
        async with running(redis) as one:
            for i in range(1200):
                one.served(key(b"%d" % i), f"r{i % 3}", 60.0)

            async def told() -> bool:
                return len(await redis.keys(redis_keys.SESSION_PATTERN)) >= 100

            await eventually(told)
        await redis.set(redis_keys.session("noise"), b"\xff\xff")
        async with running(redis) as two:
            await eventually(lambda: len(two.pins) >= 50)
            assert len(two.pins) <= 100


async def test_a_session_expires_in_redis_with_its_time_and_its_name_is_never_there(
    tmp_path: Path,
) -> None:
    async with running_valkey(tmp_path) as (_, redis), running(redis) as one:
        one.served(key(), "r0", 100.0)
        name = redis_keys.session(key().hex())
        ttl_ms = await eventually(lambda: positive(redis.pttl(name)))
        assert 90_000 < ttl_ms <= 100_000
        stored = [k + (await redis.get(k) or b"") for k in await redis.keys("*")]
        assert stored
        assert not any(NAME in data for data in stored)


async def positive(answer):
    return max(0, await answer)


async def test_redis_away_changes_nothing_for_this_process(tmp_path: Path) -> None:
    redis = Redis(unix_socket_path=str(tmp_path / "nobody"))
    store = SessionStore(10, b"secret")
    task = asyncio.create_task(store.run(redis))
    await asyncio.sleep(0)
    store.served(key(), "r0", 60.0)
    assert store.replica(key()) == "r0"
    for i in range(20_010):
        store.served(key(b"%d" % i), "r1", 60.0)
    assert len(store.pins) == 10
    assert store.lost == 11
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await redis.aclose()


async def test_what_could_not_be_told_is_told_when_redis_is_back(tmp_path: Path) -> None:
    redis = Redis(unix_socket_path=str(tmp_path / "valkey.sock"))
    store = SessionStore(10, b"secret")
    task = asyncio.create_task(store.run(redis))
    await asyncio.sleep(0)
    store.served(key(), "r0", 60.0)
    async with running_valkey(tmp_path) as (_, other):
        assert await eventually(lambda: other.get(redis_keys.session(key().hex())))
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=0.1)
    await redis.aclose()


def test_the_fleet_secret_is_the_same_everywhere_and_of_one_use_each(tmp_path: Path) -> None:
    plain = Settings(routes=tmp_path)
    assert fleet_secret(plain, "ab") == fleet_secret(plain, "ab") != fleet_secret(plain, "cd")
    file = tmp_path / "secret"
    given = Settings(routes=tmp_path, secret_file=file)
    with pytest.raises(SettingsInvalid, match="secret_file"):
        fleet_secret(given, "ab")
    file.write_text("short\n")
    with pytest.raises(SettingsInvalid, match="holds 5 bytes"):
        fleet_secret(given, "ab")
    file.write_text("0123456789abcdef\n")
    assert fleet_secret(given, "ab") == fleet_secret(given, "cd") != fleet_secret(plain, "ab")
    secret = fleet_secret(given, "ab")
    assert len(derived(secret, "sessions")) == 32
    assert derived(secret, "sessions") != derived(secret, "prompts")


class ForgetfulChannel:
    """What redis-py does under Python 3.11 when a cancellation meets a time-out: it goes on."""

    def __init__(self) -> None:
        self.listened = asyncio.Event()
        self.forgot = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def subscribe(self, *_: str) -> None:
        pass

    async def get_message(self, **_: object) -> None:
        self.listened.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if self.forgot:
                raise
            self.forgot = True


class ForgetfulRedis:
    def __init__(self) -> None:
        self.channel = ForgetfulChannel()

    def pubsub(self, **_: object) -> ForgetfulChannel:
        return self.channel

    async def scan(self, *_: object, **__: object) -> tuple[int, list[bytes]]:
        return 0, []


async def test_it_ends_although_redis_py_forgets_that_it_was_cancelled():
    redis = ForgetfulRedis()
    running = asyncio.create_task(SessionStore(10, b"secret").run(redis))
    await redis.channel.listened.wait()
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=20)
    assert done
    assert redis.channel.forgot
