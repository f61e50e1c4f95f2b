"""Which replica holds which blocks: longest prefixes for all replicas in one look-up.

A dict from block hash to its holders, with the holders' bits in one integer. Each replica's blocks
are bounded by what its engine can really hold, least recently used first, and all together by
`max_blocks`. Blocks of a prompt that were last used together share their records (a run), which is
what keeps ten million of them under a gigabyte. Not here: what a block is (blocks), or who hears of
engines' evictions.

Blocks are inserted in chains from the first on, and given up from the end: whoever holds a block
holds those before it. The search relies on it. Events that remove a block in the middle make it
overestimate until those behind are removed too.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

DEFAULT_CAPACITY_BLOCKS: Final = 16_384
"""Of a replica that has not said: 1M tokens."""
RECENT: Final = 16
"""What was used while this part of a cache's blocks was used is taken for used just now."""
_SWEEP_BLOCKS: Final = 256
"""Of what a cleared replica held, forgotten with each insertion."""
_BATCH_BLOCKS: Final = 1024
_KEPT_EXPANSIONS: Final = 4096


class _Run:
    """Blocks that one replica used last at the same moment."""

    __slots__ = ("blocks", "cache", "live", "used_at")

    def __init__(self, cache: _Cache, blocks: Sequence[int]) -> None:
        self.cache = cache
        self.blocks = array("Q", blocks)
        """In the order of the prompt; some may have been used again since, in another run."""
        self.live = 0
        """How many have not."""
        self.used_at = cache.used


class _Cache:
    """What one replica is thought to hold since it was last cleared."""

    __slots__ = ("bit", "capacity", "dead_runs", "inserted", "runs", "size", "used")

    def __init__(self, bit: int, capacity: int) -> None:
        self.bit = bit
        self.capacity = capacity
        self.size = 0
        self.inserted = 0
        """Blocks that it did not hold before, since it was last cleared."""
        self.runs: deque[_Run] = deque()
        """Least recently used first."""
        self.dead_runs = 0
        self.used = 0
        """Blocks that were used, each time they were: the clock of its runs."""


class _Holders:
    """Who holds a block; one record for all blocks of which the same is true."""

    __slots__ = ("mask", "runs")

    def __init__(self, mask: int, runs: tuple[_Run, ...]) -> None:
        self.mask = mask
        self.runs = runs


@dataclass(slots=True)
class _Replica:
    cache: _Cache
    epoch: int
    inserted: int = 0
    """Into the caches before this one."""


class PrefixIndex:
    """Blocks of every replica of one router. Replicas are known by slot: a small number."""

    def __init__(self, max_blocks: int = 10_000_000) -> None:
        self.max_blocks = max_blocks
        self._holders: dict[int, _Holders] = {}
        self._replicas: dict[int, _Replica] = {}
        self.end = 0
        """All slots are below it."""
        self._slots: dict[int, int] = {}
        """Bit -> slot. A bit that is being swept has none."""
        self._free: list[int] = []
        self._bits = 0
        self._known = 0
        """Mask of the bits that have a slot."""
        self._retired: deque[_Cache] = deque()
        self._expanded: dict[int, tuple[int, ...]] = {}
        """Masks -> slots of their bits."""
        self._of_bytes: dict[int, tuple[int, ...]] = {}
        """Place of a byte in a mask << 8 | the byte -> slots of its bits."""

    def __len__(self) -> int:
        """Distinct blocks."""
        return len(self._holders)

    def held(self, slot: int) -> int:
        """Blocks that a replica is thought to hold."""
        replica = self._replicas.get(slot)
        return replica.cache.size if replica else 0

    def capacity(self, slot: int) -> int:
        """Blocks that a replica is taken to have room for."""
        return self._replicas[slot].cache.capacity

    def inserted(self, slot: int) -> int:
        """Blocks that a replica was ever credited with anew; only grows while it has its slot."""
        replica = self._replicas.get(slot)
        return replica.inserted + replica.cache.inserted if replica else 0

    # Replicas

    def add(self, slot: int, capacity_blocks: int = 0, epoch: int = 0) -> None:
        """Makes a replica known, holding nothing; forgets whatever had the slot before."""
        self.remove(slot)
        capacity = capacity_blocks or DEFAULT_CAPACITY_BLOCKS
        self._replicas[slot] = _Replica(self._new_cache(slot, capacity), epoch)
        self.end = max(self.end, slot + 1)

    def remove(self, slot: int) -> None:
        """Forgets a replica; its slot may be used for another at once."""
        replica = self._replicas.pop(slot, None)
        if replica is not None:
            self._retire(replica.cache)
            if slot + 1 == self.end:
                self.end = max(self._replicas, default=-1) + 1

    def clear(self, slot: int) -> None:
        """The replica holds nothing any more."""
        replica = self._replicas.get(slot)
        if replica is not None:
            self._retire(replica.cache)
            replica.inserted += replica.cache.inserted
            replica.cache = self._new_cache(slot, replica.cache.capacity)

    def set_epoch(self, slot: int, epoch: int) -> None:
        """An engine's start: another than the last known one clears what was known."""
        replica = self._replicas[slot]
        if replica.epoch != epoch:
            self.clear(slot)
            replica.epoch = epoch

    def set_capacity(self, slot: int, capacity_blocks: int) -> None:
        """What the engine can hold, in blocks of this index; 0: not known."""
        cache = self._replicas[slot].cache
        cache.capacity = capacity_blocks or DEFAULT_CAPACITY_BLOCKS
        self._evict(cache, cache.size - cache.capacity)

    def _new_cache(self, slot: int, capacity: int) -> _Cache:
        if self._free:
            bit = self._free.pop()
        else:
            bit = self._bits
            self._bits += 1
        self._slots[bit] = slot
        self._known |= 1 << bit
        self._expanded.clear()
        self._of_bytes.clear()
        return _Cache(bit, capacity)

    def _retire(self, cache: _Cache) -> None:
        """Its bit means nobody from now on, and is free again when no block carries it."""
        del self._slots[cache.bit]
        self._known &= ~(1 << cache.bit)
        self._expanded.clear()
        self._of_bytes.clear()
        self._retired.append(cache)

    def sweep(self, blocks: int) -> None:
        """Forgets up to so many blocks of replicas that were cleared or removed."""
        while blocks > 0 and self._retired:
            cache = self._retired[0]
            step = min(blocks, cache.size)
            self._evict(cache, step)
            blocks -= step
            if not cache.size:
                self._retired.popleft()
                self._free.append(cache.bit)

    # Blocks

    def insert(self, slot: int, blocks: Sequence[int]) -> None:
        """The replica holds this chain from its first block on, and has just used all of it."""
        cache = self._replicas[slot].cache
        if self._retired:
            self.sweep(_SWEEP_BLOCKS)
        if len(blocks) > cache.capacity:
            blocks = blocks[: cache.capacity]
        if not blocks:
            return
        holders = self._holders
        get = holders.get
        known = get(blocks[-1])
        if known is not None and known.mask & 1 << cache.bit:
            used_at = next(run.used_at for run in known.runs if run.cache is cache)
            if cache.used - used_at <= cache.capacity // RECENT:
                return  # all of the chain was used just now: what is older is not told apart so finely
        start = 0
        count = len(blocks)
        cache.used += count
        run = _Run(cache, blocks)
        while start < count:
            # One step for all neighbours of which the same is known.
            old = get(blocks[start])
            new, own = self._joined(old, run)
            end = start
            if own is run:  # a block that stands twice in the chain
                start += 1
                continue
            while end < count and get(blocks[end]) is old:
                holders[blocks[end]] = new
                end += 1
            run.live += end - start
            if own is None:
                cache.size += end - start
                cache.inserted += end - start
            else:
                self._left(own, end - start)
            start = end
        cache.runs.append(run)
        if cache.size > cache.capacity:
            self._evict(cache, cache.size - cache.capacity)
        if len(holders) > self.max_blocks:
            self._shrink()

    def store(self, slot: int, blocks: Iterable[int]) -> None:
        """The engine says that it holds these; those known already count as no newer for it."""
        bit = 1 << self._replicas[slot].cache.bit
        get = self._holders.get
        self.insert(slot, [b for b in blocks if (h := get(b)) is None or not h.mask & bit])

    def chains(self, slot: int) -> list[array[int]]:
        """What a replica holds, least recently used first: inserted in this order it is known again.

        The arrays are the index's own: read them soon, and only read them.
        """
        return [run.blocks for run in self._replicas[slot].cache.runs if run.live]

    def discard(self, slot: int, blocks: Iterable[int]) -> None:
        """The engine says that it holds these no longer."""
        cache = self._replicas[slot].cache
        bit = 1 << cache.bit
        for block in blocks:
            holders = self._holders.get(block)
            if holders is not None and holders.mask & bit:
                run = next(r for r in holders.runs if r.cache is cache)
                self._drop(block, holders, run, None)
                cache.size -= 1
                self._left(run, 1)

    def match(self, blocks: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        """How much of a chain each replica holds: (blocks, slots that hold just so many).

        Deepest first; replicas that hold nothing are left out.
        """
        get = self._holders.get
        known = self._known
        found: list[tuple[int, tuple[int, ...]]] = []
        count = len(blocks)
        holders = get(blocks[0]) if count else None
        mask = holders.mask & known if holders is not None else 0
        at = 0
        while mask:
            # Gallop to a block with other holders, then halve to the first such.
            step = 1
            same, other, after = at, count, 0
            while same + step < count:
                here = get(blocks[same + step])
                held = 0 if here is None else here.mask & mask
                if held != mask:
                    other, after = same + step, held
                    break
                same += step
                step *= 2
            else:
                # The last step would have gone past the end; the end itself has not been seen.
                here = get(blocks[count - 1])
                held = 0 if here is None else here.mask & mask
                if held != mask:
                    other, after = count - 1, held
            while other - same > 1 and other < count:
                middle = (same + other) // 2
                here = get(blocks[middle])
                held = 0 if here is None else here.mask & mask
                if held == mask:
                    same = middle
                else:
                    other, after = middle, held
            gone = mask & ~after
            if gone:
                found.append((other, self._expand(gone)))
            mask &= after
            at = other
        found.reverse()
        return found

    def _expand(self, mask: int) -> tuple[int, ...]:
        """The slots of a mask's bits."""
        slots = self._expanded.get(mask)
        if slots is None:
            if len(self._expanded) >= _KEPT_EXPANSIONS:
                self._expanded.clear()
            slots = self._expanded[mask] = self._by_bytes(mask)
        return slots

    def _by_bytes(self, mask: int) -> tuple[int, ...]:
        """The same, of a mask that is new: masks of many replicas often are, their bytes seldom."""
        out: list[int] = []
        known = self._of_bytes
        for place, byte in enumerate(mask.to_bytes((mask.bit_length() + 7) // 8, "little")):
            if byte:
                slots = known.get(place << 8 | byte)
                if slots is None:
                    bits = (8 * place + bit for bit in _bits(byte))
                    slots = known[place << 8 | byte] = tuple(self._slots[bit] for bit in bits)
                out += slots
        return tuple(out)

    # Records

    @staticmethod
    def _joined(old: _Holders | None, run: _Run) -> tuple[_Holders, _Run | None]:
        """Holders with this replica's run among them, and its run before."""
        cache = run.cache
        if old is None:
            return _Holders(1 << cache.bit, (run,)), None
        own = next((r for r in old.runs if r.cache is cache), None)
        if own is run:
            return old, run
        others = tuple(r for r in old.runs if r.cache is not cache)
        return _Holders(old.mask | 1 << cache.bit, (*others, run)), own

    def _drop(
        self, block: int, holders: _Holders, run: _Run, last: tuple[_Holders, _Holders] | None
    ) -> tuple[_Holders, _Holders] | None:
        """One replica fewer holds a block. `last`: what this became for the block before."""
        if len(holders.runs) == 1:
            del self._holders[block]
            return None
        if last is None or last[0] is not holders:
            others = tuple(r for r in holders.runs if r is not run)
            last = holders, _Holders(holders.mask & ~(1 << run.cache.bit), others)
        self._holders[block] = last[1]
        return last

    def _left(self, run: _Run, blocks: int) -> None:
        """So many blocks of a run are in another, or nowhere."""
        run.live -= blocks
        cache = run.cache
        if not run.live:
            run.blocks = array("Q")
            cache.dead_runs += 1
            if cache.dead_runs * 2 > len(cache.runs) + 8:
                cache.runs = deque(r for r in cache.runs if r.live)
                cache.dead_runs = 0
        elif len(run.blocks) > 2 * run.live:
            run.blocks = array("Q", (b for b in run.blocks if self._is_in(b, run)))

    def _is_in(self, block: int, run: _Run) -> bool:
        holders = self._holders.get(block)
        return holders is not None and run in holders.runs

    def _evict(self, cache: _Cache, blocks: int) -> None:
        """Gives up so many of a replica's blocks: least recently used first, ends before starts."""
        last = None
        while blocks > 0:
            run = cache.runs[0]
            if not run.live:
                cache.runs.popleft()
                cache.dead_runs -= 1
                continue
            block = run.blocks.pop()
            holders = self._holders.get(block)
            if holders is None or run not in holders.runs:
                continue
            last = self._drop(block, holders, run, last)
            cache.size -= 1
            blocks -= 1
            run.live -= 1
            if not run.live:
                cache.runs.popleft()

    def _shrink(self) -> None:
        """Room for new blocks: from swept replicas, then from whoever holds the most."""
        self.sweep(_BATCH_BLOCKS)
        while len(self._holders) > self.max_blocks:
            caches = [replica.cache for replica in self._replicas.values()]
            caches += islice(self._retired, 1)
            most = max(caches, key=lambda cache: cache.size)
            self._evict(most, min(_BATCH_BLOCKS, most.size))


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
