from __future__ import annotations

import random
from collections import Counter, OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.core.index import RECENT, PrefixIndex

SLOTS = 4
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=14)
"""Of small letters, so that many share a beginning."""


def chain(letters):
    """Blocks of a prompt: each known by all letters up to it."""
    made, h = [], 1
    for letter in letters:
        h = (h * 31 + letter + 1) % ((1 << 59) - 55)
        made.append(h)
    return made


def depths(index, blocks):
    return {slot: depth for depth, slots in index.match(blocks) for slot in slots}


class Naive:
    """One LRU dict a replica, walked block by block; what was used just now keeps its place."""

    def __init__(self):
        self.held = {}
        self.capacity = {}
        self.used = Counter()

    def insert(self, slot, blocks):
        held, capacity = self.held[slot], self.capacity[slot]
        blocks = blocks[:capacity]
        if not blocks:
            return
        used_at = held.get(blocks[-1])
        if used_at is not None and self.used[slot] - used_at <= capacity // RECENT:
            return
        self.used[slot] += len(blocks)
        for block in reversed(blocks):
            held[block] = self.used[slot]
            held.move_to_end(block)
        self.trim(slot)

    def trim(self, slot):
        while len(self.held[slot]) > self.capacity[slot]:
            self.held[slot].popitem(last=False)

    def depths(self, blocks):
        found = {}
        for slot, held in self.held.items():
            depth = next((i for i, b in enumerate(blocks) if b not in held), len(blocks))
            if depth:
                found[slot] = depth
        return found


class IndexMachine(RuleBasedStateMachine):
    """Chains only: what dispatch does. The index must agree with the naive one to the block."""

    def __init__(self):
        super().__init__()
        self.index, self.naive, self.asked = PrefixIndex(), Naive(), [[1]]

    @initialize(capacities=st.lists(st.integers(1, 30), min_size=SLOTS, max_size=SLOTS))
    def begin(self, capacities):
        for slot, capacity in enumerate(capacities):
            self.add(slot, capacity)

    @rule(slot=st.integers(0, SLOTS - 1), capacity=st.integers(1, 30))
    def add(self, slot, capacity):
        self.index.add(slot, capacity, epoch=1)
        self.naive.held[slot], self.naive.capacity[slot] = OrderedDict(), capacity

    @rule(slot=st.integers(0, SLOTS - 1), letters=PROMPTS)
    def insert(self, slot, letters):
        blocks = chain(letters)
        self.asked.append(blocks)
        if slot in self.naive.held:
            self.index.insert(slot, blocks)
            self.naive.insert(slot, blocks)

    @rule(slot=st.integers(0, SLOTS - 1), capacity=st.integers(1, 30))
    def set_capacity(self, slot, capacity):
        if slot in self.naive.held:
            self.index.set_capacity(slot, capacity)
            self.naive.capacity[slot] = capacity
            self.naive.trim(slot)

    @rule(slot=st.integers(0, SLOTS - 1), epoch=st.integers(1, 2))
    def restart(self, slot, epoch):
        if slot in self.naive.held:
            before = self.index.held(slot)
            self.index.set_epoch(slot, epoch)
            if before and not self.index.held(slot):
                self.naive.held[slot] = OrderedDict()

    @rule(slot=st.integers(0, SLOTS - 1))
    def clear(self, slot):
        if slot in self.naive.held:
            self.index.clear(slot)
            self.naive.held[slot] = OrderedDict()

    @rule(slot=st.integers(0, SLOTS - 1))
    def remove(self, slot):
        self.index.remove(slot)
        self.naive.held.pop(slot, None)

    @rule(blocks=st.integers(0, 9))
    def sweep(self, blocks):
        self.index.sweep(blocks)

    @invariant()
    def agrees(self):
        for blocks in self.asked[-6:]:
            assert depths(self.index, blocks) == self.naive.depths(blocks)
        for slot, held in self.naive.held.items():
            assert self.index.held(slot) == len(held)
        assert self.index.end == max(self.naive.held, default=-1) + 1

    def teardown(self):
        self.index.sweep(10_000)
        assert len(self.index) == len(set().union(*self.naive.held.values()))


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


@given(st.lists(st.tuples(st.integers(0, 7), PROMPTS), max_size=30), PROMPTS)
def test_the_deepest_stand_first_and_nobody_twice(inserted, asked):
    index = PrefixIndex()
    for slot in range(8):
        index.add(slot)
    for slot, letters in inserted:
        index.insert(slot, chain(letters))
    found = index.match(chain(asked))
    assert [depth for depth, _ in found] == sorted({depth for depth, _ in found}, reverse=True)
    slots = [slot for _, slots in found for slot in slots]
    assert len(slots) == len(set(slots))


def test_a_thousand_turns_never_exceed_the_bounds():
    # production-stack#687: a router's index that only grows.
    rng = random.Random(3)
    index = PrefixIndex(max_blocks=5000)
    for slot in range(10):
        index.add(slot, capacity_blocks=2000)
    for turn in range(1000):
        index.insert(turn % 10, [rng.getrandbits(60) for _ in range(rng.randrange(1, 300))])
        assert len(index) <= 5000
        assert all(index.held(slot) <= 2000 for slot in range(10))
    assert len(index) > 3000


def test_records_are_bounded_where_one_conversation_goes_on_and_on():
    index = PrefixIndex()
    index.add(0, capacity_blocks=400)
    blocks = chain([0] * 300)
    for turn in range(2000):
        index.insert(0, blocks[: 1 + turn % 300])
    cache = index._replicas[0].cache
    assert len(cache.runs) <= 2 * 300 + 16
    assert sum(len(run.blocks) for run in cache.runs) <= 2 * 300 + 16


def test_a_restarted_engine_is_credited_with_nothing():
    # sglang#39822, dynamo#11194.
    index = PrefixIndex()
    index.add(0, epoch=1)
    index.add(1, epoch=1)
    blocks = chain([1, 2, 0, 1])
    index.insert(0, blocks)
    index.insert(1, blocks)
    index.set_epoch(0, 2)
    assert depths(index, blocks) == {1: 4}
    index.insert(0, blocks[:2])
    assert depths(index, blocks) == {1: 4, 0: 2}


def test_a_slot_that_is_used_again_inherits_nothing():
    index = PrefixIndex()
    index.add(0)
    blocks = chain([1] * 2000)
    index.insert(0, blocks)
    index.remove(0)
    index.add(0)
    assert index.match(blocks) == []
    # Nor while what was left is swept, step by step with every insertion.
    for turn in range(20):
        index.add(turn + 1)
        index.insert(turn + 1, chain([2, turn % 3]))
        assert index.match(blocks) == []
    assert len(index) <= 4


def test_engines_correct_what_was_assumed():
    index = PrefixIndex()
    index.add(0)
    index.add(1)
    blocks = chain([0, 1, 2, 0, 1, 2])
    index.insert(0, blocks)
    index.store(1, blocks[:3])
    index.discard(0, blocks[4:])
    index.discard(0, [999])
    assert depths(index, blocks) == {0: 4, 1: 3}
    assert (index.held(0), index.held(1)) == (4, 3)
    index.store(0, blocks)
    assert depths(index, blocks) == {0: 6, 1: 3}


@given(
    st.lists(st.tuples(st.sampled_from(["insert", "store", "discard"]), st.integers(0, 2), PROMPTS))
)
@settings(deadline=None)
def test_what_is_counted_is_what_is_held_whatever_events_come(steps):
    index = PrefixIndex(max_blocks=60)
    for slot in range(3):
        index.add(slot, capacity_blocks=25)
    for do, slot, letters in steps:
        blocks = chain(letters)
        if do == "insert":
            index.insert(slot, blocks)
        elif do == "store":
            index.store(slot, blocks[len(blocks) // 2 :])
        else:
            index.discard(slot, blocks[::2])
        holders = list(index._holders.values())
        for each in range(3):
            bit = 1 << index._replicas[each].cache.bit
            assert index.held(each) == sum(bool(h.mask & bit) for h in holders) <= 25
        assert len(index) <= 60
        assert all(h.mask for h in holders)


def test_an_unknown_replica_is_an_error_and_not_a_new_one():
    with pytest.raises(KeyError):
        PrefixIndex().insert(3, [1])
