"""Decisions of a real router in a real Valkey, as `detoserve explain` and `replay` tell them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis.asyncio import Redis

from router.app import Router
from router.settings import Settings
from schemas import api_keys
from schemas.wire import redis_keys
from schemas.wire.envelope import public_key_hex, seal
from schemas.wire.routing import Arm, Function, Key, Policy, Replica, RoutingTable
from tests.behaviour.cli_process import detoserve
from tests.behaviour.publish_fixtures import running_valkey
from tests.behaviour.router.harness import (
    FakeEngine,
    Received,
    fake_engine,
    http,
    post,
    raw,
    routing_table,
    tenant,
)
from tests.support import eventually

SIGNER = Ed25519PrivateKey.generate()
KEY = api_keys.create()
CANARY = "sk-nobody-may-see-this-prompt"
TENANTS = (
    tenant(keys=(Key(id=KEY.id, sha256=bytes.fromhex(KEY.sha256), scopes=("inference", "debug")),)),
)


@dataclass
class Running:
    router: Router
    redis: Redis
    redis_url: str
    engines: list[FakeEngine]

    async def ask(self, text: str, headers: str = "") -> tuple[str, str]:
        """(replica, the whole route header)"""
        body = {"model": "chat", "messages": [{"role": "user", "content": text}]}
        port = int(self.router.url.rpartition(":")[2])
        answer = await raw(port, post(json.dumps(body).encode(), headers=headers, key=KEY.text))
        found = re.search(rb"(x-detoserve-route: ([^;]+);g=\d+;d=\w+)", answer)
        assert found, answer
        return found.group(2).decode(), found.group(1).decode()

    async def detoserve(self, *argv: str) -> str:
        done = await asyncio.to_thread(detoserve, *argv, "--redis-url", self.redis_url)
        assert done.returncode == 0, done.stderr
        return done.stdout

    async def explained(self, header: str) -> list[dict[str, Any]]:
        async def told() -> str:
            return await self.detoserve("explain", header, "--json")

        out: list[dict[str, Any]] = json.loads(await eventually(told, timeout_s=60))
        return out


def table(engines: list[FakeEngine], *, generation: int = 1, **more: Any) -> RoutingTable:
    most = more.pop("max_concurrent", 0)
    replicas = tuple(
        Replica(id=f"r{i}", url=e.url, max_concurrent=most) for i, e in enumerate(engines)
    )
    function = Function(
        **{
            "name": "chat",
            "served_name": "chat",
            "policy_since": "9f3c1ab77777",
            "arms": (Arm(deployment="d", cluster="here", replicas=replicas),),
            **more,
        }
    )
    return routing_table(function, generation=generation, tenants=TENANTS)


@asynccontextmanager
async def running(folder: Path, *, engines: int = 3, **more: Any) -> AsyncIterator[Running]:
    settings = more.pop("settings", {})
    async with AsyncExitStack() as stack:
        valkey, redis = await stack.enter_async_context(running_valkey(folder / "valkey"))
        fakes = [await stack.enter_async_context(fake_engine()) for _ in range(engines)]
        await redis.set(redis_keys.ROUTES_GENERATION, 1)
        await redis.set(redis_keys.ROUTES_CURRENT, seal(table(fakes, **more), SIGNER))
        router = Router(
            Settings(
                **{
                    "redis_url": valkey.url,
                    "routes_public_key": public_key_hex(SIGNER),
                    "port": 0,
                    "admin_port": 0,
                    "probe_interval_s": 0,
                    "max_in_flight": 0,
                    "decisions_per_s": 1000.0,
                    **settings,
                }
            )
        )
        await stack.enter_async_context(router)
        router.state.freshen(2e9)
        await eventually(lambda: router.state.snapshot is not None)
        yield Running(router, redis, valkey.url, fakes)


@asynccontextmanager
async def another(it: Running) -> AsyncIterator[Running]:
    """A router beside it."""
    async with Router(it.router.settings.model_copy(update={"id": "second"})) as router:
        router.state.freshen(2e9)
        await eventually(lambda: router.state.snapshot is not None)
        yield Running(router, it.redis, it.redis_url, it.engines)


async def test_an_answer_can_be_explained_by_its_header(tmp_path: Path) -> None:
    async with running(tmp_path) as it:
        text = CANARY + "x" * 4000
        first, _ = await it.ask(text, "X-Session-ID: my-session\r\n")
        again, header = await it.ask(text, "X-Session-ID: my-session\r\n")
        assert again == first
        (told,) = await it.explained(header)
        assert told["chosen"] == first
        assert told["pinned"] == first
        assert told["policy"] == "expected-latency"
        assert told["policySince"] == "9f3c1ab77777"
        assert told["generation"] == 1
        assert {c["replica"] for c in told["candidates"]} == {"r0", "r1", "r2"}
        held = {c["replica"]: c["cachedTokens"] for c in told["candidates"]}
        assert held[first] > 900
        assert sum(held.values()) == held[first]
        best = told["standings"][0]
        assert best["replica"] == first
        assert best["savedS"] > 0
        assert best["sessionS"] > 0
        assert told["outcome"]["status"] == 200
        assert told["outcome"]["ttftS"] > 0
        assert len(told["otherwise"]["without kvCache"]) >= 1
        page = await it.detoserve("explain", header)
        assert f"its session was on {first}" in page
        assert "set by commit 9f3c1ab77777" in page
        # Nothing of the prompt or of the session's name is anywhere in Redis.
        for key in await it.redis.keys("*"):
            data = await it.redis.dump(key)
            assert CANARY.encode() not in data
            assert b"my-session" not in data + key


async def test_what_the_engine_counted_stands_beside_what_was_thought(tmp_path: Path) -> None:
    async with running(tmp_path, engines=1) as it:
        usage = {
            "prompt_tokens": 1000,
            "completion_tokens": 7,
            "total_tokens": 1007,
            "prompt_tokens_details": {"cached_tokens": 640},
        }
        it.engines[0].answer = http(json.dumps({"choices": [], "usage": usage}).encode())
        _, header = await it.ask("z" * 4000)
        (told,) = await it.explained(header)
        outcome = told["outcome"]
        assert (outcome["inputTokens"], outcome["cachedTokens"]) == (1000, 640)
        assert outcome["outputTokens"] == 7
        page = await it.detoserve("explain", header)
        assert "640 of 1,000 tokens were cached (thought: 0)" in page
        replayed = await it.detoserve("replay", "--policy", "least-load")
        assert "hit rate 64.0 %" in replayed


async def test_a_retry_is_explained_with_what_it_was_kept_from(tmp_path: Path) -> None:
    async with running(tmp_path, engines=2) as it:
        for engine in it.engines:
            engine.answer = http(status="503 Service Unavailable")
        _, header = await it.ask("q")
        for engine in it.engines:
            engine.answer = http()
        attempts = await it.explained(header)
        assert [a["attempt"] for a in attempts] == [1, 2]
        first, second = attempts
        assert {first["chosen"], second["chosen"]} == {"r0", "r1"}
        assert second["removed"] == [
            {"replica": first["chosen"], "reason": "tried before, and failed"}
        ]
        assert second["outcome"]["status"] == 503
        assert second["outcome"]["attempts"] == 2


async def test_a_replica_that_was_full_is_told_as_such(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def wait(received: Received, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await http()(received, writer)

    async with running(tmp_path, engines=2, max_concurrent=1) as it:
        for engine in it.engines:
            engine.answer = wait
        both = [asyncio.create_task(it.ask(text)) for text in ("p", "q")]
        await eventually(lambda: all(engine.received for engine in it.engines))
        gate.set()
        told = [(await it.explained((await one)[1]))[0] for one in both]
        (kept,) = [one for one in told if one["removed"]]
        (other,) = [one for one in told if not one["removed"]]
        assert kept["removed"] == [{"replica": other["chosen"], "reason": "full: 1 requests of 1"}]


async def test_a_replica_that_a_person_chose_is_told_as_such(tmp_path: Path) -> None:
    async with running(tmp_path) as it:
        replica, header = await it.ask("q", "x-detoserve-replica: r2\r\n")
        assert replica == "r2"
        (told,) = await it.explained(header)
        assert told["forced"] is True
        assert {r["replica"] for r in told["removed"]} == {"r0", "r1"}
        assert "a person chose r2" in await it.detoserve("explain", header)


async def test_simple_policies_are_recorded_with_what_caches_would_say(tmp_path: Path) -> None:
    async with running(tmp_path, policy=Policy(name="round-robin")) as it:
        text = "y" * 6000
        headers = [(await it.ask(text))[1] for _ in range(6)]
        for header in headers:
            (told,) = await it.explained(header)
            assert told["policy"] == "round-robin"
            assert len(told["chain"]) == 16 * (6006 // 256 // 4)
        out = json.loads(await it.detoserve("replay", "--policy", "expected-latency", "--json"))
        assert out[0]["recordedRequests"] == 6
        # Three replicas in turn hold it after three requests; by caches it is held after the first.
        assert out[0]["recorded"]["hitRate"] < out[0]["proposed"]["hitRate"]


async def test_a_router_that_ends_has_told_what_it_recorded(tmp_path: Path) -> None:
    async with running(tmp_path) as it:
        async with another(it) as second:
            _, header = await second.ask("q")
        ((_, fields),) = await it.redis.xrange(redis_keys.decisions("team"))
        assert header.endswith(fields[b"i"].decode())


async def test_nothing_is_recorded_where_nobody_wants_it(tmp_path: Path) -> None:
    async with running(tmp_path, settings={"decisions_per_s": 0.0}) as it:
        await it.ask("q")
        done = await asyncio.to_thread(detoserve, "explain", "abc", "--redis-url", it.redis_url)
        assert done.returncode == 1
        assert await it.redis.keys(redis_keys.DECISIONS_PATTERN) == []


async def test_sessions_of_one_router_are_known_to_the_next(tmp_path: Path) -> None:
    policy = Policy(name="session")
    async with running(tmp_path, policy=policy) as it:
        header = "X-Session-ID: s\r\n"
        home, _ = await it.ask("q", header + "x-detoserve-replica: r0\r\n")
        other = "r1" if (await it.ask("q", "X-Session-ID: t\r\n"))[0] != "r1" else "r2"
        moved, _ = await it.ask("q", header + f"x-detoserve-replica: {other}\r\n")
        assert (home, moved) == ("r0", other)

        async def told() -> bool:
            values = [
                await it.redis.get(key) for key in await it.redis.keys(redis_keys.SESSION_PATTERN)
            ]
            return other in {msgspec.msgpack.decode(value)[1] for value in values if value}

        await eventually(told)
        async with another(it) as second:
            await eventually(lambda: second.router.proxy.sessions.pins)
            assert (await second.ask("q", header))[0] == other
