"""Clients that leave, queues that fill, engines that break: what becomes of the other requests."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import openai
import pytest

from agent.simulated.scheduler import Scheduler
from agent.simulated.timing import TimeModel
from tests.behaviour.agent.engine_clients import engine_and_client, get, post
from tests.support import eventually

SLOW = TimeModel(itl_s=0.02)
LONG: dict[str, Any] = {"prompt": "x" * 400, "max_tokens": 2000, "ignore_eos": True}


def holds(stats: dict[str, Any], **expected: int) -> bool:
    return all(stats[name] == value for name, value in expected.items())


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_place_at_once(stream: bool) -> None:
    async with engine_and_client(time=SLOW) as (engine, _):
        async with aiohttp.ClientSession() as session:
            request = session.post(f"{engine.url}/v1/completions", json=LONG | {"stream": stream})
            leaving = asyncio.create_task(request.__aenter__())  # type: ignore[arg-type]
            await eventually(lambda: engine.stats["running"] == 1)
            if stream:
                response = await leaving
                assert await response.content.readline()  # in the middle of the stream
                response.close()
            else:
                leaving.cancel()
        await eventually(lambda: holds(engine.stats, running=0, aborted=1), timeout_s=1.0)
        assert holds(engine.stats, blocks_pinned=0, in_flight=0, succeeded=0, failed=0)
        assert engine.stats["blocks_cached"] > 0  # what was computed stays in the cache
        _, page = await get(f"{engine.url}/metrics")
        assert 'finished_reason="abort"} 1.0' in page


async def test_a_client_that_leaves_the_queue_leaves_it() -> None:
    async with engine_and_client(time=SLOW, max_num_seqs=1) as (engine, client):
        stream = await client.completions.create(
            model="simulated",
            prompt="x",
            max_tokens=2000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        waiting = asyncio.create_task(post(f"{engine.url}/v1/completions", LONG))
        await eventually(lambda: engine.stats["waiting"] == 1)
        waiting.cancel()
        await eventually(lambda: holds(engine.stats, waiting=0, running=1, aborted=1))
        await stream.close()
        await eventually(lambda: holds(engine.stats, running=0, aborted=2))


async def test_beyond_the_bound_requests_are_refused_as_vllm_refuses_them() -> None:
    bounds = {"max_num_queued_reqs": 2, "max_num_seqs": 2}
    async with engine_and_client(time=SLOW, **bounds) as (engine, client):
        body = {"prompt": "x", "max_tokens": 10}
        answers = await asyncio.gather(
            *(post(f"{engine.url}/v1/completions", body) for _ in range(7))
        )
        assert sorted(status for status, _ in answers) == [200, 200, 503, 503, 503, 503, 503]
        refused = next(answer for status, answer in answers if status == 503)
        assert refused["error"]["type"] == "Service Unavailable"
        assert "engine is currently busy" in refused["error"]["message"]
        assert holds(engine.stats, rejected=5, failed=5, succeeded=2, peak_running=2)
        with pytest.raises(openai.InternalServerError, match="currently busy"):
            await client.completions.create(model="simulated", prompt="x", n=3)
        assert (await client.completions.create(model="simulated", prompt="x", n=2)).choices


async def test_requests_beyond_max_num_seqs_wait_their_turn() -> None:
    async with engine_and_client(time=TimeModel(speed=10), max_num_seqs=2) as (engine, _):
        body = {"prompt": "x", "max_tokens": 5}
        answers = await asyncio.gather(
            *(post(f"{engine.url}/v1/completions", body) for _ in range(8))
        )
        assert {status for status, _ in answers} == {200}
        assert engine.stats["peak_running"] == 2
        assert engine.stats["peak_waiting"] >= 6


async def test_time_passes_as_the_model_says() -> None:
    time = TimeModel(itl_s=0.01, prefill_tokens_per_s=1000)
    async with engine_and_client(time=time) as (engine, _):
        clock = asyncio.get_running_loop().time
        begin_s = clock()
        body = {"prompt": "x" * 2400, "max_tokens": 11, "ignore_eos": True}  # 600 tokens
        await post(f"{engine.url}/v1/completions", body)
        cold_s = clock() - begin_s
        assert cold_s >= 0.6 + 10 * 0.01 - 0.01
        begin_s = clock()
        await post(f"{engine.url}/v1/completions", body)
        assert clock() - begin_s < cold_s - 0.3  # 592 of the 600 tokens came from the cache


async def test_many_at_once_all_get_their_own_answer() -> None:
    async with engine_and_client(num_blocks=2048, max_num_seqs=8) as (engine, client):

        async def one(number: int) -> bool:
            prompt = f"request {number} " * 20
            stream = await client.completions.create(
                model="simulated", prompt=prompt, max_tokens=30, stream=True
            )
            streamed = "".join([chunk.choices[0].text async for chunk in stream])
            whole = await client.completions.create(model="simulated", prompt=prompt, max_tokens=30)
            return streamed == whole.choices[0].text

        assert all(await asyncio.gather(*(one(number) for number in range(60))))
        assert holds(engine.stats, succeeded=120, running=0, waiting=0, blocks_pinned=0)


async def test_when_the_engine_loop_dies_nobody_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine_and_client(time=SLOW) as (engine, client):
        stream = await client.completions.create(
            model="simulated", prompt="x", max_tokens=500, stream=True
        )
        await anext(aiter(stream))

        def broken(*_: object) -> None:
            raise RuntimeError("simulated bug")

        monkeypatch.setattr(Scheduler, "schedule", broken)
        with pytest.raises(openai.APIError, match="EngineCore encountered an issue"):
            async for _ in stream:
                pass
        assert (await get(f"{engine.url}/health"))[0] == 503
        status, answer = await post(f"{engine.url}/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["type"]) == (500, "InternalServerError")
        assert holds(engine.stats, failed=2, succeeded=0, running=0)
