from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from router.core.blocks import Prompt
from router.core.index import PrefixIndex
from router.core.route import Candidates, States, choose, dispatched
from router.core.speeds import Speeds
from router.core.turnover import DEARER, Turnover
from schemas.wire.routing import Policy


def filled(*counts, capacity=100):
    index = PrefixIndex()
    turnover = Turnover()
    for slot in range(len(counts)):
        index.add(slot, capacity)
    turnover.dearer(index, range(len(counts)))
    fresh = iter(range(10**6))
    for slot, count in enumerate(counts):
        for _ in range(count):
            index.insert(slot, [next(fresh)])
    return turnover.dearer(index, range(len(counts)))


def test_where_more_is_stored_than_elsewhere_prefill_is_dearer():
    dearer = filled(200, 50, 50)
    assert dearer[0] > dearer[1] == dearer[2] > 1
    assert dearer[0] == 1 + DEARER * 2


def test_an_empty_fleet_has_nothing_to_lose():
    assert filled(0, 0) == {0: 1.0, 1: 1.0}


def test_while_there_is_room_little_is_lost():
    assert filled(2, 0, capacity=1000)[0] < 1.02


def test_more_room_makes_the_same_cheaper():
    index, turnover = PrefixIndex(), Turnover()
    index.add(0, 100)
    index.add(1, 1000)
    turnover.dearer(index, (0, 1))
    for block in range(80):
        index.insert(0, [block])
        index.insert(1, [block])
    dearer = turnover.dearer(index, (0, 1))
    assert dearer[0] > dearer[1]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_it_never_makes_prefill_cheaper_nor_dear_without_bound(counts):
    dearer = filled(*counts)
    assert all(1 <= times <= 1 + DEARER * len(counts) + 1e-9 for times in dearer.values())


def hits(*, steer):
    """Of an idle fleet with one replica near and three far; prompts come back after some while."""
    rng = random.Random(1)
    states, speeds, turnover = States(), Speeds(), Turnover()
    for slot in range(4):
        states.index.add(slot, 400)
        states.load.add(slot)
        speeds.add(slot, 0.0, 0.002 if slot == 0 else 0.03)
    candidates = Candidates(range(4), [f"r{slot}" for slot in range(4)])
    library = [[n * 1000 + i for i in range(40)] for n in range(35)]
    hit = 0
    for turn in range(600):
        now = float(turn)
        speeds.refresh(now, turnover.dearer(states.index, range(4)) if steer else {})
        prompt = Prompt(rng.choice(library), 40 * 64.0)
        choice = choose(candidates, prompt, states, speeds, Policy(), now=now, chance=rng)
        states.load.finish(dispatched(choice, prompt, states, speeds, now=now), now)
        hit += choice.hit_blocks
    return hit / (600 * 40)


def test_an_idle_fleet_uses_all_its_caches():
    # Prompts for one and a half of the fleet's caches together would fit in none alone.
    assert hits(steer=True) > 0.8
    assert hits(steer=False) < hits(steer=True) - 0.2
