"""Predictions that do not come true cost a replica its credit, and those that do win it back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.core.trust import Trust, discounted, in_engine_tokens


def test_what_comes_true_is_trusted_wholly() -> None:
    trust = Trust()
    for _ in range(100):
        assert not trust.learn(0, 4000, 3950)  # less than a block or so
    assert trust.factors == {}
    assert trust.share_come_true(0) == 1
    assert trust.share_come_true(1) is None


def test_what_does_not_is_discounted_and_forgiven() -> None:
    trust = Trust()
    for _ in range(100):
        trust.learn(0, 4000, 1000)
    assert 0.2 < trust.factors[0] < 0.35
    for _ in range(500):
        trust.learn(0, 4000, 4000)
    assert 0 not in trust.factors
    trust.learn(1, 4000, 2000)
    trust.remove(1)
    assert trust.factors == {}


def test_a_few_wrong_ones_change_little() -> None:
    trust = Trust()
    trust.learn(0, 1000, 200)
    assert trust.factors.get(0, 1.0) > 0.95


def test_nothing_at_all_thrice_in_a_row_is_an_empty_cache() -> None:
    trust = Trust()
    assert not trust.learn(0, 4000, 0)
    assert not trust.learn(0, 4000, 4000)
    assert not trust.learn(0, 4000, 0)
    assert not trust.learn(0, 4000, 0)
    assert not trust.learn(0, 100, 0)  # too little to tell: the run ends
    assert not trust.learn(0, 4000, 0)
    assert not trust.learn(0, 4000, 0)
    assert trust.learn(0, 4000, 0)
    assert not trust.learn(0, 4000, 0)


def test_predictions_are_put_in_the_engine_s_tokens() -> None:
    assert in_engine_tokens(500, 1000, 2000) == 1000
    assert in_engine_tokens(0, 0, 10) == 0


@given(st.lists(st.tuples(st.floats(-10, 1e6), st.floats(-10, 1e6)), max_size=50))
def test_factors_are_shares(samples: list[tuple[float, float]]) -> None:
    trust = Trust()
    for predicted, cached in samples:
        trust.learn(0, predicted, cached)
        assert all(0 < factor < 1 for factor in trust.factors.values())


HELD = st.lists(st.tuples(st.floats(1, 1e6), st.integers(1, 4)), max_size=6)


@given(HELD, st.dictionaries(st.integers(0, 23), st.floats(0.01, 0.97), max_size=5))
def test_a_discount_changes_only_whom_it_concerns(
    raw: list[tuple[float, int]], factors: dict[int, float]
) -> None:
    held, first = [], 0
    for tokens, count in sorted(raw, reverse=True):
        held.append((tokens, tuple(range(first, first + count))))
        first += count
    before = {p: tokens for tokens, positions in held for p in positions}
    out = discounted(held, factors)
    after = {p: tokens for tokens, positions in out for p in positions}
    assert after == {p: tokens * factors.get(p, 1.0) for p, tokens in before.items()}
    assert [tokens for tokens, _ in out] == sorted((t for t, _ in out), reverse=True)
    assert sum(len(positions) for _, positions in out) == len(before)
    if not factors:
        assert out == held
