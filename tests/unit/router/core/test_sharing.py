from __future__ import annotations

from math import nan

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.index import PrefixIndex
from router.core.load import Load, Share
from router.core.sharing import (
    BATCH_BLOCKS,
    EXPIRY_S,
    Journal,
    Peers,
    packed,
    replica_load,
    share_of,
    unpacked,
)
from schemas.wire.events import Cached, LoadBatch, PrefillSample, ReplicaLoad

SLOTS = {"r0": 0, "r1": 1, "r2": 2}
NAMES = {slot: name for name, slot in SLOTS.items()}
TRANSIT_S = 0.003


class Router:
    """What one router knows, with a clock that is its own."""

    def __init__(self, name, clock_ahead_s=0.0):
        self.ahead_s = clock_ahead_s
        self.load = Load()
        self.index = PrefixIndex()
        for slot in NAMES:
            self.load.add(slot)
            self.index.add(slot)
        self.journal = Journal(name, self.load)
        self.peers = Peers(name, self.load, self.index)
        self.samples = []

    def send(self, slot, work_s, now, blocks=()):
        self.journal.dispatched(slot, blocks)
        return self.load.dispatch(slot, work_s, 100, now + self.ahead_s)

    def first_token(self, ticket, now):
        self.journal.changed(ticket.slot)
        return self.load.first_token(ticket, now + self.ahead_s)

    def finish(self, ticket, now):
        self.journal.changed(ticket.slot)
        self.load.finish(ticket, now + self.ahead_s)

    def tell(self, now, *, full=False):
        return self.journal.batches(NAMES, now + self.ahead_s, full=full)

    def hear(self, batches, now):
        for batch in batches:
            data = msgspec.msgpack.encode(batch)
            self.peers.receive(
                msgspec.msgpack.decode(data, type=LoadBatch),
                SLOTS,
                lambda *sample: self.samples.append(sample),
                now + self.ahead_s,
            )

    def backlog_s(self, slot, now):
        return self.load.backlog_s(slot, now + self.ahead_s)


@given(st.lists(st.integers(0, 2**60 - 1), max_size=50))
def test_a_chain_is_read_as_it_was_packed(blocks):
    assert list(unpacked(packed(blocks))) == blocks


@given(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.sampled_from(["send", "first", "finish", "lose", "tell", "full"]),
            st.integers(0, 2),
            st.floats(0.01, 3),
        ),
        max_size=50,
    )
)
def test_after_a_full_message_others_know_all_whatever_was_lost(steps):
    a, b = Router("a"), Router("b", clock_ahead_s=5000.0)
    tickets = {"a": [], "b": []}
    now = 100.0
    for who, what, slot, amount in steps:
        now += amount
        router, other, mine = ((a, b, tickets["a"]), (b, a, tickets["b"]))[who]
        if what == "send":
            mine.append(router.send(slot, amount, now))
        elif what == "first" and mine:
            router.first_token(mine[slot % len(mine)], now)
        elif what == "finish" and mine:
            router.finish(mine.pop(slot % len(mine)), now)
        elif what == "lose":
            router.tell(now)
        elif what == "tell":
            other.hear(router.tell(now), now)
        elif what == "full":
            other.hear(router.tell(now, full=True), now)
    a.hear(b.tell(now, full=True), now)
    b.hear(a.tell(now, full=True), now)
    for slot in NAMES:
        assert a.load.requests[slot] == b.load.requests[slot]
        assert a.backlog_s(slot, now) == pytest.approx(b.backlog_s(slot, now), abs=1e-6)
        own = a.load.own_share(slot).requests + b.load.own_share(slot).requests
        assert a.load.requests[slot] == own


def test_what_one_dispatches_another_counts():
    # llm-d-router#1892, dynamo#1056: replicas of the router itself that do not know of one another.
    a, b = Router("a"), Router("b", clock_ahead_s=-50.0)
    a.send(0, 2.0, 10.0, blocks=[1, 2, 3])
    b.hear(a.tell(10.01), 10.01 + TRANSIT_S)
    assert b.load.requests == [1, 0, 0]
    assert b.backlog_s(0, 10.5) == pytest.approx(1.5, abs=0.01)
    assert b.index.match([1, 2, 3, 4]) == [(3, (0,))]


def test_a_router_that_falls_silent_has_nothing():
    a, b = Router("a"), Router("b")
    a.send(1, 2.0, 0.0)
    b.hear(a.tell(0.0), 0.0)
    assert b.peers.expire(EXPIRY_S) == []
    assert b.load.requests[1] == 1
    assert b.peers.expire(EXPIRY_S + 0.1) == ["a"]
    assert b.load.requests[1] == 0
    assert b.backlog_s(1, EXPIRY_S + 0.1) == 0
    assert len(b.peers) == 0


def test_a_message_heard_twice_or_late_counts_once():
    a, b = Router("a"), Router("b")
    ticket = a.send(0, 2.0, 0.0)
    first = a.tell(0.0)
    a.finish(ticket, 1.0)
    second = a.tell(1.0)
    b.hear(second, 1.0)
    b.hear(first, 1.1)
    b.hear(second, 1.2)
    assert b.load.requests[0] == 0
    assert b.peers.gaps == 0
    a.tell(2.0)
    b.hear(a.tell(2.1), 2.1)
    assert b.peers.gaps == 1


def test_its_own_message_is_no_other_routers():
    a = Router("a")
    a.send(0, 2.0, 0.0)
    a.hear(a.tell(0.0), 0.0)
    assert a.load.requests[0] == 1
    assert len(a.peers) == 0


def test_a_replica_that_the_table_does_not_name_is_not_made_by_a_message():
    b = Router("b")
    batch = LoadBatch(
        router="x",
        seq=1,
        loads=(ReplicaLoad("evil", 5, 9.0),),
        cached=(Cached("evil", b"\x01" * 8),),
        samples=(PrefillSample("evil", 0, 100, 1),),
    )
    b.hear([batch], 0.0)
    assert b.load.requests == [0, 0, 0]
    assert len(b.index) == 0
    assert b.samples == []


@given(st.tuples(st.integers(-(2**62), 2**62), *[st.floats() for _ in range(5)]))
def test_whatever_is_told_loads_stay_sound(numbers):
    load = Load()
    load.add(0)
    load.set_engine(0, capacity_tokens=1000, kv_used=0.0)
    load.set_share(0, "x", share_of(ReplicaLoad("r0", *numbers), 100.0))
    load.dispatch(0, 1.0, 10, 100.0)
    assert load.requests[0] >= 1
    assert 1.0 - 1e-9 <= load.backlog_s(0, 100.0) < 4000
    assert 0 <= load.kv_used[0] <= 1
    load.drop_router("x")
    assert (load.requests[0], load.backlog_s(0, 100.0)) == (1, 1.0)


def test_a_share_survives_its_journey():
    share = Share(2.0, 3, 400.0, oldest_at=7.0, oldest_work_s=1.5, departed_at=6.0)
    assert share_of(replica_load("r0", share, 10.0), 10.0) == share
    idle = Share()
    assert share_of(replica_load("r0", idle, 10.0), 10.0) == idle


@pytest.mark.parametrize("bad", [(nan, 5.0, 1.0), (9.0, 5.0, 1.0), (-1.0, 5.0, 1.0)])
def test_a_sample_that_cannot_be_is_not_learned(bad):
    b = Router("b")
    b.hear([LoadBatch(router="x", seq=1, samples=(PrefillSample("r0", *bad),))], 0.0)
    assert b.samples == []
    b.hear([LoadBatch(router="x", seq=2, samples=(PrefillSample("r0", 1.0, 5.0, 1.0),))], 0.0)
    assert b.samples == [(0, 1.0, 5.0, 1.0)]


def test_many_chains_go_in_several_messages():
    a, b = Router("a"), Router("b")
    chains = [list(range(i * 10_000, i * 10_000 + 4000)) for i in range(4)]
    for chain in chains:
        a.send(2, 0.1, 0.0, blocks=chain)
    batches = a.tell(0.0)
    assert len(batches) == 4
    assert all(sum(len(c.blocks) for c in batch.cached) <= 8 * BATCH_BLOCKS for batch in batches)
    b.hear(batches, 0.0)
    assert b.peers.gaps == 0
    for chain in chains:
        assert b.index.match(chain) == [(4000, (2,))]


def test_a_briefing_keeps_what_was_used_last():
    a, b = Router("a"), Router("b")
    for slot in NAMES:
        a.index.set_capacity(slot, 100)
        b.index.set_capacity(slot, 100)
    chains = [list(range(n * 1000, n * 1000 + 30)) for n in range(5)]
    for chain in chains[:3]:
        a.index.insert(0, chain)
    a.index.insert(0, chains[0] + [7, 8])  # used again, and longer
    b.hear(a.journal.briefing(NAMES, a.index, "b"), 0.0)
    for router in (a, b):
        router.index.insert(0, chains[3])
    for chain in (*chains, chains[0] + [7, 8]):
        assert b.index.match(chain) == a.index.match(chain)


def test_only_what_was_touched_is_told_between_full_messages():
    a = Router("a")
    a.send(0, 1.0, 0.0)
    a.tell(0.0)
    a.send(1, 1.0, 1.0)
    (batch,) = a.tell(1.0)
    assert [load.replica for load in batch.loads] == ["r1"]
    (full,) = a.tell(1.0, full=True)
    assert [load.replica for load in full.loads] == ["r0", "r1"]
    assert full.loads[0].oldest_age_s == pytest.approx(1.0)
