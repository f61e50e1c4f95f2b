"""FairQueue: weighted shares of tokens, order within a tenant, priorities, and no credit for absence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.fairness import FairQueue, Waiting

costs = st.integers(1, 1000).map(float)
names = st.sampled_from("abc")


def filled(**lines: list[float]) -> FairQueue:
    """A queue with these costs by tenant."""
    queue = FairQueue()
    for tenant, wanted in lines.items():
        for at, cost in enumerate(wanted):
            queue.push(Waiting(tenant, cost, float(at)))
    return queue


@given(
    st.lists(costs, min_size=40, max_size=60),
    st.lists(costs, min_size=40, max_size=60),
    st.floats(0.25, 4),
    st.floats(0.25, 4),
)
def test_two_that_always_wait_are_served_by_weight(first, second, weight_a, weight_b):
    queue = FairQueue()
    for tenant, weight, wanted in (("a", weight_a, first), ("b", weight_b, second)):
        for cost in wanted:
            queue.push(Waiting(tenant, cost, 0.0, weight=weight))
    served = {"a": 0.0, "b": 0.0}
    left = {"a": len(first), "b": len(second)}
    while min(left.values()):
        request = queue.pop()
        assert request is not None
        served[request.tenant] += request.cost / request.weight
        left[request.tenant] -= 1
        # Never further apart than one request of each.
        bound = 1000 / weight_a + 1000 / weight_b
        assert abs(served["a"] - served["b"]) <= bound


@given(st.lists(st.tuples(names, costs), max_size=40))
def test_everybody_is_served_once_and_in_order_within_a_tenant(requests):
    queue = FairQueue()
    pushed = [Waiting(tenant, cost, float(n)) for n, (tenant, cost) in enumerate(requests)]
    for request in pushed:
        queue.push(request)
    popped = [queue.pop() for _ in pushed]
    assert queue.pop() is None
    for name in "abc":
        mine = [r for r in popped if r is not None and r.tenant == name]
        assert mine == [r for r in pushed if r.tenant == name]


def test_who_was_away_comes_back_level_and_has_saved_up_nothing():
    queue = filled(a=[100.0] * 20)
    for _ in range(10):
        queue.pop()
    for n in range(10):
        queue.push(Waiting("b", 100.0, 100.0 + n))
    order = [queue.pop().tenant for _ in range(20)]
    assert order[:2] == ["a", "b"]
    assert all(abs(order[:n].count("a") - order[:n].count("b")) <= 1 for n in range(20))


def test_one_request_against_a_flood_is_next_but_one():
    queue = filled(flood=[500.0] * 1000)
    for _ in range(50):
        queue.pop()
    queue.push(Waiting("quiet", 500.0, 1e9))
    assert "quiet" in [queue.pop().tenant for _ in range(2)]


def test_a_higher_priority_goes_first_however_much_it_had():
    queue = filled(low=[1.0] * 5)
    for _ in range(5):
        queue.push(Waiting("high", 1000.0, 1e9, priority=1))
    assert [queue.pop().tenant for _ in range(10)] == ["high"] * 5 + ["low"] * 5


def test_what_was_put_back_is_first_again_and_was_not_charged():
    queue = filled(a=[10.0, 20.0], b=[10.0])
    first = queue.pop()
    queue.put_back(first)
    assert queue.pop() is first
    assert queue.pop().tenant == "b"


def test_what_a_request_needed_more_is_charged_to_its_tenant():
    queue = filled(a=[10.0] * 4, b=[10.0] * 4)
    expensive = queue.pop()
    assert expensive.tenant == "a"
    queue.correct(expensive, 30.0)
    assert [queue.pop().tenant for _ in range(4)] == ["b", "b", "b", "a"]


@given(st.lists(st.tuples(names, st.sampled_from(["push", "pop", "leave", "back"])), max_size=60))
def test_the_count_is_true_through_any_order_of_events(events):
    queue = FairQueue()
    waiting: list[Waiting] = []
    for n, (tenant, event) in enumerate(events):
        if event == "push":
            waiting.append(Waiting(tenant, 5.0, float(n)))
            queue.push(waiting[-1])
        elif event == "leave" and waiting:
            queue.leave(waiting.pop(n % len(waiting)))
        elif event in ("pop", "back"):
            request = queue.pop()
            assert (request is None) == (not waiting)
            if request is not None and event == "pop":
                waiting.remove(request)
            elif request is not None:
                queue.put_back(request)
        assert queue.live == len(waiting)
        assert queue.before("new", 1.0, 0) <= len(waiting)
    assert {queue.pop() for _ in waiting} == set(waiting)


@given(st.lists(st.tuples(names, st.integers(0, 1)), min_size=1, max_size=20), names)
def test_who_is_before_a_newcomer_is_told_about_right(requests, newcomer):
    queue = FairQueue()
    for n, (tenant, _) in enumerate(requests):
        queue.push(Waiting(tenant, 10.0, float(n)))
    told = queue.before(newcomer, 1.0, 0)
    mine = Waiting(newcomer, 10.0, 1e9)
    queue.push(mine)
    order = []
    while (request := queue.pop()) is not None:
        order.append(request)
    assert abs(order.index(mine) - told) <= len({t for t, _ in requests})


@pytest.mark.parametrize(
    ("lines", "newcomer", "displaced"),
    [
        ({"a": 9, "b": 1}, "b", "a"),
        ({"a": 9, "b": 1}, "c", "a"),
        ({"a": 9, "b": 1}, "a", None),
        ({"a": 5, "b": 5}, "a", None),
    ],
)
def test_a_full_queue_makes_room_at_the_cost_of_whoever_has_most(lines, newcomer, displaced):
    queue = filled(**{name: [1.0] * count for name, count in lines.items()})
    victim = queue.excess(Waiting(newcomer, 1.0, 1e9))
    assert (victim and victim.tenant) == displaced
    if victim is not None:
        assert victim.since == lines[victim.tenant] - 1


def test_a_low_priority_makes_room_for_a_higher_one():
    queue = filled(low=[1.0])
    for _ in range(9):
        queue.push(Waiting("high", 1.0, 0.0, priority=1))
    assert queue.excess(Waiting("high", 1.0, 1.0, priority=1)).tenant == "low"
    assert queue.excess(Waiting("lower", 1.0, 1.0, priority=-1)) is None
