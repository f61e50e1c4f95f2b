"""The KV cache as vLLM keeps it: blocks of tokens, found by chained hashes, evicted by LRU.

A block is *pinned* while a running sequence uses it, *cached* once it is full and has a hash, and
*evictable* when it is cached and nobody pins it. A sequence reserves all the blocks it will need
when it is admitted, so that none is ever preempted; where vLLM would admit it and preempt later, it
waits. Two sequences that compute the same block at the same time each hold one; once it is full the
second copy is given back and both pin the first (vLLM keeps both). So a cached block's parent is
cached too, always.

Not here: tokens (only their hashes come in) and events (callers learn what was evicted).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import xxhash

from agent.simulated.tokens import BYTES_PER_TOKEN, Tokens, token_bytes

BlockHash = int  # u64


def root_hash(*, lora: str = "", cache_salt: str = "") -> BlockHash:
    """What the first block's hash is chained to: prompts of another adapter or salt share nothing."""
    if not lora and not cache_salt:
        return 0
    return xxhash.xxh64_intdigest(f"{lora}\0{cache_salt}".encode("utf-8", "replace"))


def block_hashes(parent: BlockHash, tokens: Tokens[int], block_size: int) -> Iterator[BlockHash]:
    """The hash of each full block of `tokens`, each chained to the one before it."""
    data = token_bytes(tokens)
    step = block_size * BYTES_PER_TOKEN
    for start in range(0, len(data) - step + 1, step):
        parent = xxhash.xxh64_intdigest(parent.to_bytes(8, "big") + data[start : start + step])
        yield parent


@dataclass(slots=True)
class Lease:
    """The blocks of one running sequence. Only the cache that made it changes it.

    `hit_blocks` of them were found in the cache when it was opened.
    """

    hit_blocks: int
    cached: list[BlockHash] = field(default_factory=list)  # pinned, in the order of the sequence
    uncached: int = 0  # pinned, not full yet
    reserved: int = 0  # promised, not taken yet

    @property
    def taken_blocks(self) -> int:
        """How many blocks the sequence holds by now."""
        return len(self.cached) + self.uncached


class PrefixCache:
    """A pool of `capacity_blocks` blocks."""

    def __init__(self, *, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self._pins: dict[BlockHash, int] = {}  # cached and pinned -> by how many leases
        self._evictable: OrderedDict[BlockHash, None] = OrderedDict()  # oldest first
        self._uncached = 0
        self._reserved = 0

    def __contains__(self, block: BlockHash) -> bool:
        return block in self._pins or block in self._evictable

    @property
    def pinned_blocks(self) -> int:
        """What running sequences hold: vLLM's KV cache usage."""
        return len(self._pins) + self._uncached

    @property
    def cached_blocks(self) -> int:
        """What later prompts may find, pinned or not."""
        return len(self._pins) + len(self._evictable)

    def longest_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """How many of the first hashes are cached without a gap."""
        for count, block in enumerate(hashes):
            if block not in self:
                return count
        return len(hashes)

    def open(self, hashes: Sequence[BlockHash], *, needed_blocks: int) -> Lease | None:
        """Pins the longest cached prefix of `hashes` and reserves the rest of `needed_blocks`.

        None when that does not fit beside what others hold and have been promised.
        """
        hit = self.longest_prefix(hashes)
        newly_pinned = sum(1 for block in hashes[:hit] if block not in self._pins)
        reserve = needed_blocks - hit
        if self.pinned_blocks + self._reserved + newly_pinned + reserve > self.capacity_blocks:
            return None
        for block in hashes[:hit]:
            self._evictable.pop(block, None)
            self._pins[block] = self._pins.get(block, 0) + 1
        self._reserved += reserve
        return Lease(hit, cached=list(hashes[:hit]), reserved=reserve)

    def take(self, lease: Lease, blocks: int) -> list[BlockHash]:
        """Turns `blocks` of the reserve into blocks that are held; returns what was evicted for them.

        Raises:
            ValueError: when fewer are reserved.
        """
        if blocks > lease.reserved:
            raise ValueError(f"{blocks} blocks asked for, {lease.reserved} reserved")
        lease.reserved -= blocks
        self._reserved -= blocks
        lease.uncached += blocks
        self._uncached += blocks
        evicted = []
        while self.pinned_blocks + len(self._evictable) > self.capacity_blocks:
            evicted.append(self._evictable.popitem(last=False)[0])
        return evicted

    def store(self, lease: Lease, block: BlockHash) -> bool:
        """Names one of the lease's blocks, now full; False if the cache had that block already.

        Raises:
            ValueError: when the lease holds no block without a name.
        """
        if not lease.uncached:
            raise ValueError("no block is held that could be stored")
        new = block not in self
        lease.uncached -= 1
        self._uncached -= 1
        lease.cached.append(block)
        self._evictable.pop(block, None)
        self._pins[block] = self._pins.get(block, 0) + 1
        return new

    def close(self, lease: Lease) -> None:
        """Gives everything back; its cached blocks become evictable, the last of them first."""
        for block in reversed(lease.cached):
            self._pins[block] -= 1
            if not self._pins[block]:
                del self._pins[block]
                self._evictable[block] = None
        self._uncached -= lease.uncached
        self._reserved -= lease.reserved
        lease.cached, lease.uncached, lease.reserved = [], 0, 0

    def clear(self) -> bool:
        """Forgets every cached block; refused (False) while any block is pinned, as vLLM does."""
        if self.pinned_blocks:
            return False
        self._evictable.clear()
        return True
