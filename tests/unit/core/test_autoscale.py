"""autoscale: within the limits, quiet under a constant load, and where it should be in the end."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.core.autoscale import TOLERANCE, Scale, bounds, decide
from reconciler.core.signals import Load
from schemas.function import Scaling
from tests.unit.core.plants import bursts, run, steady


def scaling(**spec: Any) -> Scaling:
    base = {"maxReplicas": 8, "metric": "qps", "target": 10.0}
    return Scaling.model_validate(base | {"upscaleDelay": "10s", "downscaleDelay": "60s"} | spec)


METRICS = {"qps": 10.0, "concurrency": 4.0, "kvUsage": 0.8, "queueDepth": 2.0, "ttft": 1.0}
metrics = st.sampled_from(sorted(METRICS))
loads = st.builds(
    Load,
    requests_per_s=st.floats(0, 500),
    in_flight=st.integers(0, 500),
    waiting=st.integers(0, 500),
    kv_usage=st.none() | st.floats(0, 1),
    ttft_p95_s=st.none() | st.floats(0, 100),
)


@given(
    metric=metrics,
    low=st.integers(0, 3),
    high=st.integers(3, 9),
    seen=st.lists(st.tuples(st.none() | loads, st.integers(0, 9)), max_size=40),
    most=st.none() | st.integers(0, 5),
    first=st.integers(0, 20),
    standby=st.integers(0, 2),
)
def test_it_never_leaves_its_limits(metric, low, high, seen, most, first, standby):
    spec = scaling(
        minReplicas=low,
        maxReplicas=high,
        metric=metric,
        target=METRICS[metric],
        upscaleDelay="0s",
        downscaleDelay="0s",
        standbyReplicas=standby,
    )
    scale = Scale(first)
    least, limit = bounds(spec, most)
    assert least == low
    for now, (load, ready) in enumerate(seen):
        scale = decide(spec, scale, load, ready=min(ready, scale.replicas), most=most, now=now)
        assert least <= scale.replicas <= limit


@settings(max_examples=40, deadline=None)
@given(
    metric=metrics,
    per_s=st.integers(0, 30),
    first=st.integers(1, 8),
    low=st.integers(0, 2),
)
def test_under_a_constant_load_it_comes_to_rest(metric, per_s, first, low):
    spec = scaling(minReplicas=low, metric=metric, target=METRICS[metric])
    outcome = run(spec, steady(2200, per_s, 1.0), slots=5, first=first)
    settled = outcome.replicas[1500:]
    assert len(set(settled)) == 1
    assert len(outcome.changes) <= 24
    if not per_s:
        assert settled[0] == low


@settings(max_examples=40, deadline=None)
@given(per_s=st.integers(1, 70), first=st.integers(1, 8))
def test_requests_per_second_come_to_the_number_that_the_target_says(per_s, first):
    settled = run(scaling(), steady(600, per_s, 0.5), slots=20, first=first).replicas[-1]
    exact = ceil(per_s / 10.0)
    with_room = ceil(round(per_s / (10.0 * (1 - TOLERANCE)), 9))
    assert min(8, exact) <= settled <= min(8, with_room)


@pytest.mark.parametrize("metric", ["queueDepth", "ttft"])
def test_metrics_that_only_say_enough_or_not_find_the_number_and_keep_it(metric):
    # 12 requests/s of 1 s each need 12 slots: 3 replicas of 5.
    spec = scaling(metric=metric, target=METRICS[metric])
    up = run(spec, steady(2000, 12, 1.0), slots=5, first=1)
    down = run(spec, steady(2000, 12, 1.0), slots=5, first=8)
    assert up.replicas[-1] in (3, 4)
    assert down.replicas[-1] in (3, 4)
    # One mistake on the way down is how it learns, and its queue takes a step more to work off.
    assert len([c for c in down.changes if c[2] > c[1]]) <= 2


def test_a_short_peak_moves_nothing():
    arrivals = [*steady(100, 5, 0.5), *steady(8, 60, 0.5), *steady(200, 5, 0.5)]
    assert set(run(scaling(), arrivals, slots=40, window_s=1).replicas) == {1}


def test_a_short_lull_takes_nothing_away():
    arrivals = [*steady(100, 35, 0.5), *steady(50, 0, 0.5), *steady(100, 35, 0.5)]
    assert set(run(scaling(), arrivals, slots=40, first=4, window_s=1).replicas) == {4}


def test_it_goes_up_to_the_least_and_down_to_the_most_that_was_asked_for():
    spec, scale = scaling(), Scale(2)
    for now, rate in enumerate([80, 35, 60, *[80] * 8]):
        scale = decide(spec, scale, Load(float(rate)), ready=2, most=None, now=now)
    assert scale.replicas == 4
    assert scale.reason == "2 -> 4: 80 requests/s at 10 a replica"
    for now, rate in enumerate([5, 15, *[5] * 60], start=100):
        scale = decide(spec, scale, Load(float(rate)), ready=4, most=None, now=now)
    assert scale.replicas == 2


def test_what_sleeps_wakes_at_once_and_sleeps_again_after_its_delay():
    spec = scaling(minReplicas=0, upscaleDelay="300s")
    scale = decide(spec, Scale(0), Load(), ready=0, most=None, now=0.0)
    assert scale.replicas == 0
    scale = decide(spec, scale, Load(waiting=1), ready=0, most=None, now=1.0)
    assert (scale.replicas, scale.reason) == (1, "0 -> 1: 1 requests wait")
    for now in range(2, 63):
        scale = decide(spec, scale, Load(), ready=1, most=None, now=float(now))
        assert scale.replicas == (1 if now < 62 else 0)


def test_without_a_metric_it_only_sleeps_and_wakes():
    spec = Scaling.model_validate({"minReplicas": 0, "maxReplicas": 5, "downscaleDelay": "10s"})
    outcome = run(spec, [*steady(60, 0, 1.0), *steady(60, 9, 1.0), *steady(60, 0, 1.0)], slots=50)
    assert set(outcome.replicas) == {0, 1}
    assert outcome.replicas[59] == 0
    assert outcome.replicas[60] == 1
    assert outcome.replicas[-1] == 0


def test_while_nobody_can_tell_nothing_moves():
    scale = Scale(5)
    for now in range(10_000):
        scale = decide(scaling(), scale, None, ready=5, most=None, now=float(now))
    assert scale.replicas == 5


def test_standby_replicas_come_on_top_but_not_for_nobody():
    spec = scaling(minReplicas=0, standbyReplicas=2)
    assert run(spec, steady(300, 15, 0.5), slots=50).replicas[-1] == 4
    assert run(spec, steady(300, 0, 0.5), slots=50).replicas[-1] == 0


def test_a_quota_or_a_price_bounds_it_at_once():
    scale = decide(scaling(), Scale(6), None, ready=6, most=3, now=0.0)
    assert (scale.replicas, scale.reason) == (3, "6 -> 3: the limits are 1 to 3")


def test_queues_are_not_answered_twice_while_replicas_start():
    spec = scaling(metric="queueDepth", target=2.0, upscaleDelay="0s")
    scale = Scale(2)
    for now in range(60):
        scale = decide(spec, scale, Load(in_flight=10, waiting=40), ready=2, most=None, now=now)
    assert scale.replicas == 4


def test_over_a_day_of_bursts_it_saves_most_of_the_peak_and_few_wait():
    day = list(bursts(7200, quiet=4, busy=36, every_s=1800, long_s=600, hold_s=1.0))
    spec = scaling(target=6.0, upscaleDelay="15s", downscaleDelay="2m")
    outcome = run(spec, day, slots=10, start_s=30)
    peak = 6 * 7200 / 3600
    assert outcome.replica_hours < 0.65 * peak
    assert outcome.waited_s(0.5) == 0
    assert outcome.waited_s(0.95) < 60
    assert len(outcome.changes) <= 2 * 4 * 3
