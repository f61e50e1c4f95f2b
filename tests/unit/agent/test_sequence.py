"""Numbers of batches: what follows, what is missing, and what is another process."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.core.sequence import Sequence


def test_the_words_of_a_new_process() -> None:
    sequence = Sequence()
    for number in range(3):
        assert sequence.judge(number, b"%d" % number) == "next"
        sequence.accept(number, b"%d" % number)
    assert sequence.judge(1, b"1") == "again"
    assert sequence.judge(1, b"another") == "restart"
    assert sequence.judge(5, b"5") == "gap"
    sequence.restart()
    assert sequence.last is None
    assert sequence.judge(0, b"another") == "next"


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 30))
def test_any_order_of_one_process_is_never_taken_for_another(order: list[int], sent: int) -> None:
    sequence, applied = Sequence(), []
    for number in (n % sent for n in order):
        verdict = sequence.judge(number, b"%d" % number)
        assert verdict != "restart" or number not in applied
        if verdict in ("next", "gap"):
            applied.append(number)
            sequence.accept(number, b"%d" % number)
    assert applied == sorted(set(applied))
