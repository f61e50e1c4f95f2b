from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from router.core.record import chain
from router.core.replay import elsewhere, latest, measured, simulate
from router.core.rescore import Rule
from schemas.wire.decisions import Outcome
from schemas.wire.routing import Weights
from tests.unit.router.core.test_rescore import decision, one

BLOCK_TOKENS = 64.0
EXPECTED = Rule("expected-latency")


def asked(at: float, conversation: int, blocks: int, replicas: int = 4, **more):
    """A turn of a conversation whose prompt has so many blocks."""
    return decision(
        id=f"{at}-{conversation}",
        at=at,
        tokens=blocks * BLOCK_TOKENS,
        block_tokens=BLOCK_TOKENS,
        chain=chain([conversation * 100_000 + i for i in range(blocks)]),
        candidates=tuple(one(f"r{i}") for i in range(replicas)),
        **more,
    )


def conversations(count: int = 8, turns: int = 6, gap_s: float = 1.0):
    at, out = 0.0, []
    for turn in range(turns):
        for conversation in range(count):
            at += gap_s
            out.append(asked(at, conversation, 16 * (turn + 1)))
    return out


def under(records, rule, **more):
    return simulate(records, lambda _: rule, random.Random(1), **more)


def test_caches_are_worth_what_they_save():
    records = conversations()
    best, blind = under(records, EXPECTED), under(records, Rule("least-load"))
    assert best.requests == len(records)
    # Every turn holds all but its last sixteen blocks: 1+..+5 of 1+..+6 parts.
    assert best.hit_rate == pytest.approx(15 / 21, abs=0.01)
    assert best.hit_rate > blind.hit_rate
    assert best.mean_s < blind.mean_s


def test_a_rule_without_load_makes_a_hotspot():
    records = [asked(at * 0.01, 0, 400) for at in range(60)]
    greedy = under(records, Rule("expected-latency", Weights(load=0.0)))
    spread = under(records, Rule("least-load"))
    assert greedy.hotspot > spread.hotspot >= 1.0
    shared = [asked(at * 0.001, at, 400) for at in range(60)]
    assert under(shared, EXPECTED).hotspot == pytest.approx(1.0, abs=0.1)


def test_a_lone_request_takes_its_round_trip_and_its_prefill():
    (only,) = (asked(0.0, 1, 100, 1),)
    figures = under([only], EXPECTED)
    n = 100 * BLOCK_TOKENS
    assert figures.mean_s == pytest.approx(0.002 + n * only.p + n * n * only.q)
    assert figures.quantile_s(0.99) == figures.ttft_s[0]
    # The second waits for the first.
    pair = [only, replace(only, id="2", chain=chain([9] * 100))]
    assert under(pair, EXPECTED).ttft_s[1] == pytest.approx(2 * figures.mean_s - 0.002)


def test_a_replica_whose_cache_is_dear_is_no_slower_for_that():
    (plain,) = [asked(0.0, 1, 100, 1)]
    dear = replace(plain, candidates=(one("r0", factor=3.0, speed=1.0),))
    assert under([dear], EXPECTED).mean_s == under([plain], EXPECTED).mean_s
    slow = replace(plain, candidates=(one("r0", factor=3.0),))
    assert under([slow], EXPECTED).mean_s > 2 * under([plain], EXPECTED).mean_s


def test_a_small_cache_forgets():
    records = conversations(count=40)
    assert under(records, EXPECTED, cache_tokens=2000).hit_rate < under(records, EXPECTED).hit_rate
    assert under(records, EXPECTED, cache_tokens=0).hit_rate == 0


def test_sessions_stay_together_under_the_session_policy():
    records = [replace(r, session=int(r.id.rpartition("-")[2]) << 50) for r in conversations()]
    figures = under(records, Rule("session"))
    assert figures.hit_rate == pytest.approx(15 / 21, abs=0.01)


def test_what_happened_is_told_beside():
    done = Outcome(
        status=200, outcome="ok", ttft_s=0.5, duration_s=2.0, input_tokens=100, cached_tokens=25
    )
    records = [
        asked(0.0, 1, 10, outcome=done),
        asked(1.0, 1, 10, outcome=replace(done, ttft_s=0.1, cached_tokens=75)),
        asked(2.0, 1, 10, outcome=Outcome(status=503, outcome="upstream_error")),
        asked(3.0, 1, 10),
    ]
    told = measured(records)
    assert told.hit_rate == 0.5
    assert told.ttft_s == (0.1, 0.5)
    assert measured([]).hit_rate is None


def test_how_many_would_go_elsewhere_as_things_stood():
    kept = asked(0.0, 1, 10, chosen="r0")
    held = replace(
        kept, id="b", candidates=(one("r0"), one("r1", cached_tokens=600.0)), chosen="r1"
    )
    assert elsewhere([kept, held], lambda _: EXPECTED) == 0
    assert elsewhere([kept, held], lambda _: Rule("round-robin")) == 0.5
    assert elsewhere([], lambda _: EXPECTED) == 0


@given(st.permutations([(0.0, "a"), (1.0, "b"), (2.0, "c")]))
def test_records_are_ordered_by_time_and_each_counts_once(order):
    records = [replace(asked(at, 1, 1), id=name) for at, name in order]
    done = Outcome(status=200, outcome="ok")
    records += [replace(records[0], outcome=done), replace(records[1], id="f", forced=True)]
    kept = latest(records)
    assert [d.id for d in kept] == ["a", "b", "c"]
    assert next(d for d in kept if d.id == records[0].id).outcome == done


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 3), st.integers(0, 40)), max_size=30),
       st.sampled_from(["expected-latency", "linear", "session", "least-load", "round-robin", "random-two-choices"]))  # fmt: skip
def test_figures_are_sound_for_any_records(steps, policy):
    at, records = 0.0, []
    for wait, conversation, blocks in steps:
        at += wait
        records.append(asked(at, conversation, blocks))
    figures = under(records, Rule(policy))
    assert figures.requests == len(figures.ttft_s) == len(records)
    assert 0 <= figures.hit_rate < 1 or not records
    assert figures.hotspot >= 1 - 1e-9
    assert list(figures.ttft_s) == sorted(figures.ttft_s)
    assert all(t >= 0.002 for t in figures.ttft_s)
