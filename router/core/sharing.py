"""What routers tell one another: loads, where blocks went, and how long prefill took.

Pure: messages come in as records, times are passed in. A router that says nothing for `EXPIRY_S` is
taken for dead, and what it had with it. Loads are whole amounts, so a lost message costs only until
the next about the same replica, or the next full one. What comes in moves the scores of replicas
that the table names, and nothing else. Not here: how messages travel (fleet.sharing, fleet.channels).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf, isfinite
from typing import Final, NamedTuple, Protocol

from router.core.index import PrefixIndex
from router.core.load import Load, Share
from schemas.wire.events import Cached, LoadBatch, PrefillSample, ReplicaLoad

EXPIRY_S: Final = 2.0
"""Four full messages missed."""
BATCH_BLOCKS: Final = 6144
"""48 KiB: what a message carries at most, so that it fits a datagram."""
_PEERS_MAX: Final = 1024
_WORK_MAX_S: Final = 3600.0
_COUNT_MAX: Final = 1_000_000
_TOKENS_MAX: Final = 1e9
_SWAP: Final = sys.byteorder == "big"


class Learn(Protocol):
    """Takes a sample of another router, for a replica by its slot."""

    def __call__(self, slot: int, cached: float, tokens: float, prefill_s: float) -> None: ...


def packed(blocks: Sequence[int]) -> bytes:
    """A chain as it travels."""
    out = array("Q", blocks)
    if _SWAP:
        out.byteswap()
    return out.tobytes()


def unpacked(data: bytes) -> array[int]:
    """The chain of a message; what is left over at its end is dropped."""
    out = array("Q")
    out.frombytes(data[: min(len(data) // 8, BATCH_BLOCKS) * 8])
    if _SWAP:
        out.byteswap()
    return out


class _Sample(NamedTuple):
    slot: int
    cached: float
    tokens: float
    prefill_s: float


class Journal:
    """What this router has not told yet. Replicas are known by slot."""

    __slots__ = ("_cached", "_load", "_samples", "_seq", "_touched", "router")

    def __init__(self, router: str, load: Load) -> None:
        self.router = router
        self._load = load
        self._seq = 0
        self._touched: set[int] = set()
        self._cached: list[tuple[int, Sequence[int]]] = []
        self._samples: list[_Sample] = []

    def dispatched(self, slot: int, blocks: Sequence[int]) -> None:
        """A request was counted there; `blocks` are those that are worth telling."""
        self._touched.add(slot)
        if blocks:
            self._cached.append((slot, blocks))

    def changed(self, slot: int) -> None:
        """A request there came to its first token, or to its end."""
        self._touched.add(slot)

    def sampled(self, slot: int, cached: float, tokens: float, prefill_s: float) -> None:
        """A prefill was timed."""
        self._samples.append(_Sample(slot, cached, tokens, prefill_s))

    def forget(self) -> None:
        """Drops what nobody is there to hear."""
        self._touched.clear()
        self._cached.clear()
        self._samples.clear()

    def batches(
        self,
        names: Mapping[int, str],
        now: float,
        *,
        full: bool,
    ) -> list[LoadBatch]:
        """The messages that tell it, and everything that is on any replica with `full`.

        `names` are the replicas' by slot; what was done to one that is gone is not told.
        """
        slots = names.keys() if full else self._touched & names.keys()
        shares = ((names[slot], self._load.own_share(slot)) for slot in slots)
        loads = tuple(
            replica_load(name, share, now)
            for name, share in shares
            if not full or not _is_untouched(share)
        )
        chains = list(_cut(self._cached, names))
        samples = tuple(
            PrefillSample(names[s.slot], *s[1:]) for s in self._samples if s.slot in names
        )
        first = LoadBatch(
            router=self.router,
            seq=self._next(),
            full=full,
            loads=loads,
            cached=chains[0] if chains else (),
            samples=samples,
        )
        rest = [LoadBatch(router=self.router, seq=self._next(), cached=c) for c in chains[1:]]
        self.forget()
        return [first, *rest]

    def briefing(
        self, names: Mapping[int, str], index: PrefixIndex, to: str
    ) -> Iterator[LoadBatch]:
        """All that this router knows of caches, for one that has just started; made as it is read."""
        for slot in list(names):
            known = ((slot, chain) for chain in index.chains(slot) if chain)
            for cached in _cut(known, names):
                yield LoadBatch(router=self.router, seq=self._next(), to=to, cached=cached)

    def _next(self) -> int:
        self._seq += 1
        return self._seq


def _is_untouched(share: Share) -> bool:
    return share.is_empty and share.departed_at == -inf


def _cut(
    cached: Iterable[tuple[int, Sequence[int]]], names: Mapping[int, str]
) -> Iterable[tuple[Cached, ...]]:
    """Chains in groups of at most `BATCH_BLOCKS`; a longer one is cut at its end."""
    group: list[Cached] = []
    size = 0
    for slot, blocks in cached:
        name = names.get(slot)
        if name is None:
            continue
        chain = blocks[:BATCH_BLOCKS]
        if group and size + len(chain) > BATCH_BLOCKS:
            yield tuple(group)
            group, size = [], 0
        group.append(Cached(name, packed(chain)))
        size += len(chain)
    if group:
        yield tuple(group)


def replica_load(replica: str, share: Share, now: float) -> ReplicaLoad:
    """A share as others read it, whose clocks are their own."""
    return ReplicaLoad(
        replica,
        share.requests,
        share.work_s,
        share.kv_tokens,
        now - share.oldest_at if share.oldest_at < inf else -1.0,
        share.oldest_work_s,
        now - share.departed_at if share.departed_at > -inf else -1.0,
    )


def share_of(load: ReplicaLoad, now: float) -> Share:
    """A share on this router's clock, whatever the message holds."""
    work_s = _bounded(load.work_s, _WORK_MAX_S)
    return Share(
        work_s,
        min(max(load.requests, 0), _COUNT_MAX),
        _bounded(load.kv_tokens, _TOKENS_MAX),
        now - _bounded(load.oldest_age_s, _WORK_MAX_S) if work_s else inf,
        _bounded(load.oldest_work_s, work_s),
        now - _bounded(load.departed_age_s, _WORK_MAX_S) if load.departed_age_s >= 0 else -inf,
    )


def _bounded(value: float, most: float) -> float:
    return min(max(value, 0.0), most) if isfinite(value) else 0.0


class _Peer:
    __slots__ = ("heard_at", "seq")

    def __init__(self, heard_at: float, seq: int) -> None:
        self.heard_at = heard_at
        self.seq = seq


class Peers:
    """What other routers have told this one."""

    def __init__(self, router: str, load: Load, index: PrefixIndex) -> None:
        self._router = router
        self._load = load
        self._index = index
        self._known: dict[str, _Peer] = {}
        self.gaps = 0
        """Messages that never came."""

    def __len__(self) -> int:
        return len(self._known)

    def is_news(self, router: str, seq: int) -> bool:
        """Whether a message is of another router, and not seen yet."""
        peer = self._known.get(router)
        return router != self._router and (peer is None or seq > peer.seq)

    def receive(self, batch: LoadBatch, slots: Mapping[str, int], learn: Learn, now: float) -> bool:
        """Counts what another router says. Whether it is one that was not known.

        `slots` are those of the replicas that the table names; others are left out.
        """
        if not self.is_news(batch.router, batch.seq):
            return False
        peer = self._known.get(batch.router)
        is_new = peer is None
        if peer is None:
            if len(self._known) >= _PEERS_MAX:
                return False
            self._known[batch.router] = _Peer(now, batch.seq)
        else:
            self.gaps += batch.seq - peer.seq - 1
            peer.heard_at, peer.seq = now, batch.seq
        named = set()
        for load in batch.loads:
            slot = slots.get(load.replica)
            if slot is not None:
                named.add(slot)
                self._load.set_share(slot, batch.router, share_of(load, now))
        if batch.full:
            for slot in self._load.shared(batch.router):
                if slot not in named:
                    self._load.set_share(slot, batch.router, Share())
        for chain in batch.cached:
            slot = slots.get(chain.replica)
            if slot is not None:
                self._index.insert(slot, unpacked(chain.blocks))
        for sample in batch.samples:
            slot = slots.get(sample.replica)
            if slot is not None and 0 <= sample.cached <= sample.tokens <= _TOKENS_MAX:
                learn(slot, sample.cached, sample.tokens, sample.prefill_s)
        return is_new

    def passed(self, router: str, seq: int, now: float) -> None:
        """A message for another router went by."""
        peer = self._known.get(router)
        if peer is not None:
            peer.heard_at, peer.seq = now, seq

    def is_first(self, newcomer: str) -> bool:
        """Whether it is for this router, of those that were there before, to brief a newcomer."""
        return all(self._router < name for name in self._known if name != newcomer)

    def expire(self, now: float) -> list[str]:
        """Forgets routers that have said nothing for too long, and tells which."""
        dead = [name for name, peer in self._known.items() if now - peer.heard_at > EXPIRY_S]
        for name in dead:
            del self._known[name]
            self._load.drop_router(name)
        return dead
