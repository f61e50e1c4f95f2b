"""signals: counters of many routers, whoever restarts, is missed, or falls silent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.signals import SILENT_S, Signals, Totals
from schemas.wire.signals import (
    BUCKETS,
    ArmSignals,
    FunctionSignals,
    RouterSignals,
    ttft_bound_s,
    ttft_bucket,
)


@given(st.floats(0, 300))
def test_a_time_is_in_its_bucket_to_ten_percent(seconds):
    bucket = ttft_bucket(seconds)
    assert 0 <= bucket < BUCKETS
    assert seconds <= ttft_bound_s(bucket) * 1.0001
    assert bucket == 0 or seconds >= ttft_bound_s(bucket) / 1.1001


def arm(attempts=0, failed=0, *, in_flight=0, digest="d1", deployment="chat", **more) -> ArmSignals:
    return ArmSignals(
        "f", deployment, "here", digest, attempts, failed, in_flight=in_flight, **more
    )


def say(*arms: ArmSignals, router="r", seq=1, waiting=None, full=False) -> RouterSignals:
    functions = () if waiting is None else (FunctionSignals("f", 0, waiting),)
    return RouterSignals(router=router, seq=seq, arms=arms, functions=functions, full=full)


def test_what_several_routers_count_is_one_sum_and_a_restart_adds_to_it():
    signals = Signals()
    signals.take(say(arm(10, 1)), 0.0)
    signals.take(say(arm(5), router="s"), 0.5)
    signals.take(say(arm(14, 2)), 1.0)
    assert signals.totals("chat", "here") == Totals(19, 2)
    signals.take(say(arm(3, 3)), 2.0)
    assert signals.totals("chat", "here") == Totals(22, 5)
    assert signals.totals("chat", "elsewhere") == Totals()


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1))
def test_messages_that_are_missed_lose_nothing_but_time(steps):
    heard, total = Signals(), 0
    for seq, (more, comes) in enumerate(steps):
        total += more
        if comes or seq == len(steps) - 1:
            heard.take(say(arm(total), seq=seq), float(seq))
    assert heard.totals("chat", "here").attempts == total


def test_templates_are_told_apart():
    signals = Signals()
    signals.take(say(arm(10, 0, digest="old"), arm(4, 4, digest="new")), 0.0)
    assert signals.totals("chat", "here", "new").error_percent == 100
    assert signals.totals("chat", "here", "old").error_percent == 0
    assert signals.totals("chat", "here").attempts == 14


def test_a_rate_is_of_what_began_also_before_it_has_ended():
    signals = Signals()
    signals.take(say(arm(0, in_flight=0)), 0.0)
    signals.take(say(arm(20, in_flight=30)), 10.0)
    load = signals.load("f", ["chat"], "here", 10.0, over_s=10.0)
    assert load is not None
    assert (load.requests_per_s, load.in_flight) == (5.0, 30)


def test_a_silent_router_carries_nothing_and_silence_of_all_says_nothing():
    signals = Signals()
    signals.take(say(arm(1, in_flight=7), waiting=3), 0.0)
    signals.take(say(arm(1, in_flight=2), router="s", waiting=1), 4.0)
    assert signals.waiting("f", 4.0) == 4
    both = signals.load("f", ["chat"], "here", 4.0, over_s=10)
    one = signals.load("f", ["chat"], "here", SILENT_S + 1, over_s=10)
    assert both is not None
    assert one is not None
    assert (both.in_flight, one.in_flight) == (9, 2)
    assert signals.load("f", ["chat"], "here", 4.1 + SILENT_S, over_s=10) is None


def test_what_is_not_told_again_stays_and_what_a_full_message_leaves_out_goes():
    signals = Signals()
    signals.take(say(arm(1, in_flight=7), waiting=2, full=True), 0.0)
    signals.take(say(seq=2), 1.0)
    assert signals.waiting("f", 1.0) == 2
    signals.take(say(seq=3, full=True), 2.0)
    load = signals.load("f", ["chat"], "here", 2.0, over_s=10)
    assert load is not None
    assert (load.in_flight, load.waiting) == (0, 0)
    assert signals.totals("chat", "here").attempts == 1


def test_percentiles_and_cache_hits_come_from_sums_over_routers():
    signals = Signals()
    fast, slow = ttft_bucket(0.1), ttft_bucket(2.0)
    signals.take(say(arm(90, ttft={fast: 90}, input_tokens=900, cached_tokens=900)), 0.0)
    more = arm(10, ttft={slow: 10}, input_tokens=900)
    signals.take(say(more, router="s"), 0.0)
    total = signals.totals("chat", "here")
    assert total.ttft_s(0.5) == pytest.approx(0.1, rel=0.1)
    assert total.ttft_s(0.95) == pytest.approx(2.0, rel=0.1)
    assert total.hit_ratio == 0.5
    assert Totals().ttft_s() is None
    assert Totals().hit_ratio is None


def test_what_engines_say_is_not_counted_once_for_each_router():
    signals = Signals()
    for router in ("r", "s"):
        signals.take(say(arm(queued=6, kv_usage=0.5, in_flight=4), router=router), 0.0)
    load = signals.load("f", ["chat"], "here", 0.0, over_s=10)
    assert load is not None
    assert (load.in_flight, load.queued, load.kv_usage) == (8, 6, 0.5)


def test_what_is_no_more_is_forgotten():
    signals = Signals()
    signals.take(say(arm(5)), 0.0)
    signals.forget(1.0, [("chat", "here")])
    assert signals.totals("chat", "here").attempts == 5
    signals.forget(1.0, [])
    assert signals.totals("chat", "here").attempts == 0
