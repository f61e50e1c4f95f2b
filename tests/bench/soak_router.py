"""A router under everything at once, for as long as one likes: does it keep its memory and its count?

    python tests/bench/soak_router.py --seconds 1800 --pause-s 0.3

Unique prompts, streams and whole answers, clients that leave at any moment, engines that refuse, hang
and die mid-stream, and a new routing table every few seconds. Prints the router's memory and open
files every tenth of the time; exits 1 when counters are not zero at the end. Not a measure of speed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import msgspec

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.behaviour.router.harness import (
    KEY,
    function,
    program,
    routing_table,
    simulated,
)


def memory_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


class Soak:
    """Clients, trouble-makers and a table writer around one router."""

    def __init__(
        self, url: str, engines: list[str], routes: Path, *, until: float, pause_s: float
    ) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._pause_s = pause_s
        self._engines = engines
        self._routes = routes
        self._until = until
        self._chance = random.Random(1)
        self.counts: dict[str, int] = {}

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    async def client(self, number: int) -> None:
        headers = {"Authorization": f"Bearer {KEY.text}"}
        chance = random.Random(number)
        session = aiohttp.ClientSession(headers=headers)
        while time.monotonic() < self._until:
            await asyncio.sleep(chance.random() * 2 * self._pause_s)
            body = {
                "model": "sim" if chance.random() < 0.98 else "unknown",
                "messages": [{"role": "user", "content": chance.randbytes(400).hex()}],
                "max_tokens": chance.randrange(1, 60),
                "stream": chance.random() < 0.7,
            }
            leave_s = chance.random() * 0.3 if chance.random() < 0.3 else 30.0
            try:
                async with asyncio.timeout(leave_s), session.post(self._url, json=body) as answer:
                    text = await answer.read()
                    broken = answer.status == 200 and b'data: {"error"' in text
                    self._count("broken off" if broken else str(answer.status))
            except TimeoutError:
                self._count("left")
            except aiohttp.ClientError as error:
                self._count(type(error).__name__)
        await session.close()

    async def trouble(self) -> None:
        faults = [
            {"fail_next": 3, "status": 503},
            {"fail_next": 3, "status": 500},
            {"hang_next": 1},
            {"die_mid_stream_next": 2},
        ]
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < self._until:
                await asyncio.sleep(0.5)
                engine = self._chance.choice(self._engines)
                async with session.post(f"{engine}/faults", json=self._chance.choice(faults)):
                    pass

    async def tables(self) -> None:
        generation = 1
        while time.monotonic() < self._until:
            await asyncio.sleep(2)
            generation += 1
            some = self._chance.sample(self._engines, len(self._engines) - 1)
            table = routing_table(function(*some), generation=generation)
            fresh = self._routes.with_suffix(".new")
            fresh.write_bytes(msgspec.msgpack.encode(table))
            fresh.replace(self._routes)


async def soak(seconds: float, clients: int, pause_s: float) -> bool:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = [
            (await stack.enter_async_context(simulated("--speed", "20"))).url for _ in range(4)
        ]
        routes = folder / "routes"
        routes.write_bytes(msgspec.msgpack.encode(routing_table(function(*engines))))
        router = await stack.enter_async_context(
            program(
                "router",
                "--port",
                "0",
                "--admin-port",
                "0",
                "--routes",
                str(routes),
                "--poll-interval-s",
                "0.2",
                "--access-log",
                str(folder / "access.log"),
            )
        )
        until = time.monotonic() + seconds
        work = Soak(router.url, engines, routes, until=until, pause_s=pause_s)
        running = asyncio.gather(
            *(work.client(number) for number in range(clients)), work.trouble(), work.tables()
        )
        pid = router.process.pid
        for _ in range(10):
            await asyncio.sleep(seconds / 10)
            files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            print(f"{memory_mib(pid):7.1f} MiB  {files:4d} files  {work.counts}", flush=True)
        await running
        await asyncio.sleep(2)
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{router.ready['admin_url']}/status") as answer,
        ):
            status = json.loads(await answer.read())
        left = {name: r["in_flight"] for name, r in status["replicas"].items() if r["in_flight"]}
        print(f"at the end: {status['in_flight']} in flight, {left}")
        return status["in_flight"] == 0 and not left and "departed" not in status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--pause-s", type=float, default=0.0, help="mean, between requests")
    chosen = parser.parse_args()
    sys.exit(0 if asyncio.run(soak(chosen.seconds, chosen.clients, chosen.pause_s)) else 1)
