"""`detoserve-agent run` as a process: its flags, a signed table, reports in Redis, its end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis.asyncio import Redis

from schemas.wire import redis_keys
from schemas.wire.envelope import public_key_hex, seal
from schemas.wire.events import EngineReport
from schemas.wire.routing import Arm, Function, Replica, RoutingTable
from tests.behaviour.agent.agent_process import agent_program, line
from tests.behaviour.agent.engine_process import engine_process
from tests.behaviour.agent.following import EVENT_FLAGS, SMALL
from tests.behaviour.publish_fixtures import running_valkey
from tests.support import eventually

KEY = Ed25519PrivateKey.generate()


def table(generation: int, **replicas: str) -> bytes:
    arm = Arm(
        deployment="d",
        cluster="here",
        replicas=tuple(Replica(id=name, url=url) for name, url in replicas.items()),
    )
    function = Function(name="f", served_name="f", arms=(arm,))
    return seal(
        RoutingTable(generation=generation, revision="r", published_at=1.0, functions=(function,)),
        KEY,
    )


async def publish(redis: Redis, generation: int, sealed: bytes) -> None:
    await redis.set(redis_keys.ROUTES_CURRENT, sealed)
    await redis.set(redis_keys.ROUTES_GENERATION, generation)


async def test_it_follows_what_the_signed_table_names(tmp_path: Path) -> None:
    async with (
        running_valkey(tmp_path) as (valkey, redis),
        engine_process(*SMALL, *EVENT_FLAGS) as engine,
    ):
        forged = Ed25519PrivateKey.generate()
        wrong = seal(RoutingTable(generation=1, revision="r", published_at=1.0), forged)
        await publish(redis, 1, wrong)
        flags = (
            "--redis-url",
            valkey.url,
            "--routes-public-key",
            public_key_hex(KEY),
            "--id",
            "a1",
        )
        async with agent_program(*flags, "--poll-interval-s", "0.1") as process:
            assert await line(process) == {"event": "ready", "id": "a1"}
            await publish(redis, 2, table(2, r0=engine.url))
            assert await line(process) == {"event": "following", "replicas": ["r0"]}

            async def report() -> EngineReport | None:
                data = await redis.get(redis_keys.engine("r0"))
                return None if data is None else msgspec.msgpack.decode(data, type=EngineReport)

            async def follows_events() -> bool:
                found = await report()
                return found is not None and found.events

            await eventually(follows_events)
            await publish(redis, 3, table(3))
            assert await line(process) == {"event": "following", "replicas": []}
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 20) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--redis-url, or"),
        (("--redis-url", "redis://h"), "64 hex"),
        (("--router-url", "https://h"), "--agent-key-file"),
        (
            (
                "--redis-url",
                "redis://h",
                "--routes-public-key",
                public_key_hex(KEY),
                "--engine",
                "h:1",
            ),
            "http://host:port",
        ),
    ],
)
async def test_wrong_flags_are_explained(flags: tuple[str, ...], said: str) -> None:
    async with agent_program(*flags) as process:
        _, error = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode == 2
        assert said in " ".join(error.decode().replace("│", " ").split())
