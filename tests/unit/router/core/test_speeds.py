from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.speeds import RAMP_S, Speeds


def taught(true, samples=400, seed=1, noise=0.0):
    """A fleet whose replicas need `true[slot]` times T(h, n) at 12,500 tokens/s, a = 32,768."""
    rng, speeds = random.Random(seed), Speeds()
    for slot in range(len(true)):
        speeds.add(slot, 0.0)
    for i in range(samples):
        slot = i % len(true)
        n = rng.uniform(200, 40_000)
        h = rng.choice((0.0, rng.uniform(0, n - 100)))
        took = true[slot] * truth(h, n) * rng.lognormvariate(0, noise)
        speeds.learn(slot, h, n, took)
        if i % 20 == 0:
            speeds.refresh(float(i))
    speeds.refresh(1e6)
    return speeds


def truth(h, n):
    return ((n - h) + (n * n - h * h) / 65_536) / 12_500


def test_a_fleet_is_known_to_a_few_percent():
    speeds = taught([1.0] * 4)
    for h, n in ((0, 1000), (0, 30_000), (20_000, 21_000)):
        assert speeds.prefill_s(0, h, n) == pytest.approx(truth(h, n), rel=0.05)


def test_with_noise_it_errs_slow():
    speeds = taught([1.0] * 4, samples=2000, noise=0.4)
    for slot in range(4):
        assert 1.0 < speeds.prefill_s(slot, 0, 10_000) / truth(0, 10_000) < 1.6


def test_a_slow_replica_is_told_from_the_others():
    speeds = taught([1.0, 1.0, 1.0, 2.5], samples=2000)
    ratio = speeds.prefill_s(3, 0, 10_000) / speeds.prefill_s(0, 0, 10_000)
    assert ratio == pytest.approx(2.5, rel=0.2)


def test_a_replica_never_seen_is_taken_to_be_as_the_others_are():
    speeds = taught([1.0, 1.0, 1.0], samples=600)
    speeds.add(9, 1e6)
    assert speeds.factor[9] == pytest.approx(speeds.factor[0], rel=0.02)


def test_one_absurd_sample_changes_little():
    speeds = taught([1.0] * 3, samples=600)
    before = speeds.prefill_s(0, 0, 10_000)
    speeds.learn(0, 0, 10_000, 900.0)
    speeds.refresh(1e6)
    assert before <= speeds.prefill_s(0, 0, 10_000) < before * 1.1


def test_few_tokens_of_its_own_weigh_less_than_the_fleet():
    speeds = taught([1.0] * 3, samples=600)
    speeds.add(7, 0.0)
    for _ in range(5):
        speeds.learn(7, 0, 10_000, 2 * truth(0, 10_000))
    speeds.refresh(1e6)
    assert 1.0 < speeds.factor[7] / speeds.factor[0] < 1.2


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.floats(0, 1e5),
            st.floats(0, 1e5),
            st.floats(allow_nan=True, allow_infinity=True),
        ),
        max_size=30,
    )
)
def test_whatever_is_measured_speeds_stay_positive_and_finite(samples):
    speeds = Speeds()
    for slot in range(3):
        speeds.add(slot, 0.0, 0.01)
    for slot, h, more, seconds in samples:
        speeds.learn(slot, h, h + more, seconds)
    speeds.refresh(1.0)
    for slot in range(3):
        assert 0 < speeds.prefill_s(slot, 0.0, 1000.0) < float("inf")


def test_who_appears_among_older_ones_is_ramped_up():
    speeds = Speeds()
    speeds.add(0, 0.0)
    speeds.add(1, 100.0)
    assert (speeds.slow[0], speeds.slow[1]) == (1, 2)
    speeds.refresh(100.0 + RAMP_S / 2)
    assert (speeds.slow[0], speeds.slow[1]) == (1, 1.5)
    speeds.refresh(100.0 + RAMP_S)
    assert (speeds.slow[0], speeds.slow[1]) == (1, 1)


def test_where_all_have_just_appeared_none_is_slower():
    speeds = Speeds()
    for slot in range(3):
        speeds.add(slot, 100.0)
    assert set(speeds.slow.values()) == {1.0}


def test_distance_is_what_people_say_until_it_is_measured_and_spikes_count_little():
    speeds = Speeds()
    speeds.add(0, 0.0, 0.08)
    assert speeds.rtt_s[0] == 0.08
    for _ in range(20):
        speeds.measured_rtt(0, 0.025)
    speeds.measured_rtt(0, 1.0)
    speeds.refresh(1.0)
    assert 0.025 < speeds.rtt_s[0] < 0.06


def test_who_is_gone_is_forgotten():
    speeds = taught([1.0, 1.0])
    version = speeds.version
    speeds.remove(1)
    speeds.learn(1, 0, 1000, 1.0)
    speeds.measured_rtt(1, 1.0)
    speeds.refresh(2.0)
    assert set(speeds.factor) == set(speeds.rtt_s) == {0}
    assert speeds.version > version
