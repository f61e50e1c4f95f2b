from __future__ import annotations

import random
from array import array
from math import inf

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from router.core.score import (
    MANY,
    Fleet,
    Ranking,
    least,
    linear_signals,
    price,
    rendezvous,
    two_choices,
    weigh,
)
from schemas.wire.routing import Weights

NOW = 50.0
DEFAULT = Weights()
SECONDS = st.floats(0, 20)
P, Q = 1 / 12_500, 1 / (2 * 12_500 * 32_768)


@st.composite
def requests(draw):
    """(fleet, tokens, what the replicas hold)."""
    size = draw(st.integers(1, 12))

    def column(of):
        return draw(st.lists(of, min_size=size, max_size=size))

    floor = column(SECONDS)
    pending = column(st.booleans())
    fleet = Fleet(
        rtt_s=column(st.integers(0, 200_000).map(lambda us: us / 1e6)),
        slow=column(st.just(1.0)) if draw(st.booleans()) else column(st.floats(1, 3)),
        factor=column(st.just(1.0) | st.floats(0.3, 3)),
        p=P,
        q=Q,
        ready_at=[
            NOW + b if busy else -inf for b, busy in zip(column(SECONDS), pending, strict=True)
        ],
        floor_s=[f if busy else 0.0 for f, busy in zip(floor, pending, strict=True)],
        # As engines tell it: not of a size that vanishes beside everything.
        kv_used=column(st.integers(0, 10_000).map(lambda share: share / 10_000)),
        requests=column(st.integers(0, 40)),
        now=NOW,
    )
    tokens = draw(st.floats(64, 100_000))
    depth = column(st.sampled_from([0.0, 0.0, 0.2, 0.5, 0.99]))
    held = [
        (share * tokens, [i for i, d in enumerate(depth) if d == share])
        for share in (0.99, 0.5, 0.2)
        if share in depth
    ]
    return fleet, tokens, held


def prefill_s(fleet, i, h, n):
    return fleet.factor[i] * ((n - h) * P + (n**2 - h**2) * Q)


def by_the_book(fleet, n, held, pinned=None, weights=DEFAULT):
    """The rule as it is written, candidate by candidate: their scores and expected times."""
    h = {i: tokens for tokens, positions in held for i in positions}
    every = range(len(fleet))
    pending_s = [
        0.0 if at == -inf else max(at - fleet.now, floor)
        for at, floor in zip(fleet.ready_at, fleet.floor_s, strict=True)
    ]
    cold_s = n * P + n**2 * Q
    rho = sum(min(cold_s, x) for x in pending_s) / (cold_s * len(fleet))
    lam = 0.5 + 1.5 * min(0.9, rho) / (1 - min(0.9, rho))
    cold = max(prefill_s(fleet, i, 0, n) for i in every)
    prefill = [prefill_s(fleet, i, h.get(i, 0), n) for i in every]
    saved = [(1 + lam) * (cold - t) for t in prefill]
    backlog = [max(fleet.ready_at[i] - NOW, fleet.floor_s[i]) for i in every]
    wait = [
        (backlog[i] + prefill[i]) * fleet.slow[i] - prefill[i] + fleet.kv_used[i] for i in every
    ]
    horizon = max(*saved, *(w * 0.35 / 0.25 for w in wait), *(r * 0.35 / 0.15 for r in fleet.rtt_s))
    horizon = horizon or 1.0
    scores = []
    for i in every:
        k = saved[i] / horizon
        s = min(1.0, 0.3 / (horizon * 0.25 / 0.35)) if i == pinned else 0.0
        load = 1 - wait[i] / (horizon * 0.25 / 0.35)
        near = 1 - fleet.rtt_s[i] / (horizon * 0.15 / 0.35)
        scores.append(
            weights.kv_cache * k
            + weights.session * s
            + weights.load * load
            + weights.latency * near
        )
    times = [fleet.rtt_s[i] + wait[i] + (1 + lam) * prefill[i] for i in every]
    return scores, times, horizon


@given(requests())
def test_the_best_score_is_the_least_expected_time(request_):
    fleet, n, held = request_
    ranking = Ranking(fleet, n, held)
    scores, times, _ = by_the_book(*request_)
    best = least(ranking.costs_s, random.Random(0))
    assert times[best] == pytest.approx(min(times), rel=1e-9, abs=1e-9)
    assert scores[best] == pytest.approx(max(scores), rel=1e-9, abs=1e-9)
    assert ranking.costs_s == pytest.approx(times, rel=1e-9, abs=1e-9)


def many(fleet, held):
    """So many of the same that they are weighed by columns; and as lists, one by one."""
    times = MANY // len(fleet) + 1
    names = ("rtt_s", "slow", "factor", "ready_at", "floor_s", "kv_used")
    columns = {name: list(getattr(fleet, name)) * times for name in names}
    size = len(fleet)
    more = [(h, tuple(i + size * turn for turn in range(times) for i in at)) for h, at in held]
    requests_ = list(fleet.requests) * times
    same = {"p": fleet.p, "q": fleet.q, "requests": requests_, "now": fleet.now}
    one_by_one = Fleet(**columns, **same)
    by_column = Fleet(**{n: array("d", c) for n, c in columns.items()}, **same)
    return one_by_one, by_column, more


@given(requests(), st.none() | st.integers(0, 200))
def test_many_are_weighed_as_few_are(request_, pinned):
    fleet, n, held = request_
    one_by_one, by_column, more = many(fleet, held)
    if pinned is not None:
        pinned %= len(one_by_one)
    few = Ranking(one_by_one, n, more, pinned=pinned)
    ranking = Ranking(by_column, n, more, pinned=pinned)
    assert ranking.price == pytest.approx(few.price)
    assert list(ranking.costs_s) == pytest.approx(few.costs_s, rel=1e-9, abs=1e-9)
    best = ranking.least(random.Random(0))
    assert few.costs_s[best] == pytest.approx(min(few.costs_s), rel=1e-9, abs=1e-9)
    assert ranking.horizon_s == pytest.approx(few.horizon_s)
    assert ranking.signals(best) == pytest.approx(few.signals(best), rel=1e-6, abs=1e-6)


def test_of_many_equals_each_gets_its_share():
    fleet = idle(4)
    _, by_column, _ = many(fleet, [])
    ranking, chance = Ranking(by_column, 4000.0, []), random.Random(3)
    seen = {ranking.least(chance) for _ in range(2000)}
    assert len(seen) == len(by_column) >= MANY


WEIGHT = st.floats(0.05, 3)


@given(
    requests(),
    st.builds(Weights, kv_cache=WEIGHT, session=WEIGHT, load=WEIGHT, latency=WEIGHT),
    st.integers(0, 11),
)
def test_the_choice_is_the_books_at_any_weights_and_with_a_pin(request_, weights, pinned):
    fleet, n, held = request_
    assume(pinned < len(fleet))
    ranking = Ranking(fleet, n, held, pinned=pinned, weights=weights)
    scores, _, horizon = by_the_book(fleet, n, held, pinned, weights)
    best = least(ranking.costs_s, random.Random(0))
    assert scores[best] == pytest.approx(max(scores), abs=1e-9)
    assert ranking.horizon_s == pytest.approx(horizon)
    for i in range(len(fleet)):
        assert ranking.score(i) == pytest.approx(scores[i], abs=1e-9)


@given(requests(), st.integers(0, 11))
def test_every_signal_is_a_share(request_, pinned):
    fleet, n, held = request_
    ranking = Ranking(fleet, n, held, pinned=pinned if pinned < len(fleet) else None)
    for i in range(len(fleet)):
        assert all(-1e-9 <= signal <= 1 + 1e-9 for signal in ranking.signals(i))


@given(requests(), st.integers(0, 11), st.floats(0.01, 5))
def test_what_speaks_against_a_replica_never_helps_it(request_, i, more):
    fleet, n, held = request_
    assume(i < len(fleet))
    rho = fleet.rho(n)
    before = Ranking(fleet, n, held, rho=rho).costs_s[i]

    def after(**changed):
        columns = {
            name: getattr(fleet, name)
            for name in (
                "rtt_s", "slow", "factor", "p", "q", "ready_at", "floor_s", "kv_used", "requests", "now",
            )
        }  # fmt: skip
        for name, value in changed.items():
            columns[name] = [value if j == i else old for j, old in enumerate(columns[name])]
        return Ranking(Fleet(**columns), n, held, rho=rho).costs_s[i]

    slack = before - 1e-9
    assert after(rtt_s=fleet.rtt_s[i] + more) > slack
    assert after(slow=fleet.slow[i] + more) > slack
    assert after(factor=fleet.factor[i] + more) > slack
    assert after(ready_at=max(fleet.ready_at[i], NOW) + more) > slack
    assert after(floor_s=fleet.floor_s[i] + more) > slack
    assert after(kv_used=fleet.kv_used[i] + more) > slack
    bare = [(tokens, [j for j in positions if j != i]) for tokens, positions in held]
    assert Ranking(fleet, n, bare, rho=rho).costs_s[i] > slack


@given(st.floats(0, 1, allow_subnormal=False), st.floats(0, 1))
def test_saved_work_is_dearer_the_busier_the_fleet(one, other):
    assert (
        1.5
        <= price(min(one, other))
        <= price(max(one, other))
        == price(max(one, other))
        <= 15 + 1e-9
    )


def idle(size, **columns):
    every = {
        "rtt_s": [0.0] * size, "slow": [1.0] * size, "factor": [1.0] * size, "p": P, "q": Q,
        "ready_at": [-inf] * size, "floor_s": [0.0] * size, "kv_used": [0.0] * size,
        "requests": [0] * size, "now": NOW,
    }  # fmt: skip
    return Fleet(**{**every, **columns})


def test_a_prefix_that_everybody_shares_herds_nobody():
    # A binary hit and clipped headroom send every conversation to whoever has block 0.
    chance, counts = random.Random(4), [0] * 8
    ready, floor = [-inf] * 8, [0.0] * 8
    for _ in range(400):
        fleet = idle(8, ready_at=ready, floor_s=floor)
        held = [(512.0, [0])]
        i = least(Ranking(fleet, 12_000.0, held).costs_s, chance)
        counts[i] += 1
        ready[i] = max(ready[i], NOW) + 1.0
        floor[i] = max(0.0, ready[i] - NOW - 1.0)
    assert max(counts) <= 60


def test_the_session_decides_between_equals_and_never_above_load():
    assert least(Ranking(idle(4), 4000.0, [], pinned=2).costs_s, random.Random(1)) == 2
    busy = idle(4, ready_at=[-inf, -inf, NOW + 2.0, -inf])
    assert least(Ranking(busy, 4000.0, [], pinned=2).costs_s, random.Random(1)) != 2


def test_equals_share_evenly():
    chance = random.Random(2)
    counts = [0] * 5
    for _ in range(2000):
        counts[least([1.0, 0.5, 0.5, 2.0, 0.5], chance)] += 1
    assert counts[0] == counts[3] == 0
    assert min(counts[1], counts[2], counts[4]) > 550


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers())
def test_least_and_two_choices(costs, seed):
    assert costs[least(costs, random.Random(seed))] == min(costs)
    chosen = two_choices(costs, random.Random(seed))
    assert len(costs) == 1 or costs.count(max(costs)) > 1 or costs[chosen] < max(costs)


@given(requests())
def test_linear_is_the_plain_four(request_):
    fleet, n, held = request_
    signals = linear_signals(fleet, n, held, pinned=0)
    h = {i: tokens for tokens, positions in held for i in positions}
    for i, (kv_cache, session, load, latency) in enumerate(signals):
        assert kv_cache == pytest.approx(h.get(i, 0) / n)
        assert session == (i == 0)
        assert 0 <= latency <= 1
        assert load == pytest.approx(1 - fleet.requests[i] / 16)
    assert weigh(signals[0], Weights(kv_cache=0, session=1, load=0, latency=0)) == 1


@given(
    st.integers(0, (1 << 64) - 1), st.lists(st.integers(0, (1 << 64) - 1), min_size=2, unique=True)
)
def test_when_a_replica_goes_only_its_sessions_move(session, keys):
    chosen = keys[rendezvous(session, keys)]
    for gone in keys:
        left = [key for key in keys if key != gone]
        if gone != chosen:
            assert left[rendezvous(session, left)] == chosen


def test_sessions_spread_evenly():
    rng = random.Random(5)
    keys = [rng.getrandbits(64) for _ in range(8)]
    counts = [0] * 8
    for _ in range(8000):
        counts[rendezvous(rng.getrandbits(64), keys)] += 1
    assert 850 < min(counts) <= max(counts) < 1150
