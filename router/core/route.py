"""One request, one decision: which of the candidates gets it, and why.

The seam between the data plane and what it knows: `choose` reads, and changes nothing. What follows
from a choice is counted by `dispatched`, before the request is sent. Not here: which replicas may be candidates
(pick, health), parsing (blocks), or remembering sessions.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Final

from xxhash import xxh64_intdigest

from router.core.blocks import Prompt
from router.core.index import PrefixIndex
from router.core.load import Load, Ticket
from router.core.score import (
    Chance,
    Fleet,
    Held,
    Ranking,
    least,
    linear_signals,
    rendezvous,
    two_choices,
    weigh,
)
from router.core.speeds import Speeds
from router.core.trust import Trust, discounted
from schemas.wire.routing import Policy

Gather = Callable[[Any], Sequence[Any]]

_Column = Sequence[float]
_NO_DOUBT: Final[dict[int, float]] = {}
ANSWER_TOKENS: Final = 256.0
"""Cache that an answer is taken to need besides its prompt."""


class Candidates:
    """Replicas between which a request is decided, by slot. Keep it for as long as they are the same."""

    __slots__ = (
        "_first",
        "_gather",
        "_has_slow",
        "_known",
        "_row",
        "_version",
        "keys",
        "position",
        "slots",
    )

    def __init__(self, slots: Sequence[int], ids: Sequence[str]) -> None:
        """`ids` are the replicas' names in the same order; at least one."""
        self.slots = tuple(slots)
        self.keys = tuple(xxh64_intdigest(name.encode()) for name in ids)
        """For `rendezvous`."""
        self.position = {slot: i for i, slot in enumerate(self.slots)}
        first, count = self.slots[0], len(self.slots)
        in_a_row = self.slots == tuple(range(first, first + count))
        self._first = first if in_a_row else None
        """Of slots that follow one another, as a function's mostly do."""
        self._gather: Gather = itemgetter(*self.slots) if count > 1 else lambda of: (of[first],)
        self._row: Gather | None = itemgetter(slice(first, first + count)) if in_a_row else None
        self._version = -1
        self._known: tuple[_Column, _Column, _Column] = ((), (), ())
        self._has_slow = True

    def positions(self, slots: tuple[int, ...], known: int) -> tuple[int, ...]:
        """Where these stand; slots that are no candidates are left out. `known`: all slots are below it."""
        first = self._first
        if first is not None:
            end = first + len(self.slots)
            if not first and known <= end:
                return slots
            return tuple([slot - first for slot in slots if first <= slot < end])
        at = self.position
        return tuple([at[slot] for slot in slots if slot in at])

    def fleet(self, load: Load, speeds: Speeds, now: float) -> Fleet:
        """What is known of them, side by side."""
        if self._version != speeds.version:
            of = self._floats
            slow = of(speeds.slow)
            self._known = of(speeds.rtt_s), slow, of(speeds.cost)
            self._has_slow = slow.count(1.0) < len(slow)
            self._version = speeds.version
        take = self._row or self._floats
        return Fleet(
            *self._known,
            speeds.p,
            speeds.q,
            take(load.ready_at),
            take(load.floor_s),
            take(load.kv_used),
            self.requests(load),
            now,
            self._has_slow,
        )

    def _floats(self, column: Any) -> array[float]:
        return array("d", self._gather(column))

    def requests(self, load: Load) -> Sequence[int]:
        """Requests on each of them."""
        return (self._row or self._gather)(load.requests)


@dataclass(slots=True)
class States:
    """All that changes by the second, of one router. One `Speeds` a function."""

    index: PrefixIndex = field(default_factory=PrefixIndex)
    load: Load = field(default_factory=Load)
    trust: Trust = field(default_factory=Trust)


class Choice:
    """A decision; what else is needed to explain it is in `Fleet`.

    Args:
        position: of the chosen one among the candidates.
        hit_blocks: that it is thought to hold of the prompt.
        hit_tokens: as much of it as has proved true there of late.
        held: (tokens, positions that hold so many), deepest first, as they were weighed.
    """

    def __init__(
        self, position: int, slot: int, hit_blocks: int, hit_tokens: float, held: Held
    ) -> None:
        self.position = position
        self.slot = slot
        self.hit_blocks = hit_blocks
        self.hit_tokens = hit_tokens
        self.held = held


def hit_tokens(prompt: Prompt, blocks: int) -> float:
    """Tokens that need no prefill; an engine always computes the last one."""
    return max(0.0, min(blocks * prompt.block_tokens, prompt.tokens - 1))


def choose(
    candidates: Candidates,
    prompt: Prompt,
    states: States,
    speeds: Speeds,
    policy: Policy,
    *,
    now: float,
    chance: Chance,
    turn: int = 0,
    session: int | None = None,
    pinned: int | None = None,
) -> Choice:
    """The candidate that this policy sends the request to.

    `turn`: requests of the function before this one. `session`: a 64-bit hash of the session's name.
    `pinned`: slot of the replica that served the session before; counts for nothing when it is not a
    candidate. `now` is on the clock that `Load` is told.
    """
    held: list[tuple[float, tuple[int, ...]]] = []
    depths: list[int] = []
    known = states.index.end
    for blocks, slots in states.index.match(prompt.blocks):
        here = candidates.positions(slots, known)
        if here:
            held.append((hit_tokens(prompt, blocks), here))
            depths.append(blocks)
    doubted = states.trust.factors
    at = candidates.position
    factors = {at[slot]: f for slot, f in doubted.items() if slot in at} if doubted else _NO_DOUBT
    credited = discounted(held, factors) if factors else held
    mine = candidates.position.get(pinned) if pinned is not None else None
    name = policy.name
    if name == "expected-latency":
        fleet = candidates.fleet(states.load, speeds, now)
        ranking = Ranking(fleet, prompt.tokens, credited, pinned=mine, weights=policy.weights)
        first = ranking.least(chance)
    elif name == "linear":
        every = linear_signals(
            candidates.fleet(states.load, speeds, now), prompt.tokens, credited, mine
        )
        first = least([-weigh(one, policy.weights) for one in every], chance)
    elif name == "round-robin":
        first = turn % len(candidates.slots)
    elif name == "session" and mine is not None:
        first = mine
    elif name == "session" and session is not None:
        first = rendezvous(session, candidates.keys)
    elif name == "random-two-choices":
        first = two_choices(candidates.requests(states.load), chance)
    else:
        first = least(candidates.requests(states.load), chance)
    slot = candidates.slots[first]
    for i, (tokens, here) in enumerate(held):
        if first in here:
            hit = tokens * factors.get(first, 1.0)
            return Choice(first, slot, depths[i], hit, credited)
    return Choice(first, slot, 0, 0.0, credited)


def dispatched(
    choice: Choice, prompt: Prompt, states: States, speeds: Speeds, *, now: float
) -> Ticket:
    """Counts a request that is about to be sent: its work and its cache.

    The replica is credited with the prompt's blocks at once, so that the next request of the same
    conversation need not wait for the engine's report. Give the ticket to `Load.finish` whichever
    way the request ends.
    """
    states.index.insert(choice.slot, prompt.blocks)
    work_s = speeds.prefill_s(choice.slot, choice.hit_tokens, prompt.tokens)
    return states.load.dispatch(choice.slot, work_s, prompt.tokens + ANSWER_TOKENS, now)
