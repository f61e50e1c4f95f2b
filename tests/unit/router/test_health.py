from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.core.health import (
    FAILURES_IN_A_ROW,
    FIRST_EJECTION_S,
    MAX_EJECTION_S,
    MAX_RETRY_AFTER_S,
    Breaker,
    kept_out,
)
from router.core.snapshot import Candidate, snapshot
from schemas.wire.routing import Arm, Function, Replica, RoutingTable, Tenant


def candidates(count: int) -> tuple[Candidate, ...]:
    replicas = tuple(Replica(id=f"r{i}", url="http://h:1") for i in range(count))
    function = Function(
        name="f",
        served_name="f",
        arms=(Arm(deployment="d", cluster="c", replicas=replicas),),
    )
    table = RoutingTable(generation=1, revision="", published_at=0.0, functions=(function,))
    return snapshot(table).candidates(function, Tenant(name="t"))


def test_it_takes_failures_in_a_row_to_be_kept_out():
    breaker = Breaker()
    for _ in range(FAILURES_IN_A_ROW - 1):
        breaker.failed(0.0, "failed")
        assert breaker.admits(0.0)
    breaker.succeeded()
    for _ in range(FAILURES_IN_A_ROW - 1):
        breaker.failed(0.0, "timeout")
    assert breaker.admits(0.0)
    breaker.failed(0.0, "failed")
    assert not breaker.admits(0.0)


def test_one_refused_connection_is_enough_and_each_time_lasts_longer():
    breaker, now, waits = Breaker(), 0.0, []
    for _ in range(12):
        breaker.failed(now, "refused")
        assert breaker.state(now) == "open"
        waits.append(breaker.until - now)
        now = breaker.until
        assert breaker.state(now) == "half-open"
    assert waits[:3] == [FIRST_EJECTION_S, 2 * FIRST_EJECTION_S, 4 * FIRST_EJECTION_S]
    assert max(waits) == MAX_EJECTION_S == waits[-1]
    breaker.succeeded()
    assert breaker.is_new


def test_half_open_lets_one_through_and_its_failure_closes_the_door_again():
    breaker = Breaker()
    breaker.failed(0.0, "refused")
    now = breaker.until
    assert breaker.admits(now)
    breaker.trying = True
    assert not breaker.admits(now)
    breaker.failed(now, "failed")
    assert breaker.state(now) == "open"


def test_late_failures_of_requests_under_way_do_not_extend_an_ejection():
    breaker = Breaker()
    breaker.failed(0.0, "refused")
    until = breaker.until
    for _ in range(50):
        breaker.failed(0.5, "failed")
    assert breaker.until == until


def test_a_health_check_revives_the_dead_but_not_who_fails_requests():
    dead, failing = Breaker(), Breaker()
    dead.failed(0.0, "probe")
    for _ in range(FAILURES_IN_A_ROW):
        failing.failed(0.0, "timeout")
    dead.probed()
    failing.probed()
    assert dead.admits(0.0)
    assert not failing.admits(0.0)


@given(st.floats(0, 1e6))
def test_an_engine_can_ask_for_rest_but_not_for_ever(seconds):
    breaker = Breaker()
    breaker.asked_for_rest(10.0, seconds)
    assert breaker.admits(10.0 + min(seconds, MAX_RETRY_AFTER_S))
    assert breaker.admits(10.0) == (seconds == 0 or 10.0 + seconds == 10.0)


KINDS = st.sampled_from(["fine", "dead", "failing", "resting"])


@given(st.lists(KINDS, min_size=1, max_size=9))
def test_suspicion_keeps_out_half_at_most_and_somebody_is_always_left(kinds):
    breakers = {}
    for number, kind in enumerate(kinds):
        if kind == "fine":
            continue
        breaker = breakers[f"r{number}"] = Breaker()
        if kind == "dead":
            breaker.failed(0.0, "refused")
        elif kind == "failing":
            for _ in range(FAILURES_IN_A_ROW):
                breaker.failed(0.0, "failed")
        else:
            breaker.asked_for_rest(0.0, 5.0)
    out = kept_out(candidates(len(kinds)), breakers, 0.0)
    dead = {f"r{i}" for i, kind in enumerate(kinds) if kind == "dead"}
    unwell = {f"r{i}" for i, kind in enumerate(kinds) if kind != "fine"}
    assert len(out) < len(kinds)
    assert out <= unwell
    if len(unwell) <= len(kinds) / 2:
        assert out == unwell
    elif len(dead) < len(kinds):
        assert out == dead
