from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.simulated.prefix_cache import Lease, PrefixCache, block_hashes, root_hash
from agent.simulated.tokens import encode

BLOCK = 4


def hashes_of(text: str, *, cache_salt: str = "", lora: str = "") -> list[int]:
    root = root_hash(lora=lora, cache_salt=cache_salt)
    return list(block_hashes(root, encode(text), BLOCK))


def run(cache: PrefixCache, hashes: list[int]) -> tuple[int, list[int]]:
    """One sequence of full blocks, from admission to its end: (blocks hit, blocks evicted)."""
    lease = cache.open(hashes, needed_blocks=len(hashes))
    assert lease is not None
    evicted = cache.take(lease, len(hashes) - lease.hit_blocks)
    for block in hashes[lease.hit_blocks :]:
        assert cache.store(lease, block)
    cache.close(lease)
    return lease.hit_blocks, evicted


class NaiveLru:
    """What the cache must equal for sequences that run one after the other: a plain list."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.order: list[int] = []  # oldest first

    def run(self, hashes: list[int]) -> tuple[int, list[int]]:
        hit = 0
        while hit < len(hashes) and hashes[hit] in self.order:
            hit += 1
        self.order = [block for block in self.order if block not in hashes[:hit]]
        evicted = []
        while len(self.order) + len(hashes) > self.capacity:
            evicted.append(self.order.pop(0))
        self.order += reversed(hashes)
        return hit, evicted


prompts = st.text(alphabet="ab", min_size=1, max_size=7).map(
    lambda letters: "".join(letter * BLOCK * 4 for letter in letters)
)


@given(st.lists(prompts, max_size=30), st.integers(7, 12))
def test_sequences_one_after_the_other_meet_a_plain_lru(texts: list[str], capacity: int) -> None:
    cache, naive = PrefixCache(capacity_blocks=capacity), NaiveLru(capacity)
    for text in texts:
        assert run(cache, hashes_of(text)) == naive.run(hashes_of(text))
        assert cache.cached_blocks == len(naive.order) <= capacity
        assert cache.pinned_blocks == 0


@given(st.lists(st.tuples(prompts, st.integers(0, 5), st.booleans()), max_size=40))
def test_capacity_holds_whatever_runs_at_once(
    steps: list[tuple[str, int, bool]],
) -> None:
    capacity = 16
    cache = PrefixCache(capacity_blocks=capacity)
    open_leases: list[tuple[Lease, list[int]]] = []
    for text, extra, close_one in steps:
        hashes = hashes_of(text)
        lease = cache.open(hashes, needed_blocks=len(hashes) + extra)
        if lease is not None:
            cache.take(lease, lease.reserved)
            for block in hashes[lease.hit_blocks :]:
                cache.store(lease, block)
            open_leases.append((lease, hashes))
        assert cache.pinned_blocks <= capacity
        assert cache.cached_blocks <= capacity
        for _, held in open_leases:
            assert all(block in cache for block in held)  # pinned: never evicted
        if close_one and open_leases:
            cache.close(open_leases.pop(0)[0])
    for lease, _ in open_leases:
        cache.close(lease)
    assert cache.pinned_blocks == 0


@given(st.lists(st.integers(0, 20), max_size=10), st.sets(st.integers(0, 20), max_size=10))
def test_longest_prefix_stops_at_the_first_gap(wanted: list[int], cached: set[int]) -> None:
    cache = PrefixCache(capacity_blocks=100)
    run(cache, sorted(cached))
    naive = next((i for i, block in enumerate(wanted) if block not in cached), len(wanted))
    assert cache.longest_prefix(wanted) == naive


def test_equal_prefixes_share_hashes_up_to_where_they_part() -> None:
    first, second = hashes_of("x" * 48 + "a" * 16), hashes_of("x" * 48 + "b" * 16)
    assert first[:3] == second[:3]
    assert first[3] != second[3]
    assert hashes_of("y" * 16 + "x" * 48)[1:] != first[:3]  # chained: place matters


def test_salt_and_adapter_separate_everything() -> None:
    variants = [
        hashes_of("x" * 64),
        hashes_of("x" * 64, cache_salt="tenant-a"),
        hashes_of("x" * 64, cache_salt="tenant-b"),
        hashes_of("x" * 64, lora="adapter"),
        hashes_of("x" * 64, lora="adapter", cache_salt="tenant-a"),
    ]
    assert len({block for variant in variants for block in variant}) == 5 * 4
    assert hashes_of("x" * 64, cache_salt="tenant-a") == variants[1]  # the control: same salt hits


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    cache = PrefixCache(capacity_blocks=4)
    long, other = hashes_of("x" * 64), hashes_of("y" * 32)
    run(cache, long)
    assert run(cache, other)[1] == [long[3], long[2]]
    assert cache.longest_prefix(long) == 2


def test_what_does_not_fit_beside_promises_waits() -> None:
    cache = PrefixCache(capacity_blocks=4)
    first = cache.open([], needed_blocks=3)
    assert first is not None
    assert cache.open([], needed_blocks=2) is None
    cache.close(first)
    assert cache.open([], needed_blocks=2) is not None


def test_a_block_computed_twice_at_once_is_cached_once() -> None:
    cache = PrefixCache(capacity_blocks=4)
    block = hashes_of("x" * 16)[0]
    leases = [cache.open([block], needed_blocks=1) for _ in range(2)]
    stored = []
    for lease in leases:
        assert lease is not None
        cache.take(lease, 1)
        stored.append(cache.store(lease, block))
    assert stored == [True, False]
    assert cache.pinned_blocks == 1
    for lease in leases:
        assert lease is not None
        cache.close(lease)
    assert (cache.pinned_blocks, cache.cached_blocks) == (0, 1)


def test_clearing_is_refused_while_a_block_is_in_use() -> None:
    cache = PrefixCache(capacity_blocks=4)
    lease = cache.open([], needed_blocks=1)
    assert lease is not None
    cache.take(lease, 1)
    cache.store(lease, 7)
    assert not cache.clear()
    cache.close(lease)
    assert cache.clear()
    assert 7 not in cache


def test_taking_more_than_reserved_is_an_error() -> None:
    cache = PrefixCache(capacity_blocks=4)
    lease = cache.open([], needed_blocks=1)
    assert lease is not None
    with pytest.raises(ValueError, match="2 blocks asked for, 1 reserved"):
        cache.take(lease, 2)
    with pytest.raises(ValueError, match="no block is held"):
        cache.store(lease, 1)
