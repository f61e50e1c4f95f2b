"""A cache followed event by event, and the names that agent and router agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.cache import Cache, Change
from agent.core.kv_events import Cleared, Event, PayloadInvalid, Removed, Stored
from schemas.wire.token_blocks import chain, chain_root, pack, unpack

KEY = bytes(range(32))
TOKENS = st.lists(st.integers(0, 200_000), max_size=40)


def stored(
    hashes: Sequence[int], tokens: Sequence[int], *, parent: int | None = None, **more: Any
) -> Stored:
    size = len(tokens) // len(hashes)
    return Stored(
        block_hashes=list(hashes),
        parent_block_hash=parent,
        token_ids=list(tokens),
        block_size=size,
        **more,
    )


def names(change: Change) -> list[int]:
    return list(change.stored)


@given(tokens=TOKENS, size=st.integers(1, 8), cut=st.integers(0, 40), salt=st.text(max_size=5))
def test_agent_and_router_name_blocks_alike(
    tokens: list[int], size: int, cut: int, salt: str
) -> None:
    """However the engine cuts a prompt into events: by chunks of prefill, then by decoded blocks."""
    expected = chain(KEY, chain_root(KEY, salt=salt), tokens, size)
    whole = len(expected)
    first = min(cut, whole)
    cache, said = Cache(KEY), []
    for start, end in ((0, first), (first, whole)):
        if start < end:
            keys: list[Any] = [[salt] if salt and i == 0 else None for i in range(start, end)]
            event = stored(
                range(100 + start, 100 + end),
                tokens[start * size : end * size],
                parent=99 + start if start else None,
                extra_keys=keys,
            )
            said += names(cache.apply([event]))
    assert said == expected == cache.names
    assert unpack(pack(expected)) == expected


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_common_names_are_the_common_prefix(a: list[int], b: list[int], size: int) -> None:
    one, other = (chain(KEY, chain_root(KEY), tokens, size) for tokens in (a, b))
    common = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    assert [x for x, y in zip(one, other, strict=False) if x == y] == one[: common // size]


def test_salts_adapters_and_keys_share_nothing() -> None:
    tokens = list(range(8))
    roots = [
        (KEY, chain_root(KEY)),
        (KEY, chain_root(KEY, salt="a")),
        (KEY, chain_root(KEY, lora="a")),
        (KEY, chain_root(KEY, lora="a", salt="a")),
        (bytes(32), chain_root(bytes(32))),
    ]
    chains = [chain(key, root, tokens, 4) for key, root in roots]
    assert len({name for one in chains for name in one}) == 2 * len(chains)


def test_an_adapter_is_its_name_in_every_block() -> None:
    event = stored(
        [1, 2], [5, 6, 7, 8], lora_name="poet", lora_id=3,
        extra_keys=[["poet", "salt"], ["poet"]],
    )  # fmt: skip
    expected = chain(KEY, chain_root(KEY, lora="poet", salt="salt"), [5, 6, 7, 8], 2)
    assert names(Cache(KEY).apply([event])) == expected


def test_an_image_in_a_block_makes_another_name() -> None:
    keys: list[list[Any] | None] = [[["digest", 0]], None]
    with_image = names(Cache(KEY).apply([stored([1, 2], [5, 6, 7, 8], extra_keys=keys)]))
    without = names(Cache(KEY).apply([stored([1, 2], [5, 6, 7, 8])]))
    assert not set(with_image) & set(without)


def test_removals_and_clears() -> None:
    cache = Cache(KEY)
    first = names(cache.apply([stored([1, 2, 3], [1, 2, 3])]))
    change = cache.apply([Removed(block_hashes=[3, 99]), stored([4], [9], parent=2)])
    assert change.removed == [first[2]]
    assert (change.removed_tokens, change.stored_tokens) == (1, 1)
    cleared = cache.apply([Cleared(), stored([5], [1])])
    assert cleared.cleared
    assert names(cleared) == [first[0]] == cache.names


def test_stored_and_removed_at_once_is_neither() -> None:
    change = Cache(KEY).apply([stored([1, 2], [1, 2]), Removed(block_hashes=[2])])
    assert len(change.stored) == 1
    assert change.removed == []


def test_said_twice_is_stored_once() -> None:
    cache = Cache(KEY)
    cache.apply([stored([1, 2], [1, 2])])
    change = cache.apply([stored([1, 2], [1, 2])])
    assert not change
    assert (
        names(cache.apply([stored([3], [3], parent=2)]))
        == chain(KEY, chain_root(KEY), [1, 2, 3], 1)[2:]
    )


def test_a_block_behind_an_unknown_one_has_no_name() -> None:
    """Its chain's beginning was missed: counting it is right, naming it would be a guess."""
    cache = Cache(KEY)
    change = cache.apply([stored([2, 3], [2, 3], parent=1)])
    assert names(change) == []
    assert change.stored_tokens == 2
    assert cache.orphans == 2
    assert names(cache.apply([stored([4], [4], parent=3)])) == []


def test_slower_memory_and_other_groups_do_not_count() -> None:
    events: list[Event] = [
        stored([1], [1], medium="CPU"),
        stored([2], [2], group_idx=1),
        Removed(block_hashes=[3], medium="STORAGE"),
    ]
    assert not Cache(KEY).apply(events)


def test_without_a_key_there_are_counts_alone() -> None:
    cache = Cache()
    change = cache.apply([stored([1, 2], [1, 2, 3, 4]), Removed(block_hashes=[1])])
    assert (change.stored_tokens, change.removed_tokens) == (4, 2)
    assert names(change) == change.removed == cache.names == []


def test_tokens_that_are_none_are_refused() -> None:
    with pytest.raises(PayloadInvalid):
        Cache(KEY).apply([stored([1], [-1])])


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60))
def test_what_is_held_is_what_was_stored_and_not_removed(steps: list[tuple[int, bool]]) -> None:
    cache, model = Cache(KEY), set[int]()
    reader = set[int]()
    for block, store in steps:
        change = cache.apply([stored([block], [block]) if store else Removed(block_hashes=[block])])
        (model.add if store else model.discard)(block)
        reader = (reader - set(change.removed)) | set(change.stored)
    assert len(cache) == len(model)
    assert set(cache.names) == reader
