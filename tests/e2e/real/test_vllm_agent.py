"""An agent beside a real vLLM engine: its names are the router's, its figures vLLM's, its silence a death.

Run with `just test-vllm`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from agent.outbox import Parcel
from agent.publishing import Sink
from agent.publishing.to_routers import ToRouters
from router.core.isolation import cache_salt
from schemas.wire.events import AgentHeartbeat, KvBatch
from schemas.wire.routing import Cluster, Policy
from schemas.wire.token_blocks import chain, chain_root
from tests.behaviour.agent.engine_clients import post
from tests.behaviour.agent.following import HASH_KEY, Kept, running_agent
from tests.behaviour.router.harness import KEY, function, routing_table, running_router
from tests.e2e.real.vllm_engine import BLOCK_TOKENS, BLOCKS, SERVED_NAME, VllmEngine
from tests.e2e.real.vllm_install import install
from tests.support import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.vllm, pytest.mark.timeout(900)]

AGENT_KEY = "agent-key-" + "x" * 30
TEXT = "\n".join(f"Rule {n}: answer plainly about topic {n}, and never guess." for n in range(60))
MESSAGES = [{"role": "user", "content": TEXT}]


@dataclass
class Both:
    """Sends to routers, and keeps a copy."""

    way: ToRouters
    kept: Kept

    async def send(
        self,
        heartbeat: AgentHeartbeat,
        parcel: Parcel,
        snapshots: Sequence[tuple[str, KvBatch]] = (),
    ) -> None:
        await self.way.send(heartbeat, parcel)
        await self.kept.send(heartbeat, parcel, snapshots)


async def names(engine: VllmEngine, salt: str) -> list[int]:
    asked = {"model": SERVED_NAME, "messages": MESSAGES}
    status, answer = await post(f"{engine.url}/tokenize", asked)
    assert status == 200
    return chain(HASH_KEY, chain_root(HASH_KEY, salt=salt), answer["tokens"], BLOCK_TOKENS)


async def test_what_a_real_engine_holds_is_known_and_forgotten(tmp_path: Path) -> None:
    engine = VllmEngine(await asyncio.to_thread(install), tmp_path, "one")
    sha256 = hashlib.sha256(AGENT_KEY.encode()).hexdigest()
    table = routing_table(
        function(engine.url, served_name=SERVED_NAME, policy=Policy(name="expected-latency")),
        clusters=(Cluster(name="here", agent_key_sha256=sha256),),
    )
    keys = tmp_path / "keys"
    keys.write_text(AGENT_KEY)
    kept = Kept()
    try:
        engine.start()
        await asyncio.to_thread(engine.wait_ready)
        async with (
            running_router(table, tmp_path, agent_port=0, agent_keys_file=keys) as running,
            aiohttp.ClientSession() as session,
        ):
            brain = running.router.brain
            slot = brain.slots["sim-r0"]
            way = ToRouters([running.router.agent_url], AGENT_KEY.encode(), "here", session)
            sink: Sink = Both(way, kept)

            def salted(wish: str) -> str:
                """The salt that the router sends in place of what this client wishes for."""
                return cache_salt(running.router.proxy.salt_key, "team", wish)

            async def ask(salt: str) -> int:
                body = {"model": "sim", "messages": MESSAGES, "max_tokens": 2, "cache_salt": salt}
                headers = {"Authorization": f"Bearer {KEY.text}"}
                url = f"{running.url}/v1/chat/completions"
                async with session.post(url, json=body, headers=headers) as response:
                    assert response.status == 200, await response.text()
                    usage = (await response.json())["usage"]
                return int((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)

            async with running_agent(way, sink, cluster="here"):
                first = await eventually(lambda: brain.reports.last(slot), timeout_s=30)
                assert first.block_tokens == BLOCK_TOKENS
                assert first.capacity_blocks == BLOCKS
                assert await ask("tenant-a") == 0
                mine = set(await names(engine, salted("tenant-a")))
                await eventually(lambda: mine <= kept.held("sim-r0"), timeout_s=30)
                assert mine
                assert not set(await names(engine, salted("tenant-b"))) & kept.held("sim-r0")
                assert await ask("tenant-a") == BLOCK_TOKENS * len(mine)  # what was named was there
                assert brain.states.index.held(slot) > 5
                await eventually(
                    lambda: (last := brain.reports.last(slot)) and last.stored_tokens > 0,
                    timeout_s=30,
                )

                engine.kill()
                await eventually(lambda: brain.states.index.held(slot) == 0, timeout_s=30)
                assert kept.held("sim-r0") == set()
                engine.start()
                await asyncio.to_thread(engine.wait_ready)
                await eventually(
                    lambda: (last := brain.reports.last(slot)) and last.epoch != first.epoch,
                    timeout_s=60,
                )
                assert brain.states.index.held(slot) == 0
                assert await ask("tenant-a") == 0
                await eventually(lambda: mine <= kept.held("sim-r0"), timeout_s=30)
    finally:
        engine.kill()
