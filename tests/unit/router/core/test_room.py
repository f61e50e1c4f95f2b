from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.index import PrefixIndex
from router.core.room import LEAST_BLOCKS, Room


class Engine:
    """A real LRU cache of so many blocks."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.cache = OrderedDict()

    def serve(self, blocks):
        depth = next((i for i, b in enumerate(blocks) if b not in self.cache), len(blocks))
        for block in reversed(blocks):
            self.cache[block] = None
            self.cache.move_to_end(block)
        while len(self.cache) > self.capacity:
            self.cache.popitem(last=False)
        return depth


def conversations(count, rng):
    """Chains that come back after a while, longer, or never."""
    alive, fresh = [], iter(range(10**9))
    for _ in range(count):
        if alive and rng.random() < 0.6:
            chain = alive[int(rng.random() ** 2 * len(alive))]
        else:
            alive.insert(0, chain := [])
            del alive[400:]
        chain.extend(next(fresh) for _ in range(rng.randrange(4, 40)))
        yield list(chain)


def served(room, index, engines, turns, rng):
    for chain in conversations(turns, rng):
        found = index.match(chain)
        predicted, slot = (found[0][0], found[0][1][0]) if found else (0, rng.choice([*engines]))
        held = index.held(slot)
        room.learn(slot, predicted, engines[slot].serve(chain), held)
        index.insert(slot, chain)
        for each in engines:
            if capacity := room.capacity(each):
                index.set_capacity(each, capacity)


@pytest.mark.parametrize("capacity", [1500, 4000])
def test_what_engines_hold_is_found_out(capacity):
    rng, room, index = random.Random(1), Room(), PrefixIndex()
    engines = {slot: Engine(capacity) for slot in range(3)}
    for slot in engines:
        index.add(slot, 100_000)
    served(room, index, engines, 3000, rng)
    for slot in engines:
        assert capacity * 0.8 < room.capacity(slot) < capacity * 1.25


def test_a_smaller_replica_is_known_by_itself():
    rng, room, index = random.Random(1), Room(), PrefixIndex()
    engines = {0: Engine(4000), 1: Engine(4000), 2: Engine(1000)}
    for slot in engines:
        index.add(slot, 100_000)
    served(room, index, engines, 8000, rng)
    assert room.capacity(2) < 1500
    assert min(room.capacity(0), room.capacity(1)) > 2500


def test_engines_that_never_tell_are_not_taken_for_empty():
    room = Room()
    for _ in range(100):
        room.learn(0, 50, 0, 1000)
    assert room.capacity(0) == 0


def test_a_restart_is_no_want_of_room():
    room = Room()
    room.learn(0, 50, 50, 1000)
    room.learn(0, 60, 40, 2000)
    known = room.capacity(0)
    for _ in range(3):
        room.learn(0, 50, 0, 300)
    assert room.capacity(0) < 300
    room.restarted(0)
    assert room.capacity(0) == known


def test_nothing_is_known_before_anything_is_missed():
    room = Room()
    for held in range(0, 5000, 50):
        room.learn(0, 30, 29, held)
    assert room.capacity(0) == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 999), st.integers(0, 999), st.integers(0, 9999))
    )
)
def test_whatever_is_said_there_is_some_room(said):
    room = Room()
    for slot, predicted, cached, held in said:
        room.learn(slot, predicted, cached, held)
        assert room.capacity(slot) == 0 or room.capacity(slot) >= LEAST_BLOCKS
