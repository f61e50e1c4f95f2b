"""What engines say of themselves moves scores, within bounds, and makes a router forget in time."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.engine_reports import AT_MOST, BLOCK_TOKENS, EXPIRY_S, EngineReports
from router.core.index import PrefixIndex
from router.core.load import Load
from router.core.trust import Trust
from schemas.wire.events import EngineReport

SINCE = 1_700_000_000.0
"""When the router came to know the replica, in Unix seconds."""
STARTED = int((SINCE - 3600) * 1000)


def known() -> EngineReports:
    reports = EngineReports(PrefixIndex(), Load(), Trust())
    reports.index.add(0)
    reports.load.add(0)
    reports.add(0, SINCE)
    return reports


def report(**fields: Any) -> EngineReport:
    return EngineReport(**{"replica": "r", "agent": "a", "epoch": STARTED, **fields})


def apply(reports: EngineReports, at: float, **fields: Any) -> str:
    return reports.apply(0, report(at=SINCE + at, **fields), now=at, now_unix_s=SINCE + at)


@pytest.mark.parametrize("change", [{"epoch": STARTED + 1}, {"clears": 1}])
def test_a_new_process_and_an_emptied_cache_are_forgotten(change: dict[str, int]) -> None:
    reports = known()
    assert apply(reports, 1) == ""
    reports.index.insert(0, [1, 2, 3])
    for _ in range(100):
        reports.trust.learn(0, 4000, 1000)
    assert apply(reports, 2) == ""
    assert reports.index.held(0) == 3  # the same process as before
    assert 0 in reports.trust.factors
    assert apply(reports, 3, **change) == ""
    assert reports.index.held(0) == 0
    assert 0 not in reports.trust.factors  # that was the other's
    reports.index.insert(0, [1])
    assert apply(reports, 4, **change) == ""
    assert reports.index.held(0) == 1
    assert reports.cleared == 1


def test_the_first_word_forgets_only_what_an_earlier_process_held() -> None:
    for epoch, held in ((STARTED, 3), (int(SINCE * 1000) + 5000, 0)):
        reports = known()
        reports.index.insert(0, [1, 2, 3])
        assert apply(reports, 10, epoch=epoch) == ""
        assert reports.index.held(0) == held


def test_capacity_and_use_are_taken_over() -> None:
    reports = known()
    reports.index.insert(0, list(range(1, 101)))
    assert apply(reports, 1, capacity_blocks=64, block_tokens=16, kv_usage=0.5) == ""
    assert reports.index.held(0) == 64 * 16 // BLOCK_TOKENS
    assert reports.load.kv_used[0] == 0.5
    assert reports.last(0) is not None


def test_without_a_word_fullness_is_not_known_and_size_still_is() -> None:
    reports = known()
    apply(reports, 1, capacity_blocks=64, block_tokens=16, kv_usage=0.5)
    reports.index.insert(0, list(range(1, 101)))
    reports.expire(1 + EXPIRY_S - 0.1)
    assert reports.load.kv_used[0] == 0.5
    reports.expire(1 + EXPIRY_S)
    assert reports.load.kv_used[0] == 0.0
    assert reports.last(0) is None
    assert reports.index.held(0) == 16
    # The same process heard again is still the same process.
    assert apply(reports, 30) == ""
    assert reports.index.held(0) == 16


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"at": SINCE + 100}, "its time"),
        ({"at": SINCE - 100}, "its time"),
        ({"at": float("nan")}, "its time"),
        ({"kv_usage": float("nan")}, "kv_usage"),
        ({"kv_usage": 1.1}, "kv_usage"),
        ({"capacity_blocks": -1}, "below 0"),
        ({"capacity_blocks": 10**9, "block_tokens": 100}, "more than"),
        ({"at": SINCE + 1, "epoch": 7}, "not newer"),
        ({"agent": "b", "epoch": 7}, "another agent"),
    ],
)
def test_poison_changes_nothing(fields: dict[str, Any], said: str) -> None:
    reports = known()
    assert apply(reports, 1, capacity_blocks=64, block_tokens=16, kv_usage=0.25) == ""
    reports.index.insert(0, [1, 2, 3])
    assert said in reports.apply(
        0, report(**{"at": SINCE + 2, **fields}), now=2, now_unix_s=SINCE + 2
    )
    assert reports.index.held(0) == 3
    assert reports.load.kv_used[0] == 0.25
    assert apply(reports, 3, capacity_blocks=64, block_tokens=16) == ""


def test_a_slot_nobody_has_is_refused() -> None:
    reports = known()
    reports.remove(0)
    assert apply(reports, 1) == "no such replica"


def test_another_agent_may_take_over_when_the_first_is_silent() -> None:
    reports = known()
    assert apply(reports, 1) == ""
    assert apply(reports, 2, agent="b") != ""
    reports.expire(1 + EXPIRY_S)
    assert apply(reports, 1 + EXPIRY_S, agent="b") == ""


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "epoch": st.integers(-(2**63), 2**63),
                "clears": st.integers(-5, 5),
                "kv_usage": st.floats(),
                "capacity_blocks": st.integers(-5, 10**10),
                "block_tokens": st.integers(-5, 10**6),
                "stored_tokens": st.integers(-5, 10**15),
                "events": st.booleans(),
                "at": st.floats(SINCE - 200, SINCE + 200),
            }
        ),
        max_size=20,
    )
)
def test_whatever_is_said_stays_within_bounds(said: list[dict[str, Any]]) -> None:
    reports = known()
    for i, fields in enumerate(said):
        reports.index.insert(0, range(i * 10, i * 10 + 10))
        reports.apply(0, report(**fields), now=i, now_unix_s=SINCE)
        assert 0 <= reports.load.kv_used[0] <= 1
        capacity = reports.index._replicas[0].cache.capacity
        assert 1 <= capacity <= 1_000_000_000 / BLOCK_TOKENS * AT_MOST


class Engine:
    """An LRU of token blocks, filled by our prompts and by those of others."""

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity = capacity_tokens
        self.prompts: OrderedDict[object, int] = OrderedDict()
        self.stored = 0

    def use(self, name: object, tokens: int) -> bool:
        hit = name in self.prompts
        if not hit:
            self.prompts[name] = tokens
            self.stored += tokens
        self.prompts.move_to_end(name)
        while sum(self.prompts.values()) > self.capacity:
            self.prompts.popitem(last=False)
        return hit


def test_a_block_is_as_many_tokens_as_engines_count() -> None:
    reports = known()
    for _ in range(200):
        reports.counted(0, 1000, 2000)  # two bytes a token
    assert apply(reports, 1, capacity_blocks=64_000, block_tokens=1) == ""
    assert 500 < reports.index._replicas[0].cache.capacity < 515


def mistaken(bytes_per_token: float, foreign: float, *, events: bool) -> float:
    """Share of prompts whose hit or miss is predicted wrong, after a while."""
    chance = random.Random(7)
    blocks_a_prompt = 8
    tokens = int(blocks_a_prompt * 256 / bytes_per_token)
    engine = Engine(capacity_tokens=100 * tokens)
    reports = known()
    wrong = 0
    for i in range(3000):
        which = int(chance.expovariate(1 / 120))
        chain = range(1000 * which, 1000 * which + blocks_a_prompt)
        predicted = any(depth for depth, _ in reports.index.match(chain))
        hit = engine.use(which, tokens)
        reports.index.insert(0, chain)
        if chance.random() < foreign:
            engine.use(("foreign", i), tokens)
        size = {"capacity_blocks": 100 * tokens, "block_tokens": 1}
        apply(reports, 1 + i / 1000, **size, events=events, stored_tokens=engine.stored)
        wrong += i >= 1500 and predicted != hit
    return wrong / 1500


@pytest.mark.parametrize("bytes_per_token", [2.0, 4.0, 8.0])
@pytest.mark.parametrize("foreign", [0.0, 0.5])
def test_events_show_the_room_there_is(bytes_per_token: float, foreign: float) -> None:
    """Neither the tokenizer is known to the router, nor what others send to the engine."""
    with_events = mistaken(bytes_per_token, foreign, events=True)
    assert with_events < 0.02
    if (bytes_per_token, foreign) != (4.0, 0.0):  # where the usual rate is right by chance
        assert mistaken(bytes_per_token, foreign, events=False) > 3 * with_events
