"""Router processes that know what the others have sent: whole routers, real engines."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import msgspec
import pytest

from router.settings import Settings
from router.workers import Workers
from tests.behaviour.router.harness import (
    KEY,
    FakeEngine,
    Policy,
    Received,
    fake_engine,
    function,
    http,
    routing_table,
    running_router,
)
from tests.support import eventually

HEADERS = {"Authorization": f"Bearer {KEY.text}"}
SHARED = "You are a helpful assistant. " * 400


def chat(text: str) -> dict[str, object]:
    return {"model": "sim", "messages": [{"role": "user", "content": text}]}


async def ask(session: aiohttp.ClientSession, url: str, text: str) -> str:
    """Which replica answered."""
    async with session.post(f"{url}/v1/chat/completions", json=chat(text), headers=HEADERS) as got:
        await got.read()
        assert got.status == 200
        return got.headers["x-detoserve-route"].partition(";")[0]


def slow(gate: asyncio.Event) -> FakeEngine:
    async def answer(received: Received, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await http()(received, writer)

    return answer  # type: ignore[return-value]


@pytest.mark.parametrize("policy", ["expected-latency", "linear", "least-load"])
async def test_two_routers_keep_out_of_each_others_way(tmp_path: Path, policy: str) -> None:
    """Neither sends to the engine that the other has just filled; nothing of it remains."""
    gate = asyncio.Event()
    peers = tmp_path / "p"
    peers.mkdir()
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(fake_engine(slow(gate))) for _ in range(8)]
        table = routing_table(function(*(e.url for e in engines), policy=Policy(name=policy)))
        routers = []
        for name in ("a", "b"):
            folder = tmp_path / name
            folder.mkdir()
            one = running_router(table, folder, peers_dir=peers, id=name)
            routers.append(await stack.enter_async_context(one))
        a, b = (one.router.brain for one in routers)
        await eventually(lambda: len(a.sharing.peers) == len(b.sharing.peers) == 1)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        asked = []
        for turn in range(8):
            one = routers[turn % 2]
            asked.append(asyncio.create_task(ask(session, one.url, f"{turn} {'x' * 9000}")))
            await eventually(lambda n=turn + 1: sum(a.states.load.requests) == n)
            await eventually(lambda n=turn + 1: sum(b.states.load.requests) == n)
        await eventually(lambda: sum(len(e.received) for e in engines) == 8)
        # Each by itself would have met the other's somewhere: 69 times of 70.
        assert [len(e.received) for e in engines] == [1] * 8
        gate.set()
        await asyncio.gather(*asked)
        await eventually(lambda: a.states.load.requests == b.states.load.requests == [0] * 8)
        assert max(a.states.load.floor_s + b.states.load.floor_s) == 0


async def test_a_conversation_is_known_at_the_other_router(tmp_path: Path) -> None:
    peers = tmp_path / "p"
    peers.mkdir()
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(fake_engine()) for _ in range(6)]
        table = routing_table(function(*(e.url for e in engines), policy=Policy()))
        routers = []
        for name in ("a", "b"):
            folder = tmp_path / name
            folder.mkdir()
            one = running_router(table, folder, peers_dir=peers, id=name)
            routers.append(await stack.enter_async_context(one))
        a, b = (one.router.brain for one in routers)
        await eventually(lambda: len(a.sharing.peers) == len(b.sharing.peers) == 1)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        first = await ask(session, routers[0].url, SHARED)
        await eventually(lambda: len(b.states.index) == len(a.states.index) > 0)
        for _ in range(5):
            assert await ask(session, routers[1].url, SHARED) == first


async def test_workers_of_one_machine_share_without_redis(tmp_path: Path) -> None:
    async with fake_engine() as engine:
        routes = tmp_path / "routes.msgpack"
        table = routing_table(function(engine.url, policy=Policy()))
        routes.write_bytes(msgspec.msgpack.encode(table))
        workers = Workers(Settings(routes=routes, port=0, admin_port=0, workers=2))
        try:
            await workers.start()
            async with aiohttp.ClientSession() as session:

                async def peers() -> bool:
                    async with session.get(f"{workers.admin_url}/metrics") as got:
                        text = await got.text()
                    return re.search(r"^detoserve_router_peers 1", text, re.MULTILINE) is not None

                await eventually(peers)
            folder = workers.settings.peers_dir
            assert folder is not None
            assert folder.stat().st_mode & 0o077 == 0
        finally:
            await workers.close()
        assert not folder.exists()


class LearningEngine:
    """Says what it had of each prompt: as much as `cached` says."""

    def __init__(self) -> None:
        self.cached = 0

    async def __call__(self, received: Received, writer: asyncio.StreamWriter) -> None:
        usage = {
            "prompt_tokens": len(received.body) // 4,
            "completion_tokens": 1,
            "total_tokens": len(received.body) // 4 + 1,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        await http(msgspec.json.encode({"id": "c", "choices": [], "usage": usage}))(
            received, writer
        )


async def test_what_engines_had_of_prompts_is_learned(tmp_path: Path) -> None:
    engine = LearningEngine()
    async with AsyncExitStack() as stack:
        real = await stack.enter_async_context(fake_engine(engine))
        table = routing_table(function(real.url, policy=Policy()))
        running = await stack.enter_async_context(running_router(table, tmp_path))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        brain = running.router.brain
        other = "Something else altogether. " * 400
        for text, cached in ((other, 0), (SHARED, 0), (SHARED, 2800)):
            engine.cached = cached
            await ask(session, running.url, text)
        assert brain.states.trust.share_come_true(0) == 1
        held = brain.states.index.held(0)
        engine.cached = 0
        for _ in range(3):
            assert brain.states.index.held(0) == held
            await ask(session, running.url, SHARED)
        # Three times in a row it had nothing at all: it is another, and knows this prompt alone.
        assert 0 < brain.states.index.held(0) < held
