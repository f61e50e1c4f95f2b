"""The queue's edge: turns, deadlines, and predictions; what the whole router makes of it is in test_fair_share."""

from __future__ import annotations

import asyncio

from router.core.errors import Refusal
from router.limits.queue import Place, Queues
from schemas.wire.routing import Function, Policy, Tenant
from tests.support import eventually

A = Tenant(name="a")
B = Tenant(name="b")


def function(max_wait_s: float = 20.0, max_requests: int = 1000) -> Function:
    policy = Policy(queue_max_wait_s=max_wait_s, queue_max_requests=max_requests)
    return Function(name="f", served_name="f", policy=policy)


class Room:
    """So many requests at once; notes in which order they were sent, and who was told what."""

    def __init__(self, queues: Queues, slots: int) -> None:
        self.queues = queues
        self.free = slots
        self.sent: list[str] = []
        self.refused: list[tuple[str, Refusal]] = []

    def enter(self, of: Function, tenant: Tenant, name: str = "", tokens: float = 10.0):
        name = name or tenant.name

        def try_() -> bool:
            if not self.free:
                return False
            self.free -= 1
            self.sent.append(name)
            return True

        return self.queues.enter(
            of, tenant, tokens, try_, lambda refusal: self.refused.append((name, refusal))
        )

    def end(self) -> None:
        self.free += 1
        self.queues.freed()


async def test_whoever_waits_is_sent_when_a_request_ends_fairly_by_tenant():
    room = Room(Queues(), 0)
    for _ in range(4):
        room.enter(function(), A)
    room.enter(function(), B)
    assert room.queues.must_wait("f")
    assert not room.queues.must_wait("other")
    for _ in range(5):
        room.end()
    await eventually(lambda: len(room.sent) == 5)
    assert room.sent.index("b") <= 1
    assert not room.queues.must_wait("f")
    assert len(room.queues) == 0
    room.queues.close()


async def test_room_that_comes_from_elsewhere_is_found():
    room = Room(Queues(), 0)
    room.enter(function(), A)
    room.free = 1  # nobody says so
    await eventually(lambda: room.sent == ["a"])
    await eventually(lambda: not room.queues.waiting)
    room.queues.close()


async def test_who_leaves_is_never_sent_and_takes_nobodys_turn():
    room = Room(Queues(), 0)
    places = [room.enter(function(), A, str(n)) for n in range(3)]
    assert isinstance(places[0], Place)
    places[0].leave()
    places[0].leave()
    room.end()
    await eventually(lambda: room.sent == ["1"])
    places[1].leave()
    assert len(room.queues) == 1
    room.end()
    await eventually(lambda: room.sent == ["1", "2"])
    room.queues.close()


async def test_a_deadline_is_kept_and_says_so_once():
    room = Room(Queues(), 0)
    room.enter(function(max_wait_s=0.05), A)
    await eventually(lambda: room.refused)
    ((_, refusal),) = room.refused
    assert (refusal.status, refusal.code, refusal.retry) == (503, "at_capacity", True)
    room.end()
    await eventually(lambda: not room.queues.waiting)
    assert room.sent == []
    assert len(room.refused) == 1


async def test_who_would_come_too_late_is_told_at_once_and_when_to_come():
    room = Room(Queues(), 0)
    of = function(max_requests=10_000)
    for _ in range(6):
        room.enter(of, A)
    for n in range(5):  # one in 50 ms at the fastest
        await asyncio.sleep(0.05)
        room.end()
        await eventually(lambda n=n: len(room.sent) == n + 1)
    answers = [room.enter(of, A) for _ in range(1000)]
    refusals = [a for a in answers if isinstance(a, Refusal)]
    assert 0 < len(refusals) < 1000
    assert all(r.code == "at_capacity" and r.retry_after_s > 0 for r in refusals)
    # Another tenant's turn would come in time all the same.
    assert isinstance(room.enter(of, B), Place)
    room.queues.close()


async def test_a_full_queue_is_at_the_cost_of_who_fills_it():
    room = Room(Queues(), 0)
    of = function(max_requests=5)
    flood = [room.enter(of, A, f"a{n}") for n in range(8)]
    assert [isinstance(p, Place) for p in flood] == [True] * 5 + [False] * 3
    assert isinstance(room.enter(of, B), Place)
    assert [name for name, _ in room.refused] == ["a4"]
    assert len(room.queues) == 5
    room.queues.close()
