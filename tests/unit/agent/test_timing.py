from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.simulated.timing import TimeModel

lengths = st.integers(0, 200_000)


@given(st.lists(lengths, min_size=2, max_size=8))
def test_chunks_of_a_prefill_add_up_to_the_whole(cuts: list[int]) -> None:
    cuts = sorted(cuts)
    model = TimeModel()
    chunked = sum(model.prefill_s(a, b) for a, b in itertools.pairwise(cuts))
    assert chunked == pytest.approx(model.prefill_s(cuts[0], cuts[-1]))


@given(lengths, lengths, st.integers(1, 1000))
def test_a_longer_prompt_takes_longer_and_a_longer_hit_less(
    hit: int, more: int, extra: int
) -> None:
    model = TimeModel()
    assert model.prefill_s(hit, hit + more + extra) > model.prefill_s(hit, hit + more)
    assert model.prefill_s(hit + extra, hit + more + extra) >= model.prefill_s(hit, hit + more)
    assert model.prefill_s(0, hit + more) >= model.prefill_s(hit, hit + more)


@given(st.integers(1, 500))
def test_a_larger_batch_slows_each_but_gives_more_in_all(batch: int) -> None:
    model = TimeModel()
    assert model.decode_s(batch + 1) > model.decode_s(batch)
    assert (batch + 1) / model.decode_s(batch + 1) > batch / model.decode_s(batch)


@given(st.floats(0.1, 1000), st.integers(0, 50), lengths)
def test_speed_divides_a_step(speed: float, batch: int, tokens: int) -> None:
    once = TimeModel().step_s([(0, tokens)], batch)
    assert TimeModel(speed=speed).step_s([(0, tokens)], batch) == pytest.approx(once / speed)
    assert TimeModel(speed=0).step_s([(0, tokens)], batch) == 0


def test_the_figures_mean_what_the_names_say() -> None:
    model = TimeModel(
        prefill_tokens_per_s=1000, attention_tokens=10_000, itl_s=0.01, itl_batch_size=10
    )
    assert model.prefill_s(0, 10) == pytest.approx(0.01, rel=0.001)
    # one token at the attention length costs twice what the first one does
    assert model.prefill_s(10_000, 10_001) == pytest.approx(0.002, rel=0.001)
    assert model.decode_s(10) == pytest.approx(0.02)
    assert model.decode_s(0) == 0


@pytest.mark.parametrize(
    "wrong",
    [{"prefill_tokens_per_s": 0}, {"itl_s": -1}, {"speed": float("nan")}, {"attention_tokens": -5}],
)
def test_impossible_figures_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TimeModel(**wrong)
