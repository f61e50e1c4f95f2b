"""Clients that stream without pause, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp


@dataclass(frozen=True, slots=True)
class Asked:
    """One request; `replica` is empty where the answer names none, `wrong` where nothing is."""

    model: str
    replica: str
    began: float
    ended: float
    text: str = ""
    wrong: str = ""


@dataclass
class Traffic:
    """Clients of one router. Times are of `time.monotonic`."""

    client: aiohttp.ClientSession
    asked: list[Asked] = field(default_factory=list)

    async def say(self, model: str, text: str, *, max_tokens: int = 16) -> Asked:
        """One streamed answer; a failure of any kind is noted, not raised."""
        began, replica, said = time.monotonic(), "", ""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        try:
            async with self.client.post("/v1/chat/completions", json=body) as answer:
                replica = answer.headers.get("x-detoserve-route", "").partition(";")[0]
                lines = (await answer.text()).split("\n\n")
            lines = [line for line in lines if line]
            wrong = "" if answer.status == 200 else f"{answer.status} {lines}"
            if not wrong and lines[-1] != "data: [DONE]":
                wrong = f"cut off after {lines[-1][:200]}"
            said = _said(lines)
        except (aiohttp.ClientError, TimeoutError, IndexError) as error:
            wrong = f"{type(error).__name__}: {error}"
        done = Asked(model, replica, began, time.monotonic(), said, wrong)
        self.asked.append(done)
        return done

    @asynccontextmanager
    async def steady(self, model: str, *, clients: int = 3) -> AsyncIterator[None]:
        """So many clients ask all the time, until it is left."""
        going = True

        async def ask(number: int) -> None:
            turn = 0
            while going:
                turn += 1
                await self.say(model, f"client {number} turn {turn}")
                await asyncio.sleep(0.05)

        tasks = [asyncio.create_task(ask(number)) for number in range(clients)]
        try:
            yield
        finally:
            going = False
            await asyncio.gather(*tasks)

    def failures(self, of: Callable[[Asked], bool] = lambda _: True) -> list[Asked]:
        return [asked for asked in self.asked if asked.wrong and of(asked)]


def _said(events: list[str]) -> str:
    chunks = [json.loads(e.removeprefix("data: ")) for e in events if e.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk.get("choices", ())]
    return "".join(delta.get("content") or "" for delta in deltas)


@asynccontextmanager
async def traffic(url: str, key: str) -> AsyncIterator[Traffic]:
    timeout = aiohttp.ClientTimeout(60)
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(url, timeout=timeout, headers=headers) as client:
        yield Traffic(client)
