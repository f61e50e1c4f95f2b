"""What every replica has to do: prefill queued, requests running, cache in use.

A state machine of requests, pure: time is passed in. A request is counted before it is sent, and its ticket
gives back exactly what it took, however often and in whatever order its transitions come. The
backlog is work, not a count: seconds of prefill that have not come to a first token, less what the
one at the front has run. An engine has one queue, whoever fills it: with the shares of other routers,
the front is the oldest of all, and it began when the last before it was done, whosever that was.
Not here: what a request's work is (speeds), or how the shares of other routers come in (sharing).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Final, Literal

Phase = Literal["prefill", "decode", "done"]

_IDLE: Final = -inf


class _Queue:
    """One replica's requests from this router."""

    __slots__ = ("departed_at", "kv_tokens", "pending", "requests", "slot", "work_s")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.pending: dict[Ticket, None] = {}
        """Not at their first token yet, oldest first: engines serve in this order."""
        self.departed_at = _IDLE
        """When the last at the front came to its first token."""
        self.work_s = 0.0
        self.requests = 0
        self.kv_tokens = 0.0


class Ticket:
    """One request on one replica: what was counted for it, to be given back."""

    phase: Phase = "prefill"

    def __init__(self, queue: _Queue, work_s: float, kv_tokens: float, sent_at: float) -> None:
        self._queue = queue
        self.work_s = work_s
        self.kv_tokens = kv_tokens
        self.sent_at = sent_at

    @property
    def slot(self) -> int:
        return self._queue.slot


@dataclass(frozen=True, slots=True)
class Share:
    """What one router has on one replica; times are on the clock of whoever reads it."""

    work_s: float = 0.0
    """Prefill not at its first token, whole: what has run of it follows from the times."""
    requests: int = 0
    kv_tokens: float = 0.0
    oldest_at: float = inf
    """When the oldest of that prefill was sent; inf: there is none."""
    oldest_work_s: float = 0.0
    departed_at: float = _IDLE
    """When the last before it came to its first token."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it is counted any more."""
        return not self.requests and not self.work_s


@dataclass(slots=True)
class _Others:
    """The shares of all other routers in one replica, added up."""

    work_s: float = 0.0
    requests: int = 0
    kv_tokens: float = 0.0
    oldest_at: float = inf
    oldest_work_s: float = 0.0
    departed_at: float = _IDLE


def _added(shares: Iterable[Share]) -> _Others:
    out = _Others()
    for share in shares:
        out.work_s += share.work_s
        out.requests += share.requests
        out.kv_tokens += share.kv_tokens
        out.departed_at = max(out.departed_at, share.departed_at)
        if share.oldest_at < out.oldest_at:
            out.oldest_at, out.oldest_work_s = share.oldest_at, share.oldest_work_s
    return out


@dataclass(slots=True)
class _Engine:
    """What the engine itself says."""

    capacity_tokens: float = 0.0
    kv_used: float = 0.0


@dataclass(slots=True)
class Load:
    """All replicas of one router, by slot. The sequences are what scoring reads."""

    ready_at: array[float] = field(default_factory=lambda: array("d"))
    """When its prefill would be done if nothing came; -inf: it has none."""
    floor_s: array[float] = field(default_factory=lambda: array("d"))
    """Work behind the request at the front."""
    kv_used: array[float] = field(default_factory=lambda: array("d"))
    """0 to 1, an estimate."""
    requests: list[int] = field(default_factory=list)
    _queues: list[_Queue] = field(default_factory=list)
    _engines: list[_Engine] = field(default_factory=list)
    _shares: list[dict[str, Share]] = field(default_factory=list)
    _others: list[_Others] = field(default_factory=list)

    def add(self, slot: int) -> None:
        """A replica with nothing to do, in the place of whatever had the slot before."""
        while len(self.ready_at) <= slot:
            self.ready_at.append(_IDLE)
            self.floor_s.append(0.0)
            self.kv_used.append(0.0)
            self.requests.append(0)
            self._queues.append(_Queue(len(self._queues)))
            self._engines.append(_Engine())
            self._shares.append({})
            self._others.append(_Others())
        # Tickets of the former replica keep their own queue, which nobody reads any more.
        self._queues[slot] = _Queue(slot)
        self._engines[slot] = _Engine()
        self._shares[slot] = {}
        self._others[slot] = _Others()
        self._publish(slot)

    def dispatch(self, slot: int, work_s: float, kv_tokens: float, now: float) -> Ticket:
        """Counts a request that is about to be sent. Keep the ticket, and `finish` it."""
        queue = self._queues[slot]
        ticket = Ticket(queue, work_s, kv_tokens, now)
        queue.pending[ticket] = None
        queue.work_s += work_s
        queue.requests += 1
        queue.kv_tokens += kv_tokens
        self._publish(slot)
        return ticket

    def first_token(self, ticket: Ticket, now: float) -> float | None:
        """Its prefill is done. How long it was at the front, where that can be told (seconds)."""
        if ticket.phase != "prefill":
            return None
        ticket.phase = "decode"
        queue = ticket._queue  # noqa: SLF001 - a ticket is this module's own
        at_front_s = None
        if next(iter(queue.pending)) is ticket:
            at_front_s = self._at_front_s(ticket, now)
        self._leave_queue(queue, ticket, now)
        if self._queues[queue.slot] is queue:
            self._publish(queue.slot)
        return at_front_s

    def finish(self, ticket: Ticket, now: float) -> None:
        """It is over, whichever way and however far it had come."""
        if ticket.phase == "done":
            return
        queue = ticket._queue  # noqa: SLF001 - a ticket is this module's own
        if ticket.phase == "prefill":
            self._leave_queue(queue, ticket, now)
        ticket.phase = "done"
        queue.requests -= 1
        queue.kv_tokens = queue.kv_tokens - ticket.kv_tokens if queue.requests else 0.0
        if self._queues[queue.slot] is queue:
            self._publish(queue.slot)

    def _leave_queue(self, queue: _Queue, ticket: Ticket, now: float) -> None:
        pending = queue.pending
        if next(iter(pending)) is ticket:
            queue.departed_at = now
        del pending[ticket]
        # Sums of floats drift; an empty queue is zero.
        left_s = queue.work_s - ticket.work_s
        queue.work_s = left_s if pending and left_s > 0.0 else 0.0

    def _at_front_s(self, head: Ticket, now: float) -> float | None:
        queue = head._queue  # noqa: SLF001 - a ticket is this module's own
        since = max(head.sent_at, queue.departed_at)
        if self._queues[queue.slot] is queue:
            others = self._others[queue.slot]
            if others.oldest_at < head.sent_at:
                return None  # somebody's stood before it, and when that was done is not known yet
            since = max(since, others.departed_at)
        return max(0.0, now - since)

    # What others say

    def set_engine(self, slot: int, *, capacity_tokens: float, kv_used: float) -> None:
        """From the engine's own metrics; capacity 0: not known."""
        self._engines[slot] = _Engine(capacity_tokens, kv_used)
        self._publish(slot)

    def set_share(self, slot: int, router: str, share: Share) -> None:
        """What another router has there now.

        An empty one still tells when its last prefill was done; `drop_router` forgets it.
        """
        self._shares[slot][router] = share
        self._others[slot] = _added(self._shares[slot].values())
        self._publish(slot)

    def others(self, slot: int) -> tuple[int, int]:
        """(requests of other routers there, how many routers have any)."""
        counts = [share.requests for share in self._shares[slot].values() if share.requests]
        return sum(counts), len(counts)

    def shared(self, router: str) -> list[int]:
        """Slots where another router has anything."""
        return [
            slot
            for slot, shares in enumerate(self._shares)
            if (share := shares.get(router)) is not None and not share.is_empty
        ]

    def drop_router(self, router: str) -> None:
        """Another router is gone, and what it had with it."""
        for slot, shares in enumerate(self._shares):
            if shares.pop(router, None) is not None:
                self._others[slot] = _added(shares.values())
                self._publish(slot)

    def own_share(self, slot: int) -> Share:
        """This router's part, as other routers should count it."""
        queue = self._queues[slot]
        head = next(iter(queue.pending), None)
        return Share(
            queue.work_s,
            queue.requests,
            queue.kv_tokens,
            inf if head is None else head.sent_at,
            0.0 if head is None else head.work_s,
            queue.departed_at,
        )

    def backlog_s(self, slot: int, now: float) -> float:
        return max(self.ready_at[slot] - now, self.floor_s[slot])

    def _publish(self, slot: int) -> None:
        queue, engine, others = self._queues[slot], self._engines[slot], self._others[slot]
        self.requests[slot] = queue.requests + others.requests
        capacity = engine.capacity_tokens
        estimate = (queue.kv_tokens + others.kv_tokens) / capacity if capacity else 0.0
        used = max(engine.kv_used, estimate)
        self.kv_used[slot] = min(1.0, used)
        work_s = queue.work_s + others.work_s
        oldest_at, oldest_work_s = others.oldest_at, others.oldest_work_s
        if queue.pending:
            head = next(iter(queue.pending))
            if head.sent_at <= oldest_at:
                oldest_at, oldest_work_s = head.sent_at, head.work_s
        elif not others.work_s:
            self.ready_at[slot] = _IDLE
            self.floor_s[slot] = 0.0
            return
        since = max(oldest_at, queue.departed_at, others.departed_at)
        self.ready_at[slot] = since + work_s
        behind_s = work_s - oldest_work_s
        self.floor_s[slot] = max(0.0, behind_s)
