"""Usage to the token: clients leave, engines and routers are killed, and the ledger in Git has it all.

Every process is a real one. What each request used is known three ways: what its client read, what
its engine says it handed out, and what the router's record says. DETOSERVE_LEDGER_REQUESTS=10000 for
the long run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from reconciler.core.ledger import Row, Sums, day_in, parse_day
from reconciler.loop.ledger_task import LedgerTask
from reconciler.publish.ledger_file import open_document
from reconciler.publish.status_branch import StatusBranch
from reconciler.publish.usage_source import Batch, UsageSource
from schemas.wire.envelope import public_key_hex, seal
from schemas.wire.events import UsageRecord
from schemas.wire.redis_keys import ROUTES_CHANNEL, ROUTES_CURRENT, ROUTES_GENERATION
from schemas.wire.routing import Arm, Cluster, Function, Policy, Price, Replica, RoutingTable
from tests.behaviour.loop_fixtures import FixedLeadership
from tests.behaviour.publish_fixtures import git, running_valkey
from tests.behaviour.router.harness import Program, post, program, simulated, tenant
from tests.support import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

REQUESTS = int(os.environ.get("DETOSERVE_LEDGER_REQUESTS", "400"))
AT_ONCE = 24
KILL_EVERY = max(50, REQUESTS // 40)
"""Requests between two deaths."""
SETTLED_S = 2.0
"""After a client is done, an engine and a router are done with its request too."""
KEY = Ed25519PrivateKey.generate()
PRICE = Price(input=0.5, output=1.5, cached_input=0.05)
REF = "detoserve/status"
_CONTENT = re.compile(rb'"content":"([^"]*)"')
_USAGE = re.compile(rb'"completion_tokens":(\d+)')


@dataclass
class Engine:
    program: Program
    name: str
    stack: AsyncExitStack


@dataclass
class Asked:
    """One request as its client saw it."""

    id: str
    router: int
    """Life of the router that it was sent to."""
    tokens: int = 0
    """Of the answer, as far as it was read."""
    left: bool = False
    whole: bool = False
    status: int = 0


class Tap(UsageSource):
    """Keeps what the ledger reads."""

    def __init__(self, redis) -> None:
        super().__init__(redis)
        self.records: dict[tuple[str, int], UsageRecord] = {}

    async def read(self, after: str, *, limit: int = 5000) -> Batch:
        batch = await super().read(after, limit=limit)
        for record in batch.records:
            self.records[record.journal, record.seq] = record
        return batch


@dataclass
class Fleet:
    """Engines and routers that come and go behind one table."""

    redis: object
    url: str
    folder: Path
    chance: random.Random
    engines: list[Engine] = field(default_factory=list)
    routers: list[tuple[int, Program]] = field(default_factory=list)
    stacks: list[AsyncExitStack] = field(default_factory=list)
    lives: int = 0
    killed_at: dict[int, float] = field(default_factory=dict)
    """Life of a router -> when it was killed."""
    handed: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    done_at: dict[str, float] = field(default_factory=dict)
    generation: int = 0

    async def publish(self) -> None:
        self.generation += 1
        replicas = tuple(Replica(id=e.name, url=e.program.url) for e in self.engines)
        function = Function(
            name="sim",
            served_name="simulated",
            engine="simulated",
            price=PRICE,
            policy=Policy(name="least-load", retry_attempts=3, retry_budget_percent=100.0),
            arms=(Arm(deployment="sim", cluster="here", replicas=replicas),),
        )
        table = RoutingTable(
            generation=self.generation,
            revision="0123abcd" * 5,
            published_at=2e9,
            functions=(function,),
            tenants=(tenant(),),
            clusters=(Cluster(name="here"),),
        )
        await self.redis.set(ROUTES_CURRENT, seal(table, KEY))
        await self.redis.set(ROUTES_GENERATION, str(self.generation))
        await self.redis.publish(ROUTES_CHANNEL, str(self.generation))

    async def _start(self, how) -> tuple[AsyncExitStack, Program]:
        """A process; a busy machine gets more than one chance to start it in time."""
        for chances in (2, 1, 0):
            stack = AsyncExitStack()
            try:
                started = await stack.enter_async_context(how())
            except TimeoutError:
                if not chances:
                    raise
            else:
                self.stacks.append(stack)
                return stack, started
        raise AssertionError("unreachable")

    async def start_engine(self) -> Engine:
        stack, started = await self._start(lambda: simulated("--itl-s", "0.004"))
        engine = Engine(started, f"e{len(self.stacks)}", stack)
        self.engines.append(engine)
        return engine

    async def start_router(self, place: int) -> None:
        flags = (
            "--port", "0", "--admin-port", "0", "--redis-url", self.url,
            "--routes-public-key", public_key_hex(KEY),
            "--state-dir", str(self.folder / f"router{place}"), "--probe-interval-s", "0",
        )  # fmt: skip
        _, started = await self._start(lambda: program("router", *flags))
        self.lives += 1
        if place < len(self.routers):
            self.routers[place] = (self.lives, started)
        else:
            self.routers.append((self.lives, started))

    async def told(self, engine: Engine) -> None:
        """What the engine has handed out to requests that were over a while ago."""
        over = {i for i, at in self.done_at.items() if at < time.monotonic() - SETTLED_S}
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{engine.program.url}/handed_out") as response,
        ):
            handed = await response.json()
        self.handed[engine.name] = {i: used for i, used in handed.items() if i in over}

    async def kill_an_engine(self) -> None:
        engine = self.engines.pop(self.chance.randrange(len(self.engines)))
        await self.told(engine)
        engine.program.process.kill()
        await self.start_engine()
        await self.publish()

    async def kill_a_router(self) -> None:
        place = self.chance.randrange(len(self.routers))
        life, router = self.routers[place]
        self.killed_at[life] = time.monotonic()
        router.process.kill()
        await self.start_router(place)


async def ask(fleet: Fleet, number: int) -> Asked:
    """One request by a client of some habit; whatever happens to it is noted."""
    chance = fleet.chance
    life, router = chance.choice(fleet.routers)
    asked = Asked(f"r{number}", life)
    stream = chance.random() < 0.7
    leaves_after = chance.choice([None, None, 0, 1, 3, 8]) if stream else None
    request = {
        "model": "sim",
        "messages": [{"role": "user", "content": "word " * chance.randrange(1, 200)}],
        "max_tokens": chance.randrange(1, 40),
        "n": chance.choice([1, 1, 1, 2]),
        "ignore_eos": True,
        "stream": stream,
    }
    if stream and chance.random() < 0.3:
        request["stream_options"] = {"include_usage": True}
    data = post(json.dumps(request).encode(), headers=f"X-Request-Id: {asked.id}\r\n")
    got = bytearray()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.split(":")[2]))
    except OSError:
        return asked
    try:
        async with asyncio.timeout(60):
            writer.write(data)
            if not stream and chance.random() < 0.15:
                await asyncio.sleep(chance.random() * 0.05)
                asked.left = True
                return asked
            while leaves_after is None or got.count(b"\n\n") < leaves_after:
                part = await reader.read(4096)
                if not part:
                    break
                got += part
            else:
                asked.left = True
    except OSError:
        pass
    finally:
        writer.transport.abort() if chance.random() < 0.5 else writer.close()
        read = bytes(got)
        asked.status = int(read[9:12] or b"0")
        if stream:
            asked.tokens = sum(len(text) for text in _CONTENT.findall(read)) // 4
            asked.whole = b"[DONE]" in read
        elif found := _USAGE.search(read):
            asked.tokens, asked.whole = int(found.group(1)), True
    return asked


def judge(asked: Asked, record: UsageRecord | None, fleet: Fleet) -> str:
    """Whether the record is right, by all that is known; the kind of its fate."""
    told = [handed[asked.id] for handed in fleet.handed.values() if asked.id in handed]
    if record is None:
        # Its router was killed before any of an answer came, or never had it, or refused it.
        assert not asked.tokens
        return "none"
    billed = record.output_tokens
    assert record.cost_nano_usd == round(
        500 * (record.input_tokens - record.cached_tokens)
        + 50 * record.cached_tokens
        + 1500 * record.output_tokens
    )
    killed_at = fleet.killed_at.get(asked.router, inf)
    if killed_at < fleet.done_at[asked.id] + SETTLED_S and not asked.whole:
        # Killed while it served: at least what the client has, at most what the engine gave.
        assert asked.tokens <= billed
        assert not told or billed <= max(output for _, output, _ in told)
        return "router killed"
    if asked.whole:
        assert billed == asked.tokens
        assert not told or [record.input_tokens, billed] == told[-1][:2]
        return "whole"
    if told:
        # The engine says what it handed out: to the token.
        assert [record.input_tokens, billed] == told[-1][:2], (asked, record, told)
        return "left" if asked.left else "broke off"
    if record.replica in {engine.name for engine in fleet.engines}:
        assert not billed
        return "nothing said"
    if asked.left:
        assert asked.tokens <= billed
        return "left, engine killed"
    assert billed == asked.tokens, (asked, record)
    return "engine killed"


async def test_the_ledger_is_what_engines_produced_to_the_token(tmp_path):
    chance = random.Random(7)
    repo = tmp_path / "config"
    repo.mkdir()
    git(repo, "init", "--quiet", "--initial-branch=main")
    git(repo, "commit", "--quiet", "--allow-empty", "-m", "Begin")
    branch = StatusBranch(tmp_path / "status.git", str(repo), REF)
    async with running_valkey(tmp_path / "valkey") as (valkey, redis), AsyncExitStack() as stack:
        fleet = Fleet(redis, valkey.url, tmp_path, chance)
        tap = Tap(redis)
        ledger = LedgerTask(
            lambda: branch, tap, FixedLeadership(), KEY, interval_s=lambda: 1.0
        )  # fmt: skip
        try:
            await asyncio.gather(*(fleet.start_engine() for _ in range(3)))
            await fleet.publish()
            for place in range(2):
                await fleet.start_router(place)
            stop = asyncio.Event()
            counting = asyncio.create_task(ledger.run(stop))
            numbers = iter(range(REQUESTS))
            answers: list[Asked] = []
            due = KILL_EVERY

            async def client() -> None:
                for number in numbers:
                    while len(answers) > due + AT_ONCE:  # deaths keep pace
                        await asyncio.sleep(0.01)
                    asked = await ask(fleet, number)
                    fleet.done_at[asked.id] = time.monotonic()
                    answers.append(asked)

            async def killer() -> None:
                nonlocal due
                while len(answers) < REQUESTS:
                    if len(answers) >= due:
                        await chance.choice([fleet.kill_an_engine, fleet.kill_a_router])()
                        due += KILL_EVERY
                    await asyncio.sleep(0.01)

            await asyncio.gather(killer(), *(client() for _ in range(AT_ONCE)))
            for _, router in fleet.routers:
                router.process.terminate()
            for _, router in fleet.routers:
                await router.process.wait()
            # Whoever starts in their places finds what they have left.
            for place in range(2):
                await fleet.start_router(place)

            def nothing_left() -> bool:
                return len(list(tmp_path.glob("router*/usage/*.journal"))) == 2

            await eventually(nothing_left, timeout_s=60)
            await eventually(lambda: time.monotonic() > max(fleet.done_at.values()) + SETTLED_S)
            await asyncio.gather(*(fleet.told(engine) for engine in fleet.engines))
            stop.set()
            await counting
        finally:
            for each in fleet.stacks:
                await each.aclose()
        stack.pop_all()

    by_id: dict[str, list[UsageRecord]] = {}
    for record in tap.records.values():
        by_id.setdefault(record.id, []).append(record)
    assert all(len(records) == 1 for records in by_id.values())
    fates: dict[str, int] = {}
    for asked in answers:
        records = by_id.get(asked.id)
        try:
            fate = judge(asked, records[0] if records else None, fleet)
        except AssertionError as error:
            fate = "wrong"
            print(error)
        fates[fate] = fates.get(fate, 0) + 1
    print(f"\n{len(answers)} requests: {fates}")
    assert "wrong" not in fates
    assert fates["whole"] > REQUESTS / 4
    assert fates["left"]
    assert fates.get("router killed", 0) + fates.get("engine killed", 0)

    # The ledger in Git is exactly those records, each once.
    expected: dict[Row, Sums] = {}
    for record in tap.records.values():
        row = Row(record.tenant, record.key, record.function)
        expected[row] = expected.get(row, Sums()) + Sums(
            1,
            int(record.estimated),
            record.input_tokens,
            record.cached_tokens,
            record.output_tokens,
            record.cost_nano_usd,
        )
    ledger_rows: dict[Row, Sums] = {}
    paths = [path for path in await branch.paths("usage/") if day_in(path)]
    for data in (await branch.read_paths(paths)).values():
        opened = open_document(data, KEY.public_key())
        assert opened.signed
        for row, sums in parse_day(opened.document)[1].items():
            ledger_rows[row] = ledger_rows.get(row, Sums()) + sums
    assert ledger_rows == expected
