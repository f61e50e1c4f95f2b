"""What is written in a journal is there after a SIGKILL, once, and until the ledger has it."""

from __future__ import annotations

import signal
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.core.shapes import Usage
from router.usage.journal import Journal, JournalBusy, Opened
from router.usage.slots import HEADER_BYTES, KINDS_AT, NARROW_BYTES, SEGMENT_BYTES
from schemas.wire.events import UsageRecord, usage_record
from schemas.wire.routing import Price

OPENED = Opened(
    id="req_1",
    tenant="team",
    key="k",
    function="chat",
    revision="0" * 40,
    started_at=100.0,
    price=Price(input=1.0, output=2.0),
)
USAGE = b'{"prompt_tokens":7,"completion_tokens":%d}'


def finish(journal: Journal, slot: int | None, output_tokens: int = 3) -> None:
    used = Usage(7, 0, output_tokens)
    journal.finish(slot, journal.record(OPENED, used, ended_at=101.5, outcome="ok"))


def records(journal: Journal) -> list[UsageRecord]:
    sizes, data = journal.unsent(10_000)
    ends = list(accumulate(sizes))
    assert ends[-1:] in ([], [len(data)])
    return [usage_record(data[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def test_a_record_says_who_used_what_and_what_it_cost():
    journal = Journal.create(None)
    finish(journal, journal.open(OPENED))
    (got,) = records(journal)
    assert (got.journal, got.seq, got.output_tokens) == (journal.name, 1, 3)
    assert (got.cost_nano_usd, got.duration_s) == (7 * 1000 + 3 * 2000, 1.5)
    journal.close()


def test_what_a_killed_process_leaves_is_finished_by_another(tmp_path):
    program = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = {[str(Path.cwd())]!r}
from tests.unit.router.test_usage_journal import OPENED, USAGE, finish
from router.usage.journal import Journal
journal = Journal.create(Path({str(tmp_path)!r}))
finish(journal, journal.open(OPENED), 5)
journal.open(OPENED)  # nothing of an answer came
slot = journal.open(OPENED)
for count in (1, 2, 12345, 40):
    journal.running(slot, USAGE % count)
print(journal.name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (path,) = tmp_path.iterdir()
    journal = Journal.adopt(path, ended_at=110.0)
    assert journal.name == done.stdout.strip()
    first, nothing, second = records(journal)
    assert (first.seq, first.output_tokens, first.outcome) == (1, 5, "ok")
    assert (nothing.seq, nothing.input_tokens, nothing.outcome) == (2, 0, "router_lost")
    assert (second.seq, second.output_tokens, second.outcome) == (3, 40, "router_lost")
    assert (second.input_tokens, second.duration_s) == (7, 10.0)

    # Whoever adopts it may die too.
    journal.close()
    again = Journal.adopt(path, ended_at=120.0)
    assert records(again) == [first, nothing, second]
    again.acknowledge(3)
    assert again.kept == 0
    again.close(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_belongs_to_one_process(tmp_path):
    journal = Journal.create(tmp_path)
    (path,) = tmp_path.iterdir()
    with pytest.raises(JournalBusy):
        Journal.adopt(path, ended_at=0.0)
    journal.close()
    Journal.adopt(path, ended_at=0.0).close()


def test_a_file_that_was_never_begun_holds_nothing(tmp_path):
    (tmp_path / "x.journal").write_bytes(b"")
    journal = Journal.adopt(tmp_path / "x.journal", ended_at=0.0)
    assert (journal.name, journal.kept) == ("", 0)
    journal.close(remove=True)


def test_only_what_redis_has_gives_way_where_room_runs_out(tmp_path):
    journal = Journal.create(tmp_path, max_segments=16)
    slots = [journal.open(OPENED) for _ in range(1024)]
    assert journal.open(OPENED) == -1
    finish(journal, slots[0])
    assert journal.open(OPENED) == -1
    assert journal.lost == 2
    journal.sent(1)
    assert journal.open(OPENED) == slots[0]
    assert journal.kept == 0
    journal.close()


def test_it_grows_with_what_it_holds(tmp_path):
    journal = Journal.create(tmp_path)
    for count in range(10_000):
        finish(journal, None, count)
    assert [each.output_tokens for each in records(journal)] == list(range(10_000))
    (path,) = tmp_path.iterdir()
    journal.close()
    assert path.stat().st_size < 15_000 * NARROW_BYTES
    assert len(records(Journal.adopt(path, ended_at=0.0))) == 10_000


def test_a_journal_of_an_earlier_version_is_read_and_of_a_newer_one_kept(tmp_path):
    journal = Journal.create(tmp_path)
    finish(journal, journal.open(OPENED), 5)
    journal.running(journal.open(OPENED), USAGE % 6)
    (path,) = tmp_path.iterdir()
    journal.close()
    written = path.read_bytes()
    path.write_bytes(written.replace(b"detoserve-usage-3", b"detoserve-usage-9"))
    with pytest.raises(JournalBusy):  # of a newer version: left for those who can read it
        Journal.adopt(path, ended_at=110.0)
    path.write_bytes(written.replace(b"detoserve-usage-3", b"detoserve-usage-1"))
    adopted = Journal.adopt(path, ended_at=110.0)
    assert [(r.seq, r.output_tokens) for r in records(adopted)] == [(1, 5), (2, 6)]
    adopted.close()


def test_narrow_slots_of_an_earlier_version_are_read(tmp_path):
    journal = Journal.create(tmp_path)
    for count in range(300):
        finish(journal, None, count)
    written = records(journal)
    (path,) = tmp_path.iterdir()
    journal.close()
    # The same records where slots of 512 bytes had them, 192 a segment.
    old = bytearray(path.read_bytes())
    kinds = [at for at in range(KINDS_AT, HEADER_BYTES) if old[at] == 2]
    assert len(kinds) == 1
    begins = HEADER_BYTES + (kinds[0] - KINDS_AT) * SEGMENT_BYTES
    slots = [old[begins + n * NARROW_BYTES :][:NARROW_BYTES] for n in range(300)]
    other = begins - SEGMENT_BYTES if begins > HEADER_BYTES else begins + SEGMENT_BYTES
    for number, slot in enumerate(slots):
        segment, place = (begins, number) if number < 192 else (other, number - 192)
        at = segment + place * 512
        old[at : at + 512] = slot.ljust(512, b"\0")
    old[kinds[0]] = old[KINDS_AT + (other - HEADER_BYTES) // SEGMENT_BYTES] = 1
    path.write_bytes(old)
    adopted = Journal.adopt(path, ended_at=110.0)
    assert records(adopted) == written
    adopted.close()


def test_records_and_streams_find_room_in_one_file(tmp_path):
    journal = Journal.create(tmp_path, max_segments=4)
    streams = [journal.open(OPENED) for _ in range(64)]
    for count in range(3 * 384):
        finish(journal, None, count)
    assert journal.lost == 0
    finish(journal, None)
    assert journal.open(OPENED) == -1
    assert journal.lost == 2
    # A record may have the slot of a stream, and what Redis has gives way to either.
    journal.forget(streams.pop())
    finish(journal, None, 1000)
    journal.sent(3 * 384 + 1)
    finish(journal, None, 2000)
    assert journal.open(OPENED) >= 0
    assert [r.output_tokens for r in records(journal)] == [2000]
    (path,) = tmp_path.iterdir()
    journal.close()
    assert path.stat().st_size <= 4 * SEGMENT_BYTES + 4096
    left = records(Journal.adopt(path, ended_at=110.0))
    assert [r.outcome for r in left].count("router_lost") == 64
    assert [r.output_tokens for r in left if r.outcome == "ok"] == [2000]


@pytest.mark.parametrize(("revision", "replica", "whole"), [(40, 100, True), (200, 300, False)])
def test_names_that_are_too_long_cost_the_id_and_never_a_neighbour(revision, replica, whole):
    journal = Journal.create(None)
    long = msgspec.structs.replace(
        OPENED,
        id="i" * 128,
        tenant="t" * 63,
        key="k" * 64,
        function="f" * 63,
        revision="r" * revision,
    )
    used = Usage(7, 0, 3)
    slot = journal.open(long)
    for at in (slot, None, None):
        made = journal.record(long, used, ended_at=1.0, outcome="ok", replica="x" * replica)
        journal.finish(at, made)
    journal.open(long)
    kept = records(journal)
    assert [got.seq for got in kept] == [1, 2, 3]
    for got in kept:
        assert made.id.startswith(got.id)
        assert made.replica.startswith(got.replica)
        assert (got.tenant, got.key, got.function) == (made.tenant, made.key, made.function)
        assert (got.replica == made.replica) == whole
        assert (got.input_tokens, got.output_tokens) == (7, 3)
    journal.close()


class Model(RuleBasedStateMachine):
    """Against lists: whatever happens, what is not acknowledged can be sent, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal.create(None)
        self.open: dict[int, None] = {}
        self.finished: list[int] = []
        self.in_redis = 0
        self.acked = 0

    @rule()
    def begin(self):
        slot = self.journal.open(OPENED)
        assert slot not in self.open
        self.open[slot] = None

    @precondition(lambda self: self.open)
    @rule(tokens=st.integers(1, 9))
    def finish(self, tokens):
        slot, _ = self.open.popitem()
        self.journal.running(slot, USAGE % tokens)
        finish(self.journal, slot, tokens)
        self.finished.append(tokens)

    @rule(tokens=st.integers(1, 9))
    def finish_at_once(self, tokens):
        finish(self.journal, None, tokens)
        self.finished.append(tokens)

    @precondition(lambda self: self.open)
    @rule()
    def forget(self):
        self.journal.forget(self.open.popitem()[0])

    @rule(upto=st.integers(0, 20))
    def send(self, upto):
        self.in_redis = max(self.in_redis, min(upto, len(self.finished)))
        self.journal.sent(self.in_redis)

    @rule()
    def redis_is_lost(self):
        self.in_redis = self.acked
        self.journal.send_again()

    @rule(upto=st.integers(0, 20))
    def acknowledge(self, upto):
        self.acked = max(self.acked, min(upto, self.in_redis))
        self.journal.acknowledge(self.acked)

    @invariant()
    def the_rest_can_be_sent(self):
        got = [(each.seq, each.output_tokens) for each in records(self.journal)]
        assert got == list(enumerate(self.finished, start=1))[max(self.in_redis, self.acked) :]
        assert self.journal.kept == len(self.finished) - self.acked

    def teardown(self):
        self.journal.close()


TestJournal = Model.TestCase
TestJournal.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
