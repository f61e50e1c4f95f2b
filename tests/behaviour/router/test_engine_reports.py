"""Agents' reports on their way to routers: through Redis, and signed over HTTP from outside."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import secrets
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from redis.asyncio import Redis

from agent.publishing.to_redis import ToRedis
from agent.publishing.to_routers import ToRouters
from router.app import Router
from router.settings import Settings, SettingsInvalid
from schemas.wire import agent_signature, redis_keys
from schemas.wire.envelope import public_key_hex, seal
from schemas.wire.events import AgentAnswer, AgentHeartbeat, AgentPost, EngineReport
from schemas.wire.routing import Cluster, Policy, RoutingTable
from tests.behaviour.agent.agent_process import agent_program, line
from tests.behaviour.agent.engine_process import engine_process
from tests.behaviour.agent.following import EVENT_FLAGS, SMALL, Listed, running_agent
from tests.behaviour.publish_fixtures import running_valkey
from tests.behaviour.router.certificates import self_signed
from tests.behaviour.router.harness import (
    KEY,
    RunningRouter,
    fake_engine,
    function,
    http,
    routing_table,
    running_router,
)
from tests.support import eventually, free_port

SIGNING = Ed25519PrivateKey.generate()
AGENT_KEY = "agent-key-of-cluster-here-" + "x" * 20
SHA256 = hashlib.sha256(AGENT_KEY.encode()).hexdigest()
EXPECTED = Policy(name="expected-latency")
TEXT = "the canary sings of things that nobody may hear " * 40


@asynccontextmanager
async def router_on_redis(
    redis_url: str, redis: Redis, table: RoutingTable, **more: Any
) -> AsyncIterator[Router]:
    await redis.set(redis_keys.ROUTES_CURRENT, seal(table, SIGNING))
    await redis.set(redis_keys.ROUTES_GENERATION, table.generation)
    settings = Settings(
        port=0, admin_port=0, redis_url=redis_url, routes_public_key=public_key_hex(SIGNING), **more
    )
    async with Router(settings) as router:
        await eventually(lambda: router.state.snapshot)
        yield router


async def chat(router: Router, text: str) -> None:
    body = {"model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    headers = {"Authorization": f"Bearer {KEY.text}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{router.url}/v1/chat/completions", json=body, headers=headers) as response,
    ):
        assert response.status == 200, await response.text()
        await response.read()


def held(router: Router, replica: str = "sim-r0") -> int:
    return router.brain.states.index.held(router.brain.slots[replica])


def fresh_table(*urls: str, **more: Any) -> RoutingTable:
    return routing_table(function(*urls, policy=EXPECTED), published_at=time.time(), **more)


async def test_a_killed_engine_is_credited_with_nothing(tmp_path: Path) -> None:
    """From the engine's death on, through its successor, until something is sent there again."""
    flags = (*SMALL, *EVENT_FLAGS, "--port", str(free_port()))
    async with running_valkey(tmp_path) as (valkey, redis), engine_process(*flags) as first:
        sink = ToRedis(redis, report_ttl_s=10.0, heartbeat_ttl_s=5.0)
        async with (
            router_on_redis(valkey.url, redis, fresh_table(first.url)) as router,
            running_agent(Listed({"sim-r0": first.url}), sink),
        ):
            slot = router.brain.slots["sim-r0"]
            report = await eventually(lambda: router.brain.reports.last(slot))
            assert report.block_tokens == 16
            await chat(router, TEXT)
            assert held(router) > 5
            first.process.send_signal(signal.SIGKILL)
            await first.process.wait()
            await eventually(lambda: held(router) == 0)
            async with engine_process(*flags) as second:
                assert second.url == first.url
                await eventually(
                    lambda: (last := router.brain.reports.last(slot)) and last.epoch != report.epoch
                )
                assert held(router) == 0
                await chat(router, TEXT)
                assert held(router) > 5

            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{router.admin_url}/metrics") as answer,
            ):
                page = await answer.text()
            assert 'detoserve_router_cache_trust{replica="sim-r0"} 1.0' in page
            assert 'detoserve_router_engine_reports_total{outcome="believed"}' in page


async def test_a_router_that_comes_later_asks_for_what_was_said(tmp_path: Path) -> None:
    async with running_valkey(tmp_path) as (valkey, redis):
        report = EngineReport(
            replica="sim-r0",
            at=time.time(),
            epoch=1,
            capacity_blocks=64,
            block_tokens=16,
            kv_usage=0.5,
        )
        await redis.set(redis_keys.engine("sim-r0"), msgspec.msgpack.encode(report))
        await redis.set(redis_keys.engine("other"), b"\xc1 poison")
        table = fresh_table("http://127.0.0.1:1", "http://127.0.0.1:2")
        await redis.set(redis_keys.engine("sim-r1"), b"\xc1 poison")
        async with router_on_redis(valkey.url, redis, table) as router:
            slot = router.brain.slots["sim-r0"]
            await eventually(lambda: router.brain.states.load.kv_used[slot] == 0.5)
            # Reports of what the table does not name, and nonsense, move nothing.
            unknown = msgspec.structs.replace(report, replica="nobody")
            await redis.publish(redis_keys.ENGINES_CHANNEL, b"nonsense")
            await redis.publish(redis_keys.ENGINES_CHANNEL, msgspec.msgpack.encode(unknown))
            newer = msgspec.structs.replace(report, at=time.time(), kv_usage=0.25)
            await redis.publish(redis_keys.ENGINES_CHANNEL, msgspec.msgpack.encode(newer))
            await eventually(lambda: router.brain.states.load.kv_used[slot] == 0.25)
            assert router.brain.slots.keys() == {"sim-r0", "sim-r1"}


def keys_file(folder: Path, key: str = AGENT_KEY) -> Path:
    file = folder / "agent-keys"
    file.write_text(f"# east, until spring\n{'old' * 20}\n{key}\n")
    return file


@asynccontextmanager
async def listening(folder: Path, *urls: str, **more: Any) -> AsyncIterator[RunningRouter]:
    clusters = (Cluster(name="here", agent_key_sha256=SHA256), Cluster(name="there"))
    away = function("http://127.0.0.1:9", name="away")
    arms = (msgspec.structs.replace(away.arms[0], cluster="there"),)
    functions = (function(*urls, policy=EXPECTED), msgspec.structs.replace(away, arms=arms))
    table = routing_table(*functions, clusters=clusters)
    async with running_router(
        table, folder, agent_port=0, agent_keys_file=keys_file(folder), **more
    ) as router:
        yield router


async def send(router: RunningRouter, post: Any, **changes: Any) -> tuple[int, Any]:
    """A POST as an agent signs it, with `changes` after the signature."""
    body = post if isinstance(post, bytes) else msgspec.msgpack.encode(post)
    key = changes.pop("key", AGENT_KEY).encode()
    parts = {
        "cluster": changes.pop("cluster", "here"),
        "timestamp": f"{time.time():.3f}",
        "nonce": changes.pop("nonce", secrets.token_hex(16)),
    }
    signature = agent_signature.sign(key, body=body, **parts)
    headers = {
        agent_signature.CLUSTER_HEADER: parts["cluster"],
        agent_signature.TIMESTAMP_HEADER: parts["timestamp"],
        agent_signature.NONCE_HEADER: parts["nonce"],
        agent_signature.SIGNATURE_HEADER: signature,
    }
    url = router.router.agent_url + changes.pop("path", agent_signature.PATH)
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=io.BytesIO(changes.pop("body", body)), headers=headers) as response,
    ):
        data = await response.read()
        if response.status == 200:
            return 200, msgspec.msgpack.decode(data, type=AgentAnswer)
        return response.status, data.decode()


def a_post(*reports: EngineReport) -> AgentPost:
    return AgentPost(heartbeat=AgentHeartbeat(id="a", at=time.time()), reports=reports)


def about(replica: str, **fields: Any) -> EngineReport:
    return EngineReport(**{"replica": replica, "at": time.time(), "epoch": 1, **fields})


async def test_reports_over_http_count_for_the_agent_s_own_cluster(tmp_path: Path) -> None:
    async with listening(tmp_path, "http://127.0.0.1:1") as router:
        brain = router.router.brain
        post = a_post(
            about("sim-r0", kv_usage=0.5),
            about("away-r0", kv_usage=0.5),
            about("nobody"),
        )
        status, answer = await send(router, post)
        assert status == 200
        assert answer.replicas == {"sim-r0": "http://127.0.0.1:1"}
        assert answer.refused.keys() == {"away-r0", "nobody"}
        kv_used = {name: brain.states.load.kv_used[slot] for name, slot in brain.slots.items()}
        assert kv_used == {"sim-r0": 0.5, "away-r0": 0.0}

        status, answer = await send(router, a_post(about("sim-r0", kv_usage=7.0)))
        assert answer.refused == {"sim-r0": "kv_usage is not within 0 and 1"}


async def test_forged_and_repeated_posts_count_for_nothing(tmp_path: Path) -> None:
    async with listening(tmp_path, "http://127.0.0.1:1") as router:
        brain = router.router.brain
        post = a_post(about("sim-r0", kv_usage=0.5))
        slot = brain.slots["sim-r0"]
        assert await send(router, post, key="y" * 40) == (401, "not authenticated\n")
        assert await send(router, post, key=SHA256) == (401, "not authenticated\n")
        assert await send(router, post, cluster="there") == (401, "not authenticated\n")
        assert await send(router, post, body=b"another") == (401, "not authenticated\n")
        assert brain.states.load.kv_used[slot] == 0.0
        assert (await send(router, post, nonce="7" * 32))[0] == 200
        assert await send(router, post, nonce="7" * 32) == (401, "it was sent before\n")
        # Signed anew it is no forgery, but old news all the same.
        _, answer = await send(router, post)
        assert answer.refused == {"sim-r0": "not newer than the last"}
        assert (await send(router, b"\xc1"))[0] == 400
        assert (await send(router, b"x" * (agent_signature.MAX_BODY_BYTES + 1)))[0] == 413
        assert (await send(router, post, path="/v1/models"))[0] == 404


async def test_an_agent_without_redis_follows_what_routers_name(tmp_path: Path) -> None:
    async with (
        engine_process(*SMALL, *EVENT_FLAGS) as engine,
        listening(tmp_path, engine.url) as router,
        aiohttp.ClientSession() as session,
    ):
        way = ToRouters([router.router.agent_url], AGENT_KEY.encode(), "here", session)
        async with running_agent(way, way, cluster="here"):
            brain = router.router.brain
            slot = brain.slots["sim-r0"]
            report = await eventually(lambda: brain.reports.last(slot))
            assert report.agent == "here/test"
            assert report.capacity_blocks > 0
            await eventually(lambda: (last := brain.reports.last(slot)) and last.events)


async def test_what_one_router_hears_the_others_hear_by_redis(tmp_path: Path) -> None:
    clusters = (Cluster(name="here", agent_key_sha256=SHA256),)
    table = fresh_table("http://127.0.0.1:1", clusters=clusters)
    more = {"agent_port": 0, "agent_keys_file": keys_file(tmp_path)}
    async with (
        running_valkey(tmp_path / "valkey") as (valkey, redis),
        router_on_redis(valkey.url, redis, table, **more) as one,
        router_on_redis(valkey.url, redis, table) as other,
    ):
        way_in = RunningRouter(one, tmp_path)

        async def heard() -> bool:
            await send(way_in, a_post(about("sim-r0", kv_usage=0.5)))
            return other.brain.states.load.kv_used[other.brain.slots["sim-r0"]] == 0.5

        await eventually(heard)
        kept = b"".join([await redis.get(key) or b"" for key in await redis.keys("*agent:*")])
        assert b"here/a" in kept
        assert AGENT_KEY.encode() not in kept


async def test_the_agent_s_program_posts_over_tls(tmp_path: Path) -> None:
    certificate, private = self_signed(tmp_path)
    tls = {"agent_tls_cert_file": certificate, "agent_tls_key_file": private}
    key = tmp_path / "agent.key"
    key.write_text(AGENT_KEY + "\n")
    async with (
        engine_process(*SMALL, *EVENT_FLAGS) as engine,
        listening(tmp_path, engine.url, **tls) as router,
    ):
        url = router.router.agent_url
        assert url.startswith("https://")
        flags = ("--router-url", url, "--agent-key-file", str(key), "--cluster", "here")
        async with agent_program(
            *flags, "--id", "a", "--router-ca-file", str(certificate)
        ) as process:
            assert await line(process) == {"event": "ready", "id": "a"}
            assert await line(process) == {"event": "following", "replicas": ["sim-r0"]}
            brain = router.router.brain
            slot = brain.slots["sim-r0"]
            report = await eventually(lambda: brain.reports.last(slot), timeout_s=20)
            assert report.agent == "here/a"
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 20) == 0
        # Nobody vouches for the router: nothing is told.
        async with agent_program(*flags) as process:
            assert process.stderr is not None
            async with asyncio.timeout(20):
                while b"publishing" not in (said := await process.stderr.readline()):
                    assert said
            assert b"ClientConnectorCertificateError" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [("short\n", "agent_keys_file: .*:1: a key has 32"), (None, "agent_keys_file")],
)
async def test_keys_that_are_none_are_refused_at_the_start(
    tmp_path: Path, text: str | None, said: str
) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingsInvalid, match=said):
        async with running_router(routing_table(), tmp_path, agent_port=0, agent_keys_file=file):
            pass


def says(prompt_tokens: int, cached_tokens: int | None) -> bytes:
    """An answer with its usage, as engines give it."""
    details = None if cached_tokens is None else {"cached_tokens": cached_tokens}
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 1,
        "prompt_tokens_details": details,
    }
    return json.dumps({"object": "chat.completion", "choices": [], "usage": usage}).encode()


LONG = TEXT * 4


async def test_what_engines_had_of_prompts_is_held_against_predictions(tmp_path: Path) -> None:
    async with fake_engine() as engine:
        table = routing_table(function(engine.url, policy=EXPECTED))
        async with running_router(table, tmp_path) as running:
            router = running.router
            trust, slot = router.brain.states.trust, router.brain.slots["sim-r0"]
            tokens = len(LONG) // 4
            engine.answer = http(says(tokens, 0))
            await chat(router, LONG)  # the first of it: nothing is predicted
            assert trust.share_come_true(slot) is None
            engine.answer = http(says(tokens, tokens - 16))
            await chat(router, LONG)
            assert trust.share_come_true(slot) == 1
            engine.answer = http(says(tokens, 200))
            for _ in range(25):
                await chat(router, LONG)
            assert trust.factors[slot] < 0.7
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{router.admin_url}/metrics") as answer,
            ):
                page = await answer.text()
            (line_,) = [
                x for x in page.splitlines() if x.startswith("detoserve_router_cache_trust{")
            ]
            assert float(line_.split()[1]) == pytest.approx(trust.factors[slot])
            # An engine that has nothing of it, again and again, has lost its cache.
            engine.answer = http(says(tokens, 0))
            for _ in range(3):
                await chat(router, LONG)
            assert slot not in trust.factors


async def test_a_simulated_engine_s_hits_are_as_predicted(tmp_path: Path) -> None:
    async with engine_process(*SMALL, "--num-blocks", "512") as engine:
        table = routing_table(function(engine.url, policy=EXPECTED))
        async with running_router(table, tmp_path) as running:
            router = running.router
            for turns in range(1, 6):
                await chat(router, TEXT[: 300 * turns])
            share = router.brain.states.trust.share_come_true(router.brain.slots["sim-r0"])
            assert share is not None
            assert share > 0.9
