from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.core.auth_failures import AuthFailures


@given(st.integers(1, 100), st.lists(st.floats(0, 5), min_size=1, max_size=300))
def test_no_minute_has_more_failures_than_twice_the_allowance(per_minute, gaps):
    failures = AuthFailures(per_minute)
    now, allowed = 0.0, []
    for gap in gaps:
        now += gap
        if not failures.wait_s("a", now):
            failures.failed("a", now)
            allowed.append(now)
    # A full bucket, and what flows in meanwhile.
    assert all(sum(at <= t < at + 60 for t in allowed) <= 2 * per_minute for at in allowed)
    assert len(allowed) >= min(len(gaps), per_minute)


def test_waiting_as_long_as_told_is_enough_and_less_is_not():
    failures = AuthFailures(6)
    for _ in range(6):
        failures.failed("a", 0.0)
    wait_s = failures.wait_s("a", 0.0)
    assert wait_s == 10.0
    assert failures.wait_s("a", wait_s - 0.01) > 0
    assert failures.wait_s("a", wait_s + 0.01) == 0.0
    assert failures.wait_s("b", 0.0) == 0.0


def test_however_many_fail_the_debt_and_the_memory_are_bounded():
    failures = AuthFailures(6)
    for _ in range(1000):
        failures.failed("a", 0.0)
    assert failures.wait_s("a", 0.0) <= 20.0
    for n in range(20_000):
        failures.failed(f"{n}", 1.0)
    assert len(failures._used) == 10_000


def test_nothing_is_limited_where_the_setting_is_0():
    failures = AuthFailures(0)
    failures.failed("a", 0.0)
    assert failures.wait_s("a", 0.0) == 0.0
