"""Deadlines: who is late is told once and in time, and who has long to go costs little."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from router.deadlines import SWEEP_S, TICK_S, Deadlines

_SLACK_S = 1e-6


class Clock:
    """The time, and the timers that only its passing sets off."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, Callable[[], object]]] = []

    def call_later(self, delay: float, callback: Callable[[], object], /) -> None:
        self._timers.append((self.now + delay, callback))

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while due := sorted((t for t in self._timers if t[0] <= until), key=lambda t: t[0]):
            self._timers.remove(due[0])
            self.now = due[0][0]
            due[0][1]()
        self.now = until

    @property
    def is_idle(self) -> bool:
        return not self._timers

    def deadlines(self) -> Deadlines:
        return Deadlines(loop=self, now=lambda: self.now)


class Waiting:
    """Counts how often anybody asks since when it waits."""

    def __init__(self, clock: Clock, patience_s: float) -> None:
        self._clock = clock
        self._since = clock.now
        self.patience_s = patience_s
        self.looks = 0
        self.late_at: list[float] = []

    @property
    def since(self) -> float:
        self.looks += 1
        return self._since

    @since.setter
    def since(self, value: float) -> None:
        self._since = value

    @property
    def due(self) -> float:
        return self._since + self.patience_s

    def expired(self) -> None:
        self.late_at.append(self._clock.now)


_STEPS = st.lists(
    st.tuples(
        st.floats(0, 5),
        st.sampled_from(("heard", "patience", "nothing")),
        st.sampled_from((0.01, 0.2, 0.9, 1.5, 2.5, 30.0, inf)),
    ),
    max_size=12,
)


@given(st.lists(st.tuples(st.sampled_from((0.01, 0.3, 3.0, 60.0, inf)), _STEPS), max_size=5))
def test_whoever_is_late_is_told_once_and_in_time(
    lives: list[tuple[float, list[tuple[float, str, float]]]],
) -> None:
    for patience_s, steps in lives:
        clock = Clock()
        deadlines = clock.deadlines()
        one = Waiting(clock, patience_s)
        deadlines.watch(one)
        may_take_s = TICK_S
        for seconds, what, value in steps:
            due = one.due
            clock.advance(seconds)
            if one.late_at:
                assert due <= one.late_at[0] <= due + may_take_s + _SLACK_S
                break
            assert clock.now <= due + may_take_s + _SLACK_S
            if what == "heard":
                one.since = clock.now
            elif what == "patience":
                one.since, one.patience_s = clock.now, value
            # Put forward: it may be noticed by the next sweep only.
            if one.due < due:
                may_take_s = SWEEP_S + 2 * TICK_S
        clock.advance(100.0)
        assert len(one.late_at) == (one.due < inf)
        assert len(deadlines) == (one.due == inf)


def test_who_has_long_to_go_is_looked_at_once_in_a_while() -> None:
    clock = Clock()
    deadlines = clock.deadlines()
    crowd = [Waiting(clock, patience_s) for patience_s in (75.0, 600.0, inf)]
    for one in crowd:
        deadlines.watch(one)
    clock.advance(60.0)
    assert max(one.looks for one in crowd) < 70
    assert not any(one.late_at for one in crowd)


def test_who_is_forgotten_is_never_late_and_then_nothing_ticks() -> None:
    clock = Clock()
    deadlines = clock.deadlines()
    near, far = Waiting(clock, 0.2), Waiting(clock, 10.0)
    for one in (near, far):
        deadlines.watch(one)
    clock.advance(0.1)
    for one in (near, far):
        deadlines.forget(one)
    assert len(deadlines) == 0
    clock.advance(60.0)
    assert not near.late_at
    assert not far.late_at
    assert clock.is_idle


def test_an_end_that_ends_another_leaves_it_alone() -> None:
    clock = Clock()
    deadlines = clock.deadlines()

    class Ends(Waiting):
        other: Waiting

        def expired(self) -> None:
            super().expired()
            deadlines.forget(self.other)

    pair = Ends(clock, 0.2), Ends(clock, 0.2)
    pair[0].other, pair[1].other = pair[1], pair[0]
    for one in pair:
        deadlines.watch(one)
    clock.advance(1.0)
    assert len(pair[0].late_at) + len(pair[1].late_at) == 1
