"""The waits between tries: growing, capped, spread."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.backoff import delay_s

unit = st.floats(0, 1)


def exact(failures: int) -> float:
    return delay_s(failures, base_s=0.5, cap_s=30, jitter_fraction=0, random_value=0.7)


def test_doubles_from_the_base_to_the_cap() -> None:
    assert [exact(n) for n in range(9)] == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]


@given(st.integers(-5, 10**9), st.floats(0.001, 10), st.floats(10, 3600), unit, unit)
def test_stays_within_its_bounds(
    failures: int, base_s: float, cap_s: float, jitter: float, value: float
) -> None:
    wait_s = delay_s(
        failures, base_s=base_s, cap_s=cap_s, jitter_fraction=jitter, random_value=value
    )
    full_s = delay_s(failures, base_s=base_s, cap_s=cap_s, jitter_fraction=0, random_value=0)
    assert 0 <= full_s * (1 - jitter) * 0.999999 <= wait_s <= full_s <= cap_s


@given(st.integers(0, 200), unit)
def test_never_shrinks_as_failures_grow(failures: int, value: float) -> None:
    def after(n: int) -> float:
        return delay_s(n, base_s=0.1, cap_s=60, jitter_fraction=0.3, random_value=value)

    assert after(failures) <= after(failures + 1)
