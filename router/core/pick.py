"""Which of the candidates gets the request.

Filter first (health, capacity, already tried), then the policy among the replicas of one arm. Pure:
load is a mapping and chance is a `random.Random` passed in. A policy that is not built yet acts as
least-load, and `effective_policy` says so. Not here: which arm (arms), or policies that weigh caches
(route).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Final, Protocol

from xxhash import xxh64_intdigest

from router.core.score import rendezvous
from router.core.snapshot import Candidate

SCORED: Final = frozenset({"expected-latency", "linear"})
"""Policies that weigh what replicas hold of the prompt: decided by `route`, not here."""
_BUILT: Final = frozenset({"session", "round-robin", "least-load", "random-two-choices"}) | SCORED


class Chance(Protocol):
    """The part of `random.Random` used here."""

    def random(self) -> float: ...


def effective_policy(name: str) -> str:
    """What a policy's name means in this version."""
    return name if name in _BUILT else "least-load"


def available(
    candidates: Sequence[Candidate],
    in_flight: Mapping[str, int],
    *,
    without: Collection[str] = (),
    ejected: Collection[str] = (),
) -> list[Candidate]:
    """Candidates that may take one more request: not tried yet, not ejected, not full."""
    return [
        c
        for c in candidates
        if c.id not in ejected
        and c.id not in without
        and (not c.max_concurrent or in_flight.get(c.id, 0) < c.max_concurrent)
    ]


def counted(own: int, others: int, routers: int, most: int) -> int:
    """Requests on a replica that count against the `most` it may carry.

    `others` are those of so many other `routers`. While a router has less than its even part, only its
    own count: one that keeps a replica full would otherwise never leave room for those that wait elsewhere. What
    is carried too much meanwhile goes as the others' requests end.
    """
    part = -(-most // (routers + 1))
    return own if own < part else own + others


def full(
    candidates: Sequence[Candidate], in_flight: Mapping[str, int], ejected: Collection[str] = ()
) -> bool:
    """Whether some of them could take a request, were it not for those they have."""
    return any(
        c.max_concurrent and in_flight.get(c.id, 0) >= c.max_concurrent
        for c in candidates
        if c.id not in ejected
    )


@lru_cache(maxsize=4096)
def _key(replica: str) -> int:
    return xxh64_intdigest(replica.encode())


def pick(
    candidates: Sequence[Candidate],
    policy: str,
    in_flight: Mapping[str, int],
    turn: int,
    chance: Chance,
    *,
    session: int | None = None,
    pinned: str | None = None,
) -> Candidate | None:
    """One of the available candidates of one arm, or None when there is none.

    `turn` is how many requests of the function came before: round-robin goes by it. `session` is 64 bits
    of the session's hash and `pinned` the replica that served it last: the policy `session` goes by
    them, and by load where a request names no session.
    """
    if not candidates:
        return None
    pool = candidates
    if len(pool) == 1:
        return pool[0]
    policy = effective_policy(policy)
    if policy == "round-robin":
        return pool[turn % len(pool)]
    if policy == "session" and session is not None:
        for candidate in pool:
            if candidate.id == pinned:
                return candidate
        return pool[rendezvous(session, [_key(c.id) for c in pool])]
    if policy == "random-two-choices":
        first = int(chance.random() * len(pool))
        second = int(chance.random() * (len(pool) - 1))
        second += second >= first
        pool = (pool[first], pool[second])
    loads = [in_flight.get(c.id, 0) for c in pool]
    least = min(loads)
    if loads.count(least) == 1:
        return pool[loads.index(least)]
    ties = [c for c, load in zip(pool, loads, strict=True) if load == least]
    return ties[int(chance.random() * len(ties))]
