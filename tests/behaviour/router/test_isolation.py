"""What one tenant does shows nowhere to another, and what any of them says shows nowhere at all."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from pathlib import Path

import aiohttp
import pytest

from agent.simulated.server import running_engine
from agent.simulated.settings import EngineSettings
from router.core.api import PASSED
from router.core.isolation import cache_salt
from schemas.wire.routing import Limits, Policy
from tests.behaviour.router.harness import (
    CHAT,
    KEY,
    fake_engine,
    function,
    http,
    post,
    raw,
    routing_table,
    running_router,
    tenant,
)
from tests.behaviour.router.test_metering import OTHER, ask, body, metered, records
from tests.support import eventually

CANARY = "kanarienvogel"


async def test_a_foreign_model_takes_as_long_as_one_that_does_not_exist(tmp_path):
    async with fake_engine() as engine:
        table = routing_table(
            function(engine.url),
            function(engine.url, name="secret"),
            tenants=(tenant(models=("sim",)),),
        )
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            took: dict[bytes, list[float]] = {b"secret": [], b"nosuch": []}
            for name in [b"secret", b"nosuch"] * 150:  # in turn: the machine's moods hit both
                request = post(CHAT.replace(b'"sim"', b'"%b"' % name))
                began = time.perf_counter()
                answer = await raw(router.port, request)
                took[name].append(time.perf_counter() - began)
                assert b" 404 " in answer
            foreign, missing = map(statistics.median, took.values())
            assert abs(foreign - missing) < 0.5 * max(foreign, missing)
        assert not engine.received


async def test_prompts_of_two_tenants_share_no_block(tmp_path):
    chat = PASSED["/v1/chat/completions"]
    request = body()
    async with (
        fake_engine() as engine,
        running_router(routing_table(function(engine.url)), tmp_path) as router,
    ):
        brain, served = router.router.brain, function(engine.url)

        def blocks(who: str, wish: str = "", what: dict = request) -> set[int]:
            salt = cache_salt(b"k" * 32, who, wish)
            return set(brain.read(served, chat, what, 5000, salt).blocks)

        assert len(blocks("red")) > 10
        assert blocks("red") == blocks("red", what={**request, "cache_salt": "mine"})
        for other in (("blue", ""), ("red", "mine"), ("re", "d"), ("redd", "")):
            assert not blocks("red") & blocks(*other)
        # Salts do not tell whose they are: another fleet's are others.
        assert cache_salt(b"k" * 32, "red") != cache_salt(b"j" * 32, "red")
        assert "red" not in cache_salt(b"k" * 32, "red")


async def test_a_tenants_prompts_attract_its_own_requests_and_no_others(tmp_path):
    """Routed by caches: the same tenant comes back, and another goes where there is less to do."""
    async with running_engine(EngineSettings()) as one, running_engine(EngineSettings()) as two:
        shared = function(
            one.url, two.url, engine="simulated", policy=Policy(name="expected-latency")
        )
        async with metered(tmp_path, shared) as (router, redis):
            for key in [KEY.text] * 4 + [OTHER.text] * 2 + [KEY.text]:
                assert (await ask(router, body(max_tokens=1), key=key))[0] == 200
            first, *mine, foreign, again, last = await records(redis, 7)
            assert {r.replica for r in mine} == {first.replica} == {last.replica}
            assert all(r.cached_tokens > 900 for r in (*mine, last))
            assert foreign.cached_tokens == 0 < again.cached_tokens
            assert again.replica == foreign.replica


async def test_metrics_name_tenants_only_where_that_is_wanted(tmp_path):
    limited = tenant("red-team", limits=Limits(requests_per_minute=100, tokens_per_minute=10**6))
    async with fake_engine() as engine:
        table = routing_table(function(engine.url), tenants=(limited,))
        for wanted in (False, True):
            async with running_router(
                table, tmp_path, probe_interval_s=0, tenant_metrics=wanted
            ) as router:
                assert b" 200 " in await raw(router.port, post(CHAT))

                async def page(url: str = router.router.admin_url) -> str:
                    async with (
                        aiohttp.ClientSession() as session,
                        session.get(f"{url}/metrics") as response,
                    ):
                        return await response.text()

                shown = await page()
                assert 'function="sim"' in shown
                assert ("red-team" in shown) == wanted
                assert KEY.id not in shown


async def contents(redis) -> bytes:
    """Everything in Redis, names and values."""
    out = []
    async for name in redis.scan_iter(count=1000):
        kind = (await redis.type(name)).decode()
        value = {
            "string": redis.get,
            "hash": redis.hgetall,
            "stream": redis.xrange,
            "list": lambda n: redis.lrange(n, 0, -1),
            "set": redis.smembers,
            "zset": lambda n: redis.zrange(n, 0, -1, withscores=True),
        }[kind]
        out += [name, repr(await value(name)).encode()]
    return b"\n".join(out)


def files(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("policy", ["expected-latency", "round-robin"])
async def test_no_prompt_and_no_key_gets_to_redis_disk_or_metrics(tmp_path, caplog, policy):
    said = body(messages=[{"role": "user", "content": f"{CANARY} " * 300}], user=CANARY)
    async with (
        running_engine(EngineSettings()) as engine,
        fake_engine(http(CANARY.encode(), "500 Internal Server Error")) as broken,
        metered(
            tmp_path,
            function(engine.url, engine="simulated", policy=Policy(name=policy)),
            function(broken.url, name="broken"),
        ) as (router, redis),
    ):
        session = {"prompt_cache_key": CANARY, "metadata": {"session_id": CANARY}}
        for request in (
            said,
            said | {"stream": True},
            said | {"cache_salt": CANARY},
            said | session,
            said | {"model": CANARY},
            said | {"model": "broken"},
            said | {"n": CANARY},
        ):
            await ask(router, request)
        port = int(router.url.rpartition(":")[2])
        await raw(port, post(json.dumps(said).encode()[:-1]))
        await raw(port, post(json.dumps(said).encode(), key=KEY.text + CANARY))
        await raw(port, post(CHAT, headers=f"X-Session-Id: {CANARY}\r\nX-User: {CANARY}\r\n"))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(json.dumps(said | {"stream": True, "max_tokens": 500}).encode()))
        await reader.readuntil(b"\n\n")
        writer.close()
        await records(redis, 7)

        async with (
            aiohttp.ClientSession() as client,
            client.get(f"{router.admin_url}/metrics") as response,
        ):
            shown = await response.text()
        stored = await contents(redis)
        kept = files(tmp_path / "router")
        # Positive controls: the prompt went to engines, and what is looked through is where things are.
        assert CANARY.encode() in broken.received[-1].body
        assert b"team" in stored
        assert b"team" in kept
        assert KEY.id.encode() in stored
        for secret in (CANARY, KEY.text, KEY.text[14:], OTHER.text):
            assert secret.encode() not in stored
            assert secret.encode() not in kept
            assert secret not in shown
            assert secret not in caplog.text


async def test_suspended_tenants_streams_finish_and_nothing_new_begins(tmp_path):
    async with running_engine(EngineSettings()) as engine:
        table = routing_table(function(engine.url, engine="simulated"))
        async with running_router(table, tmp_path, probe_interval_s=0) as router:
            request = {**body(stream=True, max_tokens=40), "ignore_eos": True}
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writer.write(post(json.dumps(request).encode()))
            begun = await reader.readuntil(b"\n\n")
            router.install(routing_table(*table.functions, generation=2, tenants=(
                tenant(suspended=True),
            )))  # fmt: skip
            refused = await raw(router.port, post(CHAT))
            assert b" 403 " in refused
            assert b"tenant_suspended" in refused
            rest = await reader.read()
            assert rest.rstrip().endswith(b"[DONE]\n\n\r\n0")
            assert (begun + rest).count(b'"content":"') == 41
            writer.close()
            router.install(routing_table(*table.functions, generation=3))
            assert b" 200 " in await raw(router.port, post(CHAT))
            await eventually(lambda: router.router.state.in_flight.total == 0)
