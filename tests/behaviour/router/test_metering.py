"""What the ledger hears of requests is what engines did, and clients see nothing of the counting."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.simulated.server import running_engine
from agent.simulated.settings import EngineSettings
from agent.simulated.timing import TimeModel
from router.app import Router
from router.settings import Settings
from schemas import api_keys
from schemas.wire.envelope import public_key_hex, seal
from schemas.wire.events import UsageRecord, usage_record
from schemas.wire.redis_keys import ROUTES_CURRENT, ROUTES_GENERATION, USAGE_STREAM
from schemas.wire.routing import Key, Policy, Price, Tenant
from tests.behaviour.publish_fixtures import running_valkey
from tests.behaviour.router.harness import (
    ALMOST_KEY,
    KEY,
    SSE_HEAD,
    chunk,
    fake_engine,
    function,
    http,
    post,
    routing_table,
    tenant,
)
from tests.support import eventually

SIGNING = Ed25519PrivateKey.generate()
OTHER = api_keys.create()
OTHERS = Tenant(
    name="others", models=("*",), keys=(Key(id=OTHER.id, sha256=bytes.fromhex(OTHER.sha256)),)
)
PRICE = Price(input=2.0, output=10.0, cached_input=0.5)


@asynccontextmanager
async def metered(tmp_path, *functions):
    """A router that has its table from a real Valkey, and so a ledger to write for."""
    async with running_valkey(tmp_path / "valkey") as (valkey, redis):
        table = routing_table(*functions, published_at=2e9, tenants=(tenant(), OTHERS))
        await redis.set(ROUTES_CURRENT, seal(table, SIGNING))
        await redis.set(ROUTES_GENERATION, "1")
        settings = Settings(
            redis_url=valkey.url,
            routes_public_key=public_key_hex(SIGNING),
            state_dir=tmp_path / "router",
            port=0,
            admin_port=0,
            probe_interval_s=0,
        )
        async with Router(settings) as router:
            await eventually(lambda: router.state.snapshot is not None)
            yield router, redis


async def records(redis, count: int) -> list[UsageRecord]:
    async def all_there():
        entries = await redis.xrange(USAGE_STREAM)
        return entries if len(entries) >= count else None

    entries = await eventually(all_there)
    return [usage_record(fields[b"r"]) for _, fields in entries]


def body(**more) -> dict:
    return {"model": "sim", "messages": [{"role": "user", "content": "x" * 4000}], **more}


async def ask(router, request: dict, *, key: str = KEY.text, path="/v1/chat/completions"):
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(router.url + path, json=request, headers=headers) as response,
    ):
        return response.status, await response.read()


def events(stream: bytes) -> list[dict]:
    lines = [line[6:] for line in stream.decode().split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def simulated(**more):
    return running_engine(EngineSettings(**more))


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
async def test_streams_are_counted_whether_or_not_the_client_asks(tmp_path, options):
    async with (
        simulated() as engine,
        metered(tmp_path, function(engine.url, engine="simulated", price=PRICE)) as (router, redis),
    ):
        asked = {} if options is None else {"stream_options": options}
        status, stream = await ask(router, body(stream=True, max_tokens=20, **asked))
        assert status == 200
        said = events(stream)
        if options is None:
            assert all("usage" not in event for event in said)
            assert all(event["choices"] for event in said)
        else:
            assert [bool(event.get("usage")) for event in said] == [False] * (len(said) - 1) + [
                True
            ]
        assert engine.stats["generation_tokens"] == len(said) - 1 - bool(options)
        (record,) = await records(redis, 1)
        assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (
            engine.stats["prompt_tokens"],
            0,
            engine.stats["generation_tokens"],
        )
        assert record.cost_nano_usd == record.input_tokens * 2000 + record.output_tokens * 10_000
        assert (record.tenant, record.key, record.function) == ("team", KEY.id, "sim")
        assert (record.replica, record.outcome, record.estimated) == ("sim-r0", "ok", False)
        assert 0 < record.ttft_s <= record.duration_s
        assert "xxx" not in str(record)


async def test_answers_in_one_piece_and_embeddings_are_counted(tmp_path):
    async with (
        simulated() as engine,
        metered(tmp_path, function(engine.url, engine="simulated", price=PRICE)) as (router, redis),
    ):
        for _ in range(2):
            assert (await ask(router, body(max_tokens=9)))[0] == 200
        request = {"model": "sim", "input": "y" * 400}
        assert (await ask(router, request, path="/v1/embeddings"))[0] == 200
        first, again, embedded = await records(redis, 3)
        assert first.output_tokens == again.output_tokens
        assert first.cached_tokens == 0 < again.cached_tokens == engine.stats["cached_tokens"]
        assert embedded.input_tokens == 100
        assert embedded.output_tokens == 0
        # What is refused uses nothing, and leaves no record.
        assert (await ask(router, body(), key=ALMOST_KEY))[0] == 401
        assert (await ask(router, body() | {"model": "none"}))[0] == 404
        assert (await ask(router, body(max_tokens=1)))[0] == 200
        assert [r.output_tokens for r in await records(redis, 4)][3:] == [1]
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{router.admin_url}/metrics") as response,
        ):
            page = await response.text()
        total = sum(r.output_tokens for r in await records(redis, 4))
        assert f'detoserve_router_tokens_total{{function="sim",type="output"}} {total}.0' in page
        assert "detoserve_router_usage_kept 4.0" in page


async def test_a_client_that_leaves_between_head_and_body_pays_for_the_body(tmp_path):
    head_sent = asyncio.Event()

    async def answer(reader, writer):
        await reader.readuntil(b"}]")
        writer.write(SSE_HEAD)
        head_sent.set()
        await reader.read()
        said = b'{"choices":[{"index":0}],"usage":{"prompt_tokens":7,"completion_tokens":2}}'
        writer.write(chunk(b"data: " + said + b"\n\n"))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, metered(tmp_path, function(url)) as (router, redis):
        port = int(router.url.rpartition(":")[2])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(json.dumps(body(stream=True)).encode()))
        await head_sent.wait()
        await asyncio.sleep(0.05)  # for the router to have it, which nothing outside can see
        writer.close()
        (record,) = await records(redis, 1)
        assert (record.input_tokens, record.output_tokens) == (7, 2)


@pytest.mark.parametrize("choices", [1, 3])
async def test_a_client_that_leaves_pays_for_what_was_sent_and_no_more(tmp_path, choices):
    """The engine's own words, up to the last that it had sent when it heard."""
    async with (
        simulated(time=TimeModel(itl_s=0.005)) as engine,
        metered(tmp_path, function(engine.url, engine="simulated")) as (router, redis),
    ):
        port = int(router.url.rpartition(":")[2])
        for turn in range(4):
            request = body(stream=True, max_tokens=5000, ignore_eos=True, n=choices)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(json.dumps(request).encode()))
            for _ in range(3 + 10 * turn):
                await reader.readuntil(b"\n\n")
            writer.close()
            record = (await records(redis, turn + 1))[turn]
            assert record.outcome == "client_gone"
            assert record.input_tokens > 1000
            await eventually(lambda: engine.stats["running"] == 0)
        told = sum(r.output_tokens for r in await records(redis, 4))
        # One step of each choice may have been made that nobody was told of.
        assert told <= engine.stats["generation_tokens"] <= told + 4 * choices


async def test_what_was_under_way_when_the_client_left_counts(tmp_path):
    """An engine that still writes when it hears that nobody listens is heard to the end."""

    def event(tokens: int) -> bytes:
        said = b'{"choices":[{"index":0}],"usage":{"prompt_tokens":7,"completion_tokens":%d}}'
        return chunk(b"data: " + said % tokens + b"\n\n")

    async def answer(reader, writer):
        await reader.readuntil(b"}]")
        writer.write(SSE_HEAD + event(1))
        await reader.read()  # to the end of the router's half
        writer.write(event(2) + event(3))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, metered(tmp_path, function(url)) as (router, redis):
        port = int(router.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(json.dumps(body(stream=True)).encode()))
        await reader.readuntil(b"\n\n")
        writer.close()
        (record,) = await records(redis, 1)
        assert (record.input_tokens, record.output_tokens) == (7, 3)
        assert record.outcome == "client_gone"


async def test_an_engine_that_does_not_listen_is_cut_off(tmp_path):
    gone = asyncio.Event()

    async def forever(reader, writer):
        await reader.readuntil(b"}]")
        writer.write(SSE_HEAD)
        try:
            while True:  # whatever the other half says
                writer.write(chunk(b'data: {"choices":[]}\n\n'))
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            gone.set()
            writer.close()

    server = await asyncio.start_server(forever, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, metered(tmp_path, function(url)) as (router, redis):
        port = int(router.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(json.dumps(body(stream=True)).encode()))
        await reader.readuntil(b"\n\n")
        writer.close()
        await asyncio.wait_for(gone.wait(), 5)
        (record,) = await records(redis, 1)
        assert record.outcome == "client_gone"


async def test_an_engine_that_dies_is_paid_for_what_it_said(tmp_path):
    async def dies(_, writer):
        writer.write(SSE_HEAD)
        for tokens in (1, 2):
            said = b'{"choices":[{"index":0}],"usage":{"prompt_tokens":7,"completion_tokens":%d}}'
            writer.write(chunk(b"data: " + said % tokens + b"\n\n"))
        await writer.drain()
        writer.transport.abort()

    async with (
        fake_engine(dies) as engine,
        metered(tmp_path, function(engine.url, engine="vllm")) as (router, redis),
    ):
        status, stream = await ask(router, body(stream=True))
        assert status == 200
        assert b"stream_interrupted" in stream
        (record,) = await records(redis, 1)
        assert (record.output_tokens, record.outcome) == (2, "interrupted")


async def test_an_attempt_that_was_thrown_away_is_nobodys(tmp_path):
    usage = b'{"usage":{"prompt_tokens":99,"completion_tokens":99}}'
    async with (
        fake_engine(http(usage, "503 Service Unavailable")) as full,
        fake_engine(http(usage.replace(b"99", b"5"))) as good,
        metered(tmp_path, function(full.url, good.url, policy=Policy(name="round-robin"))) as (
            router,
            redis,
        ),
    ):
        for _ in range(4):
            assert (await ask(router, body()))[0] == 200
        assert [r.output_tokens for r in await records(redis, 4)] == [5] * 4
        assert full.received


@pytest.mark.parametrize(
    ("engine_name", "path"),
    [
        ("vllm", "/v1/chat/completions"),
        ("vllm", "/v1/responses"),
        ("vllm", "/v1/messages"),
        ("vllm", "/v1/messages/count_tokens"),
        ("custom", "/v1/chat/completions"),
    ],
)
async def test_salts_are_the_tenants_own_whatever_a_client_sends(tmp_path, engine_name, path):
    async with (
        fake_engine() as engine,
        metered(tmp_path, function(engine.url, engine=engine_name)) as (router, _),
    ):
        wishes = ({}, {"cache_salt": "mine"}, {"cache_salt": 5}, {"cache\u005fsalt": "mine"})
        salts = {}
        for who, key in (("team", KEY.text), ("others", OTHER.text)):
            for wish in wishes:
                assert (await ask(router, body(**wish), key=key, path=path))[0] == 200
                sent = json.loads(engine.received[-1].body)
                assert sent["messages"] == body()["messages"]
                salts[who, str(wish.get("cache_salt"))] = sent.get("cache_salt")
        assert "mine" not in salts.values()
        if engine_name == "vllm" and "count" not in path:
            # Two tenants share none; one keeps its own users apart.
            assert len(set(salts.values())) == 4
            assert salts["team", "None"] == salts["team", "5"]
            assert all(len(salt) == 32 for salt in salts.values())
        else:
            assert salts["team", "None"] is None
            assert salts["team", "mine"] != salts["others", "mine"]


async def test_one_tenants_cache_cannot_be_timed_by_another(tmp_path):
    """The engine's own count of hits, with the same tenant as the positive control."""
    async with (
        simulated() as engine,
        metered(tmp_path, function(engine.url, engine="simulated")) as (router, redis),
    ):
        for key in (KEY.text, OTHER.text, OTHER.text, KEY.text):
            assert (await ask(router, body(max_tokens=1), key=key))[0] == 200
        cold, foreign, warm, own = await records(redis, 4)
        assert (cold.cached_tokens, foreign.cached_tokens) == (0, 0)
        assert warm.cached_tokens == own.cached_tokens > 900
