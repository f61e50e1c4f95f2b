"""Bursts of requests begin a share at a time."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from router.turns import PER_PASS, Turns


async def test_few_requests_never_wait():
    turns = Turns()
    for _ in range(3 * PER_PASS):
        assert turns.take() is None
        await asyncio.sleep(0)


async def test_a_burst_begins_in_shares_and_in_order():
    turns = Turns()
    taken = [turns.take() for _ in range(4 * PER_PASS)]
    assert taken[:PER_PASS] == [None] * PER_PASS
    waiting = taken[PER_PASS:]
    assert not any(turn is None or turn.done() for turn in waiting)
    begun = [0]
    while begun[-1] < len(waiting):
        await asyncio.sleep(0)
        done = [turn.done() for turn in waiting]
        assert done == sorted(done, reverse=True)
        begun.append(sum(done))
    assert max(b - a for a, b in pairwise(begun)) == PER_PASS
    await asyncio.sleep(0)
    assert turns.take() is None


async def test_who_comes_later_does_not_overtake():
    turns = Turns()
    early = [turn for _ in range(3 * PER_PASS) if (turn := turns.take()) is not None]
    await asyncio.sleep(0)
    assert not early[-1].done()
    order = []
    for name, turn in (("late", turns.take()), ("early", early[-1])):
        assert turn is not None
        turn.add_done_callback(lambda _, name=name: order.append(name))
        last = turn
    await last
    while len(order) < 2:
        await asyncio.sleep(0)
    assert order == ["early", "late"]


async def test_a_client_that_leaves_while_it_waits_takes_no_turn():
    turns = Turns()
    waiting = [turn for _ in range(4 * PER_PASS) if (turn := turns.take()) is not None]
    for turn in waiting[:PER_PASS]:
        turn.cancel()
    await asyncio.sleep(0)
    assert all(turn.done() for turn in waiting[PER_PASS : 2 * PER_PASS])
    assert not waiting[2 * PER_PASS].done()
    await asyncio.gather(*waiting[2 * PER_PASS :])
