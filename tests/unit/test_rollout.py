"""What is started and stopped next: examples of each rule, and whole rolls driven to their end."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.backends.local.rollout import Member, Room, Steps, decide
from reconciler.core.observed import Phase

READY, STARTING, FAILED = Phase.READY, Phase.STARTING, Phase.FAILED
NOT_READY, DRAINING = Phase.NOT_READY, Phase.DRAINING
PLENTY = Room(1000)


def member(name: str, phase: Phase, *, newest: bool = True, due: bool = False) -> Member:
    """`a3`: born third; older templates are written with newest=False."""
    return Member(
        id=name,
        newest=newest,
        phase=phase,
        order=int(name[1:]),
        proven=phase in (READY, NOT_READY),
        due=due,
    )


def step(
    wanted: int,
    members: Sequence[Member],
    *,
    surge: int = 1,
    blue: bool = False,
    room: Room = PLENTY,
) -> Steps:
    return decide(wanted, members, max_surge=surge, blue_green=blue, room=room)


def test_a_fresh_workload_starts_all_at_once() -> None:
    assert step(3, []) == Steps(start=3)


def test_what_is_as_wanted_is_left_alone() -> None:
    assert step(2, [member("a1", READY), member("a2", READY)]) == Steps()


def test_scaling_down_stops_failed_then_starting_then_youngest() -> None:
    members = [
        member("a1", READY),
        member("a2", READY),
        member("a3", STARTING),
        member("a4", FAILED),
        member("a5", NOT_READY),
    ]
    assert step(2, members).stop == ("a4", "a3", "a5")
    assert step(1, members).stop == ("a4", "a3", "a5", "a2")
    assert set(step(0, members).stop) == {"a1", "a2", "a3", "a4", "a5"}


def test_a_draining_replica_counts_for_nothing() -> None:
    assert step(1, [member("a1", DRAINING)]) == Steps(start=1)


def test_a_roll_starts_its_surge_and_stops_nothing() -> None:
    old = [member(f"o{i}", READY, newest=False) for i in range(3)]
    assert step(3, old, surge=2) == Steps(start=2)


def test_a_ready_newcomer_replaces_the_oldest() -> None:
    old = [member(f"o{i}", READY, newest=False) for i in range(3)]
    steps = step(3, [*old, member("n9", READY)])
    assert steps.stop == ("o0",)
    assert steps.start == 1


def test_blue_green_waits_for_all_and_then_stops_all() -> None:
    old = [member(f"o{i}", READY, newest=False) for i in range(2)]
    assert step(2, old, blue=True) == Steps(start=2)
    assert step(2, [*old, member("n8", READY), member("n9", STARTING)], blue=True) == Steps()
    done = [*old, member("n8", READY), member("n9", READY)]
    assert step(2, done, blue=True).stop == ("o0", "o1")


def test_a_template_superseded_before_it_was_ready_goes_at_once() -> None:
    members = [member("o1", READY, newest=False), member("m2", STARTING, newest=False)]
    assert step(1, members) == Steps(start=1, stop=("m2",))


def test_reverting_keeps_the_running_ones_and_stops_the_surge() -> None:
    members = [member("a1", READY), member("a2", READY), member("b3", READY, newest=False)]
    assert step(2, members) == Steps(stop=("b3",))


def test_a_failing_newcomer_leaves_the_old_ones_serving() -> None:
    old = [member(f"o{i}", READY, newest=False) for i in range(2)]
    assert step(2, [*old, member("n3", FAILED)]) == Steps()
    assert step(2, [*old, member("n3", FAILED, due=True)]) == Steps(restart=("n3",))


def test_a_crashed_old_one_comes_back_only_while_no_newcomer_is_ready() -> None:
    crashed = Member("o1", newest=False, phase=FAILED, order=1, proven=True, due=True)
    old = member("o2", READY, newest=False)
    assert step(2, [crashed, old, member("n3", FAILED)]).restart == ("o1",)
    assert step(2, [crashed, old, member("n3", READY)]) == Steps(stop=("o1",), start=1)


def test_without_room_nothing_starts_and_it_is_counted() -> None:
    assert step(3, [member("a1", READY)], room=Room(1)) == Steps(start=1, waiting=1)


def test_a_roll_without_room_gives_one_place_away_at_a_time() -> None:
    old = [member(f"o{i}", READY, newest=False) for i in range(3)]
    first = step(3, old, room=Room(0))
    assert first.stop == ("o0",)
    assert first.without_surge
    left = [*old[1:], member("o0", DRAINING, newest=False)]
    assert step(3, left, room=Room(0, soon=True)).stop == ()
    assert step(3, [*old[1:], member("n4", STARTING)], room=Room(0)).stop == ()


phases = st.sampled_from([Phase.PENDING, STARTING, READY, NOT_READY, DRAINING, FAILED])
members_of_all_kinds = st.lists(
    st.builds(
        lambda newest, phase, proven, due: (newest, phase, proven, due),
        st.booleans(),
        phases,
        st.booleans(),
        st.booleans(),
    ),
    max_size=8,
)


@given(members_of_all_kinds, st.integers(0, 5), st.integers(1, 3), st.booleans(), st.integers(0, 9))
def test_a_step_is_always_sensible(
    raw: list[tuple[bool, Phase, bool, bool]], wanted: int, surge: int, blue: bool, free: int
) -> None:
    members = [
        Member(f"r{i}", newest, phase, i, proven or phase is READY, due and phase is FAILED)
        for i, (newest, phase, proven, due) in enumerate(raw)
    ]
    steps = step(wanted, members, surge=surge, blue=blue, room=Room(free))
    by_id = {m.id: m for m in members}
    assert steps.start >= 0
    assert steps.waiting >= 0
    assert len(set(steps.stop)) == len(steps.stop)
    assert not set(steps.stop) & set(steps.restart)
    assert all(by_id[i].phase is not DRAINING for i in steps.stop)
    assert steps.start + len(steps.restart) <= free
    # A roll takes no ready replica that is needed, but for want of room.
    ready = sum(m.phase is READY for m in members)
    stopped = sum(by_id[i].phase is READY for i in steps.stop)
    if stopped and wanted:
        assert ready - stopped >= min(ready, wanted) - (1 if steps.without_surge else 0)


@settings(max_examples=150)
@given(
    st.integers(),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_every_roll_ends_with_exactly_what_is_wanted(
    seed: int, before: int, wanted: int, surge: int, blue: bool, tight: bool
) -> None:
    chance = random.Random(seed)  # a fair one: nobody waits for ever, as nobody does in the world
    members = {f"r{i}": Member(f"r{i}", False, READY, i, proven=True) for i in range(before)}
    born = before
    limit = max(before, wanted) if tight else 100
    floor = min(before, wanted)
    for _ in range(400):
        processes = sum(m.phase is not FAILED for m in members.values())
        soon = any(m.phase is DRAINING for m in members.values())
        room = Room(limit - processes, soon=soon)
        steps = step(wanted, list(members.values()), surge=surge, blue=blue, room=room)
        for name in steps.stop:
            old = members.pop(name)
            if old.phase is not FAILED:
                members[name] = Member(name, old.newest, DRAINING, old.order, old.proven)
        for name in steps.restart:
            old = members.pop(name)
            members[f"r{born}"] = Member(f"r{born}", old.newest, STARTING, born, old.proven)
            born += 1
        for _ in range(steps.start):
            members[f"r{born}"] = Member(f"r{born}", True, STARTING, born)
            born += 1
        ready = sum(m.phase is READY for m in members.values())
        assert ready >= floor - (1 if tight else 0), "a roll took capacity away"
        assert sum(m.phase is not FAILED for m in members.values()) <= limit
        moving = sorted(n for n, m in members.items() if m.phase in (STARTING, DRAINING, FAILED))
        if not moving:
            break
        # The world moves one of them: it comes up, crashes, may start again, or is drained.
        name = chance.choice(moving)
        one = members[name]
        if one.phase is DRAINING:
            del members[name]
        elif one.phase is FAILED:
            members[name] = Member(name, one.newest, FAILED, one.order, one.proven, due=True)
        elif chance.random() < 0.2:
            members[name] = Member(name, one.newest, FAILED, one.order, one.proven)
        else:
            members[name] = Member(name, one.newest, READY, one.order, proven=True)
    assert sorted((m.newest, m.phase) for m in members.values()) == [(True, READY)] * wanted
