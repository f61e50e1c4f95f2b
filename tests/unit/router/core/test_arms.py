from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.arms import by_session, is_shadowed
from router.core.snapshot import snapshot
from schemas.wire.routing import Arm, Function, Replica, RoutingTable, Tenant

SESSIONS = st.integers(0, 2**64 - 1)
WEIGHTS = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 1000), min_size=1)
MANY = range(1, 2**64, 2**64 // 4000)


def candidates(weights: dict[str, int], replicas: int = 2):
    arms = tuple(
        Arm(
            deployment=name,
            cluster="c",
            weight=weight,
            replicas=tuple(
                Replica(id=f"{name}{i}", url=f"http://h:{i + 1}") for i in range(replicas)
            ),
        )
        for name, weight in weights.items()
    )
    function = Function(name="f", served_name="f", arms=arms)
    table = RoutingTable(generation=1, revision="", published_at=0.0, functions=(function,))
    return snapshot(table).candidates(function, Tenant(name="t", models=("*",)))


def arm_of(weights: dict[str, int], session: int) -> str | None:
    return by_session(candidates(weights), session)


def shares(weights: dict[str, int]) -> Counter[str]:
    pool = candidates(weights, replicas=1)
    return Counter(by_session(pool, session) for session in MANY)


@given(WEIGHTS, SESSIONS)
def test_a_session_stays_on_one_arm_that_has_a_weight(weights, session):
    arm = arm_of(weights, session)
    assert arm == arm_of(dict(reversed(weights.items())), session)
    assert (arm is None) == (not any(weights.values()))
    assert arm is None or weights[arm] > 0


@given(WEIGHTS, SESSIONS, st.sampled_from("abcde"), st.integers(1, 1000))
def test_more_weight_only_draws_sessions_to_that_arm(weights, session, name, more):
    heavier = {**weights, name: weights.get(name, 0) + more}
    before, after = arm_of(weights, session), arm_of(heavier, session)
    assert after in (before, name)


@given(WEIGHTS, SESSIONS, st.sampled_from("abcde"))
def test_an_arm_that_goes_away_moves_its_own_sessions_alone(weights, session, name):
    left = {arm: weight for arm, weight in weights.items() if arm != name}
    if not left:
        return
    before = arm_of(weights, session)
    if before != name:
        assert arm_of(left, session) == before


def test_weights_are_shares_of_the_sessions():
    seen = shares({"stable": 90, "canary": 10})
    assert seen["canary"] / seen.total() == pytest.approx(0.10, abs=0.015)
    seen = shares({"a": 1, "b": 2, "c": 1})
    assert seen["b"] / seen.total() == pytest.approx(0.5, abs=0.03)


def test_a_canary_moves_only_what_it_gains():
    pools = [candidates({"stable": 100 - n, "canary": n}, 1) for n in (10, 25)]
    moved = sum(by_session(pools[0], session) != by_session(pools[1], session) for session in MANY)
    assert moved / len(MANY) == pytest.approx(0.15, abs=0.02)


def test_only_weights_that_somebody_set_divide():
    def divided(weights, **more):
        arms = tuple(Arm(deployment=d, cluster="c", weight=w, **more) for d, w in weights.items())
        function = Function(name="f", served_name="f", arms=arms)
        table = RoutingTable(generation=1, revision="", published_at=0.0, functions=(function,))
        return "f" in snapshot(table).divided

    assert not divided({"eu": 100, "us": 100})
    assert divided({"eu": 50, "us": 50})
    assert divided({"stable": 100, "canary": 10})
    assert divided({"off": 0})
    assert not divided({"next": 7}, shadow_percent=5.0)


def test_weight_zero_serves_nobody_even_when_it_is_alone():
    assert by_session(candidates({"a": 0}), 1) is None
    assert by_session((), 1) is None


@given(SESSIONS, st.floats(0, 100), st.floats(0, 100))
def test_a_higher_shadow_share_adds_sessions_and_takes_none(session, one, other):
    low, high = sorted((one, other))
    assert is_shadowed(session, "next", high) or not is_shadowed(session, "next", low)
    assert is_shadowed(session, "next", 100)
    assert not is_shadowed(session, "next", 0)


def test_shadows_are_a_share_of_every_arms_sessions():
    pool = candidates({"stable": 50, "canary": 50}, 1)
    seen = Counter(
        by_session(pool, session) for session in MANY if is_shadowed(session, "next", 20)
    )
    assert seen.total() / len(MANY) == pytest.approx(0.2, abs=0.02)
    assert seen["stable"] / seen.total() == pytest.approx(0.5, abs=0.06)
