from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.load import Load, Share

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["dispatch", "first", "finish", "finish again", "replace", "share", "drop"]
        ),
        st.integers(0, 2),
        st.integers(0, 20),
        st.floats(0, 9),
    ),
    max_size=60,
)


def loaded():
    load = Load()
    for slot in range(3):
        load.add(slot)
        load.set_engine(slot, capacity_tokens=1000, kv_used=0.0)
    return load


@given(STEPS)
def test_nothing_is_ever_negative_and_nothing_remains(steps):
    load, tickets, now = loaded(), [], 100.0
    for what, slot, which, amount in steps:
        now += amount / 3
        ticket = tickets[which % len(tickets)] if tickets else None
        if what == "dispatch":
            tickets.append(load.dispatch(slot, amount, amount * 50, now))
        elif what == "replace":
            load.add(slot)
        elif what == "share":
            load.set_share(
                slot,
                f"router-{which % 2}",
                Share(amount, which, amount * 9, now - 1, amount / 2, now),
            )
        elif what == "drop":
            load.drop_router(f"router-{which % 2}")
        elif ticket and what == "first":
            load.first_token(ticket, now)
        elif ticket:
            load.finish(ticket, now)
            load.finish(ticket, now)
        for each in range(3):
            assert load.backlog_s(each, now) >= 0
            assert load.floor_s[each] >= 0
            assert load.requests[each] >= 0
            assert 0 <= load.kv_used[each] <= 1
    for ticket in tickets:
        load.finish(ticket, now)
    load.drop_router("router-0")
    load.drop_router("router-1")
    for each in range(3):
        assert (load.ready_at[each], load.floor_s[each]) == (float("-inf"), 0)
        assert (load.requests[each], load.kv_used[each]) == (0, 0)


@given(st.permutations(range(6)))
def test_whatever_the_order_each_gives_back_what_it_took(order):
    load = loaded()
    tickets = [load.dispatch(0, 1 + i / 10, 10, 0.0) for i in range(6)]
    for count, i in enumerate(order, start=1):
        load.first_token(tickets[i], 0.0)
        left = sum(1 + j / 10 for j in range(6) if j not in order[:count])
        assert load.backlog_s(0, 0.0) == pytest.approx(left)
        assert load.requests[0] == 6


def test_the_backlog_is_work_less_what_the_front_has_run():
    load = loaded()
    first = load.dispatch(0, 2.0, 0, 10.0)
    second = load.dispatch(0, 3.0, 0, 10.5)
    assert load.backlog_s(0, 10.5) == pytest.approx(4.5)
    assert load.backlog_s(0, 11.5) == pytest.approx(3.5)
    # The front takes longer than thought: what stands behind it is not worked off by that.
    assert load.backlog_s(0, 20.0) == pytest.approx(3.0)
    assert load.first_token(first, 20.0) == pytest.approx(10.0)
    assert load.backlog_s(0, 21.0) == pytest.approx(2.0)
    assert load.first_token(second, 22.0) == pytest.approx(2.0)
    assert load.backlog_s(0, 22.0) == 0
    assert load.requests[0] == 2


def test_only_the_front_tells_how_long_a_prefill_takes():
    load = loaded()
    load.dispatch(0, 2.0, 0, 0.0)
    second = load.dispatch(0, 3.0, 0, 0.0)
    assert load.first_token(second, 1.0) is None
    assert load.first_token(second, 1.0) is None


def test_it_counts_before_anything_is_sent():
    # vllm-project/router#179: counted late, one engine of eight takes everything.
    load = loaded()
    load.dispatch(1, 1.0, 100, 0.0)
    assert (load.requests[1], load.backlog_s(1, 0.0)) == (1, 1.0)
    assert load.kv_used[1] == pytest.approx(0.1)


def test_tickets_of_a_replica_that_is_gone_touch_none_that_took_its_place():
    load = loaded()
    old = load.dispatch(0, 5.0, 500, 0.0)
    load.add(0)
    new = load.dispatch(0, 1.0, 0, 0.0)
    load.finish(old, 1.0)
    assert (load.requests[0], load.backlog_s(0, 0.0)) == (1, 1.0)
    load.finish(new, 1.0)
    assert load.requests[0] == 0


def test_others_shares_add_up_and_go_with_their_router():
    load = loaded()
    load.set_share(0, "a", Share(2.0, 3, 100, oldest_at=0.0, oldest_work_s=2.0))
    load.set_share(0, "b", Share(1.0, 1, 100, oldest_at=0.5, oldest_work_s=1.0))
    load.dispatch(0, 4.0, 100, 1.0)
    assert (load.requests[0], load.backlog_s(0, 1.0)) == (5, pytest.approx(6.0))
    assert load.kv_used[0] == pytest.approx(0.3)
    assert load.own_share(0) == Share(4.0, 1, 100, 1.0, 4.0)
    assert load.shared("a") == load.shared("b") == [0]
    load.drop_router("a")
    load.set_share(0, "b", Share())
    assert load.shared("a") == load.shared("b") == []
    assert (load.requests[0], load.backlog_s(0, 1.0)) == (1, pytest.approx(4.0))


def test_an_engine_has_one_queue_whoever_fills_it():
    load = loaded()
    load.set_share(0, "a", Share(2.0, 1, 0, oldest_at=10.0, oldest_work_s=2.0))
    mine = load.dispatch(0, 3.0, 0, 10.5)
    # The other's is at the front; mine has not begun however long it waits.
    assert load.backlog_s(0, 11.5) == pytest.approx(3.5)
    assert load.backlog_s(0, 20.0) == pytest.approx(3.0)
    load.set_share(0, "a", Share(departed_at=12.0))
    assert load.backlog_s(0, 13.0) == pytest.approx(2.0)
    assert load.first_token(mine, 15.0) == pytest.approx(3.0)
    assert load.backlog_s(0, 15.0) == 0


def test_a_wait_behind_others_is_not_taken_for_prefill():
    load = loaded()
    load.set_share(0, "a", Share(2.0, 1, 0, oldest_at=10.0, oldest_work_s=2.0))
    mine = load.dispatch(0, 3.0, 0, 10.5)
    # Its first token comes before the word that what stood before it is done.
    assert load.first_token(mine, 15.0) is None


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2), st.sampled_from(["send", "serve", "finish"]), st.floats(0.01, 5)
        ),
        max_size=40,
    )
)
def test_routers_that_share_at_once_see_what_one_would(steps):
    """Three routers that tell each other everything know the same backlog as one that sent it all."""
    one = Load()
    many = {name: Load() for name in "abc"}
    for each in (one, *many.values()):
        each.add(0)
    waiting, served, now = [], [], 0.0
    for who, what, amount in steps:
        now += amount / 2
        name = "abc"[who]
        if what == "send":
            ours = many[name].dispatch(0, amount, 100, now)
            waiting.append((name, ours, one.dispatch(0, amount, 100, now)))
        elif what == "serve" and waiting:
            name, ours, alone = waiting.pop(0)
            assert many[name].first_token(ours, now) == one.first_token(alone, now)
            served.append((name, ours, alone))
        elif what == "finish" and served:
            name, ours, alone = served.pop()
            many[name].finish(ours, now)
            one.finish(alone, now)
        for other, load in many.items():
            if other != name:
                load.set_share(0, name, many[name].own_share(0))
        for load in many.values():
            assert load.backlog_s(0, now + 1) == pytest.approx(one.backlog_s(0, now + 1), abs=1e-6)
            assert load.requests == one.requests
            assert load.kv_used == one.kv_used


def test_the_engines_own_word_counts_where_it_is_higher():
    load = loaded()
    load.set_engine(0, capacity_tokens=1000, kv_used=0.6)
    assert load.kv_used[0] == 0.6
    load.dispatch(0, 1.0, 900, 0.0)
    assert load.kv_used[0] == 0.9
