from __future__ import annotations

import random
from collections import Counter
from random import Random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.endpoint_check import all_allowed, is_allowed
from router.core.pick import available, counted, effective_policy, pick
from router.core.retries import RetryBudget, is_retryable
from router.core.snapshot import snapshot
from schemas.routing_policy import PolicyName
from schemas.wire.routing import Arm, Function, Replica, RoutingTable, Tenant


def candidates(**arms: tuple[int, int]):
    """Of arms name=(weight, replicas)."""
    function = Function(
        name="f",
        served_name="f",
        arms=tuple(
            Arm(
                deployment=name,
                cluster="c",
                weight=weight,
                replicas=tuple(
                    Replica(id=f"{name}{i}", url=f"http://h:{i + 1}", max_concurrent=4)
                    for i in range(count)
                ),
            )
            for name, (weight, count) in arms.items()
        ),
    )
    table = RoutingTable(generation=1, revision="", published_at=0.0, functions=(function,))
    return snapshot(table).candidates(function, Tenant(name="t", models=("*",)))


LOADS = st.dictionaries(st.sampled_from([f"a{i}" for i in range(6)]), st.integers(0, 5))


@given(LOADS, st.integers(0, 1000), st.integers(), st.sampled_from(["a0", "a1", "zz"]))
def test_the_pick_is_available_and_for_least_load_minimal(loads, turn, seed, tried):
    pool = available(candidates(a=(100, 6)), loads, without={tried}, ejected={"a5"})
    assert all(loads.get(c.id, 0) < 4 for c in pool)
    assert not {tried, "a5"} & {c.id for c in pool}
    for policy in ("least-load", "round-robin", "random-two-choices", "expected-latency"):
        chosen = pick(pool, policy, loads, turn, random.Random(seed))
        assert (chosen is None) == (not pool)
        if chosen is None:
            continue
        assert chosen in pool
        if effective_policy(policy) == "least-load":
            assert loads.get(chosen.id, 0) == min(loads.get(c.id, 0) for c in pool)


@given(LOADS, st.integers())
def test_two_choices_never_takes_the_single_worst(loads, seed):
    pool = candidates(a=(100, 6))
    chosen = pick(pool, "random-two-choices", loads, 0, random.Random(seed))
    worst = max(loads.get(c.id, 0) for c in pool)
    if [loads.get(c.id, 0) for c in pool].count(worst) == 1:
        assert loads.get(chosen.id, 0) < worst


def test_round_robin_takes_turns_and_ties_are_spread():
    pool = candidates(a=(100, 3))
    chance = random.Random(1)
    turns = [pick(pool, "round-robin", {}, turn, chance).id for turn in range(6)]
    assert turns == ["a0", "a1", "a2"] * 2
    ties = Counter(pick(pool, "least-load", {}, 0, chance).id for _ in range(600))
    assert set(ties) == {"a0", "a1", "a2"}
    assert min(ties.values()) > 100


@given(st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_a_session_stays_on_its_replica_while_that_is_there(session, gone):
    pool, chance = candidates(a=(100, 6)), random.Random(1)

    def sent(among, pinned=None):
        return pick(among, "session", {}, 0, chance, session=session, pinned=pinned).id

    first = sent(pool)
    assert sent(pool[::-1]) == first
    assert sent(pool, pinned=f"a{gone}") == f"a{gone}"
    left = [c for c in pool if c.id != f"a{gone}"]
    if first != f"a{gone}":
        assert sent(left) == first
    assert sent(left, pinned=f"a{gone}") != f"a{gone}"
    # Without a session it goes by load.
    loads = {c.id: 3 for c in left}
    assert pick(pool, "session", loads, 0, chance, pinned="a0").id == f"a{gone}"


def test_policies_that_are_not_built_say_what_they_act_as():
    assert effective_policy("anything") == "least-load"
    for name in get_args(PolicyName):
        assert effective_policy(name) == name


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=300), st.sampled_from([0, 20, 100])
)
def test_retries_stay_within_their_budget(events, percent):
    budget = RetryBudget()
    now, requests, retries = 0.0, [], []
    for step, is_retry in events:
        now += step
        if not is_retry:
            budget.request(now)
            requests.append(now)
        elif budget.spend(now, percent):
            retries.append(now)
            # Never more than the reserve and the share of two whole windows.
            recent = [t for t in retries if t > now - 5]
            asked = [t for t in requests if t > now - 10]
            assert len(recent) <= budget.reserve + len(asked) * percent / 100 + 1


def test_a_spent_budget_recovers():
    budget = RetryBudget()
    assert sum(budget.spend(100.0, 20) for _ in range(50)) == 10
    assert budget.spend(111.0, 20)


def test_what_may_be_tried_elsewhere():
    assert all(is_retryable(status) for status in (429, 502, 503))
    assert not any(is_retryable(status) for status in (200, 400, 404, 500, 504))
    assert is_retryable(500, b'{"error":"cannot schedule new futures after shutdown"}')


@pytest.mark.parametrize(
    ("address", "cidrs", "allowed"),
    [
        ("127.0.0.1", (), True),
        ("10.1.2.3", (), True),
        ("169.254.169.254", (), False),
        ("::ffff:169.254.169.254", (), False),
        ("fe80::1%eth0", (), False),
        ("fd00:ec2::254", (), False),
        ("0.0.0.0", (), False),
        ("10.1.2.3", ("10.0.0.0/8",), True),
        ("11.1.2.3", ("10.0.0.0/8", "fd00::/8"), False),
        ("::ffff:10.1.2.3", ("10.0.0.0/8",), True),
    ],
)
def test_addresses_an_endpoint_may_have(address, cidrs, allowed):
    assert is_allowed(address, cidrs) is allowed


def test_one_bad_address_condemns_a_name():
    assert not all_allowed(["10.0.0.1", "169.254.169.254"], ())


@given(st.integers(1, 20), st.integers(1, 4), st.integers())
def test_routers_that_all_have_more_to_send_come_to_share_a_replica_evenly(most, count, seed):
    # Chance itself, not a choice of Hypothesis's: whoever is never drawn gets nothing.
    random = Random(seed)
    own = [0] * count
    own[0] = most  # the first had it for itself
    for _ in range(60 * most * count):
        router = random.randrange(count)
        if own[router] and random.random() < 0.5:
            own[router] -= 1
        others = [n for n in own[:router] + own[router + 1 :] if n]
        if counted(own[router], sum(others), len(others), most) < most:
            own[router] += 1
    part = -(-most // count)
    assert sum(own) <= part * count
    assert min(own) >= min(part, 1) * (part - 1)
    assert max(own) <= part


def test_alone_a_router_may_use_all_of_a_replica():
    assert [counted(n, 0, 0, 4) for n in range(6)] == list(range(6))
    assert counted(7, 3, 1, 16) == 7
    assert counted(8, 3, 1, 16) == 11
