"""Faults on demand, as clients meet them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import openai
import pytest

from agent.simulated.faults import FaultPlan
from agent.simulated.timing import TimeModel
from tests.behaviour.agent.engine_clients import engine_and_client, get, post
from tests.support import eventually

BODY: dict[str, Any] = {"prompt": "x", "max_tokens": 8, "ignore_eos": True}


async def test_the_next_requests_fail_and_then_no_more() -> None:
    async with engine_and_client() as (engine, client):
        status, plan = await post(
            f"{engine.url}/faults", {"fail_next": 2, "status": 429, "retry_after_s": 7}
        )
        assert (status, plan["fail_next"], plan["status"]) == (200, 2, 429)
        with pytest.raises(openai.RateLimitError, match="simulated fault") as failed:
            await client.completions.create(model="simulated", prompt="x")
        assert failed.value.response.headers["Retry-After"] == "7"
        assert (await get(f"{engine.url}/faults"))[1]["fail_next"] == 1
        with pytest.raises(openai.RateLimitError):
            await client.embeddings.create(model="simulated", input="x")
        assert (await client.completions.create(model="simulated", prompt="x")).choices
        assert engine.stats["faults"]["fail"] == 2
        assert engine.stats["failed"] == 2
        assert engine.stats["generation_tokens"] > 0


async def test_other_endpoints_are_not_struck() -> None:
    async with engine_and_client(faults=FaultPlan(fail_next=-1)) as (engine, client):
        assert (await client.models.list()).data
        assert (await get(f"{engine.url}/health"))[0] == 200
        assert (await post(f"{engine.url}/v1/completions", BODY))[0] == 503


async def test_hanging_accepts_and_never_answers() -> None:
    async with engine_and_client(faults=FaultPlan(hang_next=1)) as (engine, _):
        hanging = asyncio.create_task(post(f"{engine.url}/v1/completions", BODY))
        await eventually(lambda: engine.stats["faults"]["hang"] == 1)
        assert (await post(f"{engine.url}/v1/completions", BODY))[0] == 200
        assert not hanging.done()
        assert engine.stats["in_flight"] == 1
        hanging.cancel()
        await eventually(lambda: engine.stats["in_flight"] == 0)
        assert engine.stats["aborted"] == 1


async def streamed(url: str, body: dict[str, Any]) -> tuple[list[bytes], BaseException | None]:
    """The events of a stream, and how it broke, if it did."""
    events: list[bytes] = []
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        assert response.status == 200
        try:
            async for line in response.content:
                if line.strip():
                    events.append(line)  # noqa: PERF401 - those read before it breaks count
        except (aiohttp.ClientError, ConnectionError) as error:
            return events, error
    return events, None


@pytest.mark.parametrize("model", [TimeModel(speed=0), TimeModel(speed=10)])
async def test_dying_mid_stream_resets_the_connection(model: TimeModel) -> None:
    faults = FaultPlan(die_mid_stream_next=1, after_chunks=4)
    async with engine_and_client(time=model, faults=faults) as (engine, _):
        url = f"{engine.url}/v1/completions"
        events, error = await streamed(url, BODY | {"stream": True})
        assert isinstance(error, (aiohttp.ClientOSError, aiohttp.ClientPayloadError))
        assert len(events) == 4
        assert b"[DONE]" not in events[-1]
        assert engine.stats["running"] == 0
        assert (engine.stats["failed"], engine.stats["aborted"]) == (1, 0)
        events, error = await streamed(url, BODY | {"stream": True})
        assert error is None
        assert events[-1] == b"data: [DONE]\n"


async def test_dying_strikes_even_an_answer_shorter_than_the_cut() -> None:
    faults = FaultPlan(die_mid_stream_next=1, after_chunks=100)
    async with engine_and_client(faults=faults) as (engine, _):
        events, error = await streamed(f"{engine.url}/v1/completions", BODY | {"stream": True})
        assert error is not None
        assert len(events) == 8


async def test_dying_in_an_answer_that_is_not_streamed() -> None:
    async with engine_and_client(faults=FaultPlan(die_mid_stream_next=2)) as (engine, client):
        for create in (
            client.completions.create(model="simulated", prompt="x"),
            client.embeddings.create(model="simulated", input="x"),
        ):
            with pytest.raises(openai.APIConnectionError):
                await create
        assert engine.stats["failed"] == 2


async def test_stalling_mid_stream_falls_silent_but_stays() -> None:
    faults = FaultPlan(stall_mid_stream_next=1, after_chunks=2)
    async with engine_and_client(faults=faults) as (engine, _):
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{engine.url}/v1/completions", json=BODY | {"stream": True}) as response,
        ):
            lines = [await response.content.readline() for _ in range(4)]
            assert [bool(line.strip()) for line in lines] == [True, False, True, False]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(response.content.readline(), 0.2)
        await eventually(lambda: engine.stats["in_flight"] == 0)


async def test_a_slow_engine_and_a_reset() -> None:
    model = TimeModel(itl_s=0.005)
    async with engine_and_client(time=model) as (engine, _):

        async def seconds() -> float:
            begin_s = time.perf_counter()
            await post(f"{engine.url}/v1/completions", BODY)
            return time.perf_counter() - begin_s

        await post(f"{engine.url}/faults", {"slow_factor": 20})
        assert await seconds() > 7 * 0.005 * 20
        async with (
            aiohttp.ClientSession() as session,
            session.delete(f"{engine.url}/faults") as response,
        ):
            assert (await response.json())["slow_factor"] == 1.0
        assert await seconds() < 7 * 0.005 * 20


async def test_health_can_lie() -> None:
    async with engine_and_client() as (engine, _):
        await post(f"{engine.url}/faults", {"health_status": 503})
        assert (await get(f"{engine.url}/health"))[0] == 503
        assert (await post(f"{engine.url}/v1/completions", BODY))[0] == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"fail_nxt": 1}, "fail_nxt"),
        ({"status": 200}, "status"),
        ([], "object"),
        ({"exit": 1}, "process of its own"),
    ],
)
async def test_wrong_faults_are_refused_and_change_nothing(body: Any, said: str) -> None:
    async with engine_and_client() as (engine, _):
        status, answer = await post(f"{engine.url}/faults", body)
        assert status == 400
        assert said in answer["error"]["message"]
        assert (await get(f"{engine.url}/faults"))[1]["exit"] is None
