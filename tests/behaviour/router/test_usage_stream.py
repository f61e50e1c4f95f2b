"""Records get from a router's journal to a real Valkey once, whatever happens in between."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from redis.exceptions import RedisError

from router.core.shapes import Usage
from router.usage import stream as usage_stream
from router.usage.journal import Journal, Opened
from router.usage.stream import UsageStream
from schemas.wire.events import usage_record
from schemas.wire.redis_keys import USAGE_ACKED, USAGE_SENT, USAGE_STREAM
from schemas.wire.routing import Price
from tests.behaviour.publish_fixtures import running_valkey
from tests.support import eventually

OPENED = Opened("req_1", "team", "k", "chat", "0" * 40, 100.0, Price(input=1.0))


def use(journal: Journal, *tokens: int) -> None:
    for count in tokens:
        record = journal.record(OPENED, Usage(count, 0, 0), ended_at=101.0, outcome="ok")
        journal.finish(journal.open(OPENED), record)


async def in_redis(redis) -> list[tuple[int, int]]:
    """(number, tokens) of every entry."""
    entries = await redis.xrange(USAGE_STREAM)
    found = [usage_record(e[b"r"]) for _, e in entries]
    return [(record.seq, record.input_tokens) for record in found]


@asynccontextmanager
async def running(redis, journal, folder=None):
    stream = UsageStream(redis, journal, folder, interval_s=0.01)
    task = asyncio.create_task(stream.run())
    try:
        yield stream
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stream.close()


async def test_records_wait_in_the_journal_until_the_ledger_has_them(tmp_path):
    async with running_valkey(tmp_path) as (_, redis):
        journal = Journal.create(tmp_path / "usage")
        use(journal, 5, 6)
        async with running(redis, journal, tmp_path / "usage") as stream:
            await eventually(lambda: journal.waiting == 0)
            use(journal, 7)
            await eventually(lambda: journal.waiting == 0)
            assert await in_redis(redis) == [(1, 5), (2, 6), (3, 7)]
            assert stream.kept == 3
            await redis.hset(USAGE_ACKED, journal.name, 2)
            await eventually(lambda: stream.kept == 1)
            await redis.hset(USAGE_ACKED, journal.name, 3)
            await eventually(lambda: stream.kept == 0)
        assert list((tmp_path / "usage").iterdir()) == []


async def test_what_an_emptied_redis_lost_is_sent_again_and_nothing_else(tmp_path):
    async with running_valkey(tmp_path) as (_, redis):
        journal = Journal.create(None)
        async with running(redis, journal):
            use(journal, 1, 2, 3)
            await eventually(lambda: journal.waiting == 0)
            await redis.hset(USAGE_ACKED, journal.name, 2)
            await eventually(lambda: journal.kept == 1)
            await redis.flushall()

            async def there():
                return await in_redis(redis) == [(3, 3)]

            await eventually(there)
            use(journal, 4)
            await eventually(lambda: journal.waiting == 0)
            assert await in_redis(redis) == [(3, 3), (4, 4)]


async def test_records_wait_for_redis(tmp_path):
    async with running_valkey(tmp_path) as (_, redis):
        await redis.ping()
    journal = Journal.create(tmp_path / "usage")
    use(journal, 1, 2)
    stream = UsageStream(redis, journal, tmp_path / "usage")  # Valkey is gone
    with pytest.raises((RedisError, OSError)):
        await stream.flush()
    await stream.close()
    (kept,) = (tmp_path / "usage").iterdir()
    assert Journal.adopt(kept, ended_at=1.0).waiting == 2


async def test_a_batch_whose_answer_was_lost_counts_once(tmp_path):
    async with running_valkey(tmp_path) as (_, redis):
        journal = Journal.create(tmp_path / "usage")
        use(journal, 1, 2)
        async with running(redis, journal, tmp_path / "usage"):
            await eventually(lambda: journal.waiting == 0)
            journal.send_again()
            use(journal, 3)
            await eventually(lambda: journal.waiting == 0)
        assert await in_redis(redis) == [(1, 1), (2, 2), (3, 3)]
        # The next process finds the journal, and sends nothing twice either.
        own = Journal.create(tmp_path / "usage")
        use(own, 9)
        async with running(redis, own, tmp_path / "usage") as stream:
            await eventually(lambda: stream.kept == 4)
            await eventually(lambda: own.waiting == 0)
            assert await in_redis(redis) == [(1, 1), (2, 2), (3, 3), (1, 9)]
            await redis.hset(USAGE_ACKED, journal.name, 3)
            await eventually(lambda: stream.kept == 1)
        assert [path.stem for path in (tmp_path / "usage").iterdir()] == [own.name]
        assert list(await redis.hkeys(USAGE_SENT)) == [own.name.encode()]


@pytest.mark.timeout(30)
async def test_a_record_that_cannot_be_read_again_holds_up_no_other(tmp_path):
    left = Journal.create(tmp_path / "usage")
    use(left, 1, 2, 3)
    (path,) = (tmp_path / "usage").iterdir()
    left.close()
    file = bytearray(path.read_bytes())
    name = left.name.encode()  # in the head of the file, and first in every record
    second = file.index(name, file.index(name, file.index(name) + 1) + 1)
    file[second] = 0xC1  # which MessagePack never uses
    path.write_bytes(file)
    async with running_valkey(tmp_path) as (_, redis):
        own = Journal.create(tmp_path / "usage")
        async with running(redis, own, tmp_path / "usage") as stream:

            async def there():
                return len(await in_redis(redis)) == 2

            await eventually(there)
            assert await in_redis(redis) == [(1, 1), (3, 3)]
            await redis.hset(USAGE_ACKED, left.name, 3)
            await eventually(lambda: stream.kept == 0)
    assert list((tmp_path / "usage").iterdir()) == []


async def test_many_records_go_in_batches(tmp_path):
    async with running_valkey(tmp_path) as (_, redis):
        journal = Journal.create(None)
        use(journal, *range(1300))
        stream = UsageStream(redis, journal, None)
        await stream.flush()
        assert await in_redis(redis) == [(n + 1, n) for n in range(1300)]
        await stream.close()


async def test_a_stream_that_nobody_reads_takes_no_more(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(usage_stream, "_FULL", 2)
    async with running_valkey(tmp_path) as (_, redis):
        journal = Journal.create(None)
        stream = UsageStream(redis, journal, None)
        use(journal, 1, 2)
        await stream.flush()
        use(journal, 3)
        await stream.flush()
        assert (journal.waiting, await redis.xlen(USAGE_STREAM)) == (1, 2)
        assert "nobody reads" in caplog.text
        await redis.xtrim(USAGE_STREAM, maxlen=1, approximate=False)
        await stream.flush()
        assert await in_redis(redis) == [(2, 2), (3, 3)]
        await stream.close()
