"""Conversations return to the replica that holds them, and the counts behind that end at zero."""

from __future__ import annotations

import asyncio

from openai import AsyncOpenAI

from agent.simulated.server import running_engine
from agent.simulated.settings import EngineSettings
from schemas.wire.routing import Policy
from tests.behaviour.router.harness import (
    KEY,
    fake_engine,
    function,
    post,
    raw,
    routing_table,
    running_router,
)

SYSTEM = "You are a helpful assistant who answers at length. " * 40


async def test_a_conversation_returns_to_the_replica_that_holds_it(tmp_path) -> None:
    engines = [running_engine(EngineSettings()) for _ in range(3)]
    async with engines[0] as a, engines[1] as b, engines[2] as c:
        served = function(a.url, b.url, c.url, policy=Policy(name="expected-latency"))
        async with running_router(routing_table(served), tmp_path) as running:
            client = AsyncOpenAI(base_url=f"{running.url}/v1", api_key=KEY.text, max_retries=0)

            async def turn(messages: list[dict[str, str]]) -> tuple[str, int]:
                raw = await client.chat.completions.with_raw_response.create(
                    model="sim", messages=messages, max_tokens=8
                )
                answer = raw.parse()
                messages.append(answer.choices[0].message.model_dump(include={"role", "content"}))
                cached = answer.usage.prompt_tokens_details.cached_tokens
                return raw.headers["x-detoserve-route"].split(";")[0], cached

            async def conversation(name: str) -> set[str]:
                messages = [{"role": "system", "content": f"{name}: {SYSTEM}"}]
                where = set()
                for number in range(4):
                    messages.append({"role": "user", "content": f"Question {number}?"})
                    replica, cached = await turn(messages)
                    where.add(replica)
                    assert (cached > 0) == (number > 0)
                return where

            spread = await asyncio.gather(*(conversation(f"user {i}") for i in range(9)))
            assert all(len(where) == 1 for where in spread)
            assert len(set.union(*spread)) == 3
            await client.close()
            running.assert_idle()
            load = running.router.brain.states.load
            assert set(load.requests) == {0}
            assert max(load.ready_at) == float("-inf")


async def test_no_body_is_too_odd_to_be_passed_on(tmp_path) -> None:
    served = Policy(name="expected-latency")
    async with fake_engine() as engine:
        table = routing_table(function(engine.url, engine.url + "/b", policy=served))
        async with running_router(table, tmp_path) as running:
            for depth in (1, 300, 480, 900, 960, 990):
                nested = (
                    '{"type":"tool_result","content":' * depth + '""' + "}" * depth,
                    "[" * depth + "]" * depth,
                    '{"type":[]}',
                )
                for content in nested:
                    body = f'{{"model":"sim","messages":[{{"role":"user","content":[{content}]}}]}}'
                    answer = await raw(running.port, post(body.encode()))
                    assert answer.split()[1] in (b"200", b"400"), answer[:200]
            running.assert_idle()
