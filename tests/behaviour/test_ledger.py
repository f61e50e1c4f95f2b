"""From routers' journals through a real Valkey into Git: every request once, whatever dies between."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from reconciler.core.ledger import CURSOR_PATH, Row, Sums, day_path, parse_day, total
from reconciler.errors import Fenced, Stalled
from reconciler.loop.ledger_task import LedgerTask
from reconciler.publish.ledger_file import open_document
from reconciler.publish.status_branch import StatusBranch
from reconciler.publish.usage_source import UsageSource
from router.core.shapes import Usage
from router.usage.journal import Journal
from router.usage.opened import Opened
from router.usage.stream import UsageStream
from schemas.wire.envelope import public_key_hex
from schemas.wire.events import MonthToDate
from schemas.wire.redis_keys import USAGE_ACKED, USAGE_STREAM, usage_month
from schemas.wire.routing import Price
from tests.behaviour.cli_process import detoserve
from tests.behaviour.loop_fixtures import FixedLeadership
from tests.behaviour.publish_fixtures import git, lease, running_valkey
from tests.support import eventually

NOON = 1_795_435_200.0  # 2026-11-23T12:00:00Z
DAY_S = 86400.0
TODAY = "2026-11-23"
REF = "detoserve/status"
KEY = Ed25519PrivateKey.generate()


def use(
    journal: Journal, tokens: int = 1, *, tenant: str = "team", at: float = NOON, price: float = 1.0
) -> None:
    opened = Opened("req", tenant, "k", "chat", "0" * 40, at, Price(output=price))
    record = journal.record(opened, Usage(0, 0, tokens), ended_at=at, outcome="ok")
    journal.finish(journal.open(opened), record)


class House:
    """A config repo, a Valkey, and ledger tasks one after another."""

    def __init__(self, folder: Path, redis) -> None:
        self.folder = folder
        self.redis = redis
        self.repo = folder / "config"
        self.repo.mkdir()
        git(self.repo, "init", "--quiet", "--initial-branch=main")
        git(self.repo, "commit", "--quiet", "--allow-empty", "-m", "Begin")
        self.leadership = FixedLeadership()
        self.key = KEY

    def branch(self, name: str = "mirror") -> StatusBranch:
        return StatusBranch(self.folder / f"{name}.git", str(self.repo), REF)

    def task(self, branch: StatusBranch | None = None, leadership=None) -> LedgerTask:
        sink = branch or self.branch()
        return LedgerTask(
            lambda: sink,
            UsageSource(self.redis),
            leadership or self.leadership,
            self.key,
            interval_s=lambda: 0.0,
            today=lambda: TODAY,
        )

    def file(self, path: str) -> bytes:
        return git(self.repo, "show", f"{REF}:{path}").encode()

    def day(self, day: str = TODAY) -> dict[Row, Sums]:
        opened = open_document(self.file(day_path(day)), self.key.public_key())
        assert opened.signed
        name, rows = parse_day(opened.document)
        assert name == day
        return dict(rows)

    def commits(self) -> int:
        return int(git(self.repo, "rev-list", "--count", REF))


@asynccontextmanager
async def house(folder: Path):
    async with running_valkey(folder) as (_, redis):
        yield House(folder, redis)


async def send(redis, *journals: Journal) -> None:
    for journal in journals:
        await UsageStream(redis, journal, None).flush()


async def test_usage_stands_in_git_by_tenant_key_and_function_and_is_signed(tmp_path):
    async with house(tmp_path) as home:
        journal = Journal.create(None)
        for tokens, tenant in ((5, "red"), (6, "blue"), (7, "red")):
            use(journal, tokens, tenant=tenant, price=0.5)
        use(journal, 9, tenant="red", at=NOON - DAY_S)
        await send(home.redis, journal)
        task = home.task()
        assert await task.step() == git(home.repo, "rev-parse", REF)
        assert home.day() == {
            Row("blue", "k", "chat"): Sums(1, 0, 0, 0, 6, 3_000),
            Row("red", "k", "chat"): Sums(2, 0, 0, 0, 12, 6_000),
        }
        assert total(home.day("2026-11-22").values()).output_tokens == 9
        assert git(home.repo, "log", "-1", "--format=%B", REF) == (
            "usage: 2026-11-22 to 2026-11-23\n\nDetoserve-Lease: 1"
        )
        assert not open_document(
            home.file(day_path(TODAY)).replace(b"outputTokens: 12", b"outputTokens: 11"),
            home.key.public_key(),
        ).signed

        # Routers may forget, the stream is cut off, and budgets have sums to start from.
        await send(home.redis, journal)
        assert journal.kept == 0
        assert await home.redis.xlen(USAGE_STREAM) == 0
        month = await home.redis.hgetall(usage_month("2026-11"))
        assert msgspec.msgpack.decode(month[b"red"], type=MonthToDate) == MonthToDate(
            requests=3, output_tokens=21, cost_nano_usd=15_000
        )
        assert await task.step() is None
        assert home.commits() == 1


async def test_a_restart_counts_what_was_not_committed_and_nothing_twice(tmp_path):
    async with house(tmp_path) as home:
        journal = Journal.create(None)
        use(journal, 1)
        await send(home.redis, journal)
        await home.task().step()

        # Killed after its commit and before its word: the stream still has everything.
        use(journal, 2)
        await send(home.redis, journal)
        entries = await home.redis.xrange(USAGE_STREAM)
        await home.task().step()
        for _, fields in entries:
            await home.redis.xadd(USAGE_STREAM, fields)
        await home.redis.delete(USAGE_ACKED)
        assert await home.task().step() is None
        assert total(home.day().values()) == Sums(2, 0, 0, 0, 3, 3_000)
        # And says again how far it goes.
        assert int(await home.redis.hget(USAGE_ACKED, journal.name)) == 2


async def test_an_emptied_redis_costs_nothing(tmp_path):
    async with house(tmp_path) as home:
        journals = [Journal.create(None), Journal.create(None)]
        task = home.task()
        for round_ in range(4):
            for journal in journals:
                use(journal, 10**round_)
            await send(home.redis, *journals)
            if round_ % 2:
                await task.step()
            await home.redis.flushall()
        await send(home.redis, *journals)
        await task.step()
        assert total(home.day().values()) == Sums(8, 0, 0, 0, 2222, 2_222_000)


async def test_records_of_a_past_month_join_what_stands_there(tmp_path):
    async with house(tmp_path) as home:
        journal = Journal.create(None)
        for days in (40, 41, 0):
            use(journal, 1, at=NOON - days * DAY_S)
        await send(home.redis, journal)
        await home.task().step()
        use(journal, 5, at=NOON - 40 * DAY_S)
        await send(home.redis, journal)
        await home.task().step()
        assert total(home.day("2026-10-14").values()).output_tokens == 6
        month = await home.redis.hget(usage_month("2026-10"), "team")
        assert msgspec.msgpack.decode(month, type=MonthToDate).output_tokens == 7


async def test_the_ledger_and_status_share_the_branch_with_others(tmp_path):
    async with house(tmp_path) as home:
        branch, theirs = home.branch(), home.branch("theirs")
        task, journal = home.task(branch), Journal.create(None)
        documents = {"status/summary.yaml": b"a: 1\n"}
        for turn in range(4):
            use(journal)
            await send(home.redis, journal)
            documents = {"status/summary.yaml": b"a: %d\n" % turn}
            await asyncio.gather(
                task.step(),
                branch.write(documents, revision="0" * 40, plan_digest="", lease=lease(1)),
                theirs.put({"notes/x.txt": b"%d" % turn}, subject="Note", lease=lease(1)),
            )
        assert await branch.read() == documents
        assert total(home.day().values()).requests == 4
        assert home.file("notes/x.txt") == b"3"
        with pytest.raises(ValueError, match="status document"):
            await branch.put({"status/summary.yaml": b""}, subject="x", lease=lease(1))


async def test_of_two_reconcilers_one_writes(tmp_path):
    async with house(tmp_path) as home:
        old, new = home.task(), home.task(home.branch("new"), FixedLeadership(2))
        journal = Journal.create(None)
        use(journal, 1)
        await send(home.redis, journal)
        await old.step()
        use(journal, 2)
        await send(home.redis, journal)
        await new.step()
        use(journal, 4)
        await send(home.redis, journal)
        with pytest.raises(Fenced):
            await old.step()
        await new.step()
        assert total(home.day().values()) == Sums(3, 0, 0, 0, 7, 7_000)
        assert b"seq: 3" in home.file(CURSOR_PATH)


async def test_a_broken_document_stops_the_ledger_and_not_the_records(tmp_path):
    async with house(tmp_path) as home:
        journal = Journal.create(None)
        use(journal, 1)
        await send(home.redis, journal)
        branch = home.branch()
        await home.task(branch).step()
        data = home.file(day_path(TODAY))
        broken = data.replace(b"outputTokens: 1", b"outputTokens: 2", 1)
        await branch.put({day_path(TODAY): broken}, subject="Mine", lease=lease(1))
        use(journal, 2)
        await send(home.redis, journal)
        with pytest.raises(Stalled, match=r"2026-11-23\.yaml .* not the sums of its rows"):
            await home.task(branch).step()
        assert journal.kept == 1
        await branch.put({day_path(TODAY): data + b"\n"}, subject="Restore", lease=lease(1))
        await home.task(branch).step()
        assert total(home.day().values()).output_tokens == 3


async def test_it_commits_at_most_so_often_and_once_more_at_the_end(tmp_path):
    async with house(tmp_path) as home:
        task, stop = home.task(), asyncio.Event()
        task._interval_s = lambda: 3600.0
        journal = Journal.create(None)
        for tokens in (1, 2):
            use(journal, tokens)
            await send(home.redis, journal)
            await task.step()
        assert home.commits() == 1
        stop.set()
        await task.run(stop)
        assert total(home.day().values()) == Sums(2, 0, 0, 0, 3, 3_000)


@pytest.mark.parametrize("seed", range(3))
async def test_any_order_of_deaths_counts_every_request_once(tmp_path, seed):
    """Routers, Redis and reconcilers die at random; each journal is a router's life."""
    chance = random.Random(seed)
    folder = tmp_path / "usage"
    expected = [0, 0]
    async with house(tmp_path) as home:
        router, task = Journal.create(folder), home.task()
        sender = UsageStream(home.redis, router, folder)
        for _ in range(40):
            match chance.randrange(8):
                case 0 | 1 | 2:
                    tokens = chance.randrange(1, 100)
                    use(router, tokens, at=NOON - DAY_S * chance.randrange(2))
                    expected = [expected[0] + 1, expected[1] + tokens]
                case 3:
                    await sender.flush()
                case 4:
                    await task.step(now=True)
                case 5:
                    await home.redis.flushall()
                case 6:
                    task = home.task()
                case _:
                    router.close()  # as the kernel does for whoever is killed
                    for journal in sender._adopted:
                        journal.close()
                    router = Journal.create(folder)
                    sender = UsageStream(home.redis, router, folder)
                    sender._adopt()

        async def settled() -> bool:
            await sender.flush()
            await task.step(now=True)
            await sender.flush()
            return sender.kept == 0

        await eventually(settled)
        paths = await home.branch("reader").paths("usage/2026")
        sums = total(sums for path in paths for sums in home.day(path[-15:-5]).values())
        assert [sums.requests, sums.output_tokens] == expected
        await sender.close()


async def test_the_command_shows_the_ledger_and_whether_it_is_signed(tmp_path):
    async with house(tmp_path) as home:
        journal = Journal.create(None)
        for tenant, tokens in (("red", 30), ("blue", 10)):
            use(journal, tokens, tenant=tenant)
        await send(home.redis, journal)
        await home.task().step()
        key = public_key_hex(home.key)

        def shown(*flags: str, code: int = 0) -> str:
            done = detoserve("usage", str(home.repo), "--month", "2026-11", *flags)
            assert done.returncode == code, done.stderr
            return done.stdout

        table = shown("--public-key", key)
        assert " 75%" in next(line for line in table.splitlines() if line.startswith("red"))
        assert json.loads(shown("-o", "json", "--public-key", key))["signed"] is True
        assert shown("-o", "csv", "--tenant", "blue").splitlines()[1:] == [
            "2026-11-23,blue,k,chat,1,0,0,0,10,0.000010000"
        ]
        assert "none" in shown("--month", "2020-01")
        another = public_key_hex(Ed25519PrivateKey.generate())
        assert "not signed" in shown("--public-key", another, code=1)
        assert "YYYY" in detoserve("usage", "--help").stdout
        assert detoserve("usage", str(home.repo), "--month", "November").returncode == 2
