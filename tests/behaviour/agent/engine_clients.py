"""An engine of this process and the clients that talk to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, BinaryIO

import aiohttp
from openai import AsyncOpenAI

from agent.simulated.server import SimulatedEngine, running_engine
from agent.simulated.settings import EngineSettings
from agent.simulated.timing import TimeModel

INSTANT = TimeModel(speed=0)


@asynccontextmanager
async def engine_and_client(
    **settings: Any,
) -> AsyncIterator[tuple[SimulatedEngine, AsyncOpenAI]]:
    """`settings` of EngineSettings; instant unless `time` is given. The client never retries."""
    async with (
        running_engine(EngineSettings(**{"time": INSTANT} | settings)) as engine,
        AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield engine, client


async def post(
    url: str, body: Any = None, *, raw: bytes | BinaryIO | None = None
) -> tuple[int, Any]:
    """(status, JSON or text) of a POST on a connection of its own."""
    data: dict[str, Any] = {"data": raw} if raw is not None else {"json": body}
    async with aiohttp.ClientSession() as session, session.post(url, **data) as response:
        is_json = response.content_type == "application/json"
        return response.status, await response.json() if is_json else await response.text()


async def get(url: str) -> tuple[int, Any]:
    """The same for a GET."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        is_json = response.content_type == "application/json"
        return response.status, await response.json() if is_json else await response.text()
