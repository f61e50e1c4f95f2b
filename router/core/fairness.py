"""Whose turn it is while every replica is full: weighted fair by tokens between tenants, first come first
served within one.

A virtual token counter for each tenant, as in Sheng et al., "Fairness in Serving Large Language Models"
(OSDI 2024): the tenant with the least served, by its weight, is next; one that was away comes back at the level of those that
wait, and has saved up nothing. Tenants of a higher priority go first always. Pure: one queue of one function,
time is passed in. Not here: futures and timers (queue), or whether a replica is full (pick).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


class Waiting:
    """One request that waits. Cost and weight are fixed when it comes."""

    __slots__ = ("cost", "gone", "priority", "since", "tenant", "weight")

    def __init__(
        self, tenant: str, cost: float, since: float, *, weight: float = 1.0, priority: int = 0
    ) -> None:
        self.tenant = tenant
        self.cost = cost
        """Tokens it is taken to need, of prompt and answer."""
        self.since = since
        self.weight = weight
        self.priority = priority
        self.gone = False
        """Left by itself; the queue skips it."""


@dataclass(slots=True)
class _Line:
    """One tenant's requests, in order."""

    served: float = 0.0
    """Tokens, by weight, since the queue was last empty."""
    requests: deque[Waiting] = field(default_factory=deque)
    live: int = 0
    """Of the requests, those that have not left."""


@dataclass(slots=True)
class FairQueue:
    """One function's, at one router process."""

    live: int = 0
    """Requests that wait."""
    _lines: dict[str, _Line] = field(default_factory=dict)
    _floor: float = 0.0
    """What the one served last had been served before."""

    def push(self, request: Waiting) -> None:
        """To the end of its tenant's line."""
        line = self._lines.get(request.tenant)
        if line is None:
            line = self._lines[request.tenant] = _Line()
        if not line.live:
            others = [
                other.served
                for other in self._lines.values()
                if other.live and other.requests[-1].priority == request.priority
            ]
            line.served = max(line.served, min(others, default=self._floor))
            line.requests.clear()
        line.requests.append(request)
        line.live += 1
        self.live += 1

    def pop(self) -> Waiting | None:
        """The next one to be served; it is charged for."""
        best: _Line | None = None
        best_rank = (0.0, 0.0, 0.0)
        for line in self._lines.values():
            if not line.live:
                continue
            while line.requests[0].gone:
                line.requests.popleft()
            head = line.requests[0]
            rank = (-head.priority, line.served, head.since)
            if best is None or rank < best_rank:
                best, best_rank = line, rank
        if best is None:
            return None
        request = best.requests.popleft()
        best.live -= 1
        self.live -= 1
        self._floor = best.served
        best.served += request.cost / request.weight
        return request

    def put_back(self, request: Waiting) -> None:
        """It could not be served after all: first in its line again, and not charged."""
        line = self._lines.setdefault(request.tenant, _Line())
        if not line.live:
            line.requests.clear()
        line.served -= request.cost / request.weight
        line.requests.appendleft(request)
        line.live += 1
        self.live += 1

    def leave(self, request: Waiting) -> None:
        """It waits no longer, without having been served."""
        request.gone = True
        self._lines[request.tenant].live -= 1
        self.live -= 1
        self.rest()

    def correct(self, request: Waiting, cost: float) -> None:
        """What it really needed."""
        line = self._lines.get(request.tenant)
        if line is not None:
            line.served = max(0.0, line.served + (cost - request.cost) / request.weight)

    def rest(self) -> None:
        """If nobody waits, everybody begins anew, and tenants that are gone are forgotten."""
        if not self.live:
            self._lines.clear()
            self._floor = 0.0

    def before(self, tenant: str, weight: float, priority: int) -> float:
        """How many requests are served before one that this tenant would send now, about."""
        mine = self._lines.get(tenant)
        own = mine.live if mine is not None else 0
        total = float(own)
        for name, line in self._lines.items():
            if name == tenant or not line.live:
                continue
            head = next(r for r in line.requests if not r.gone)
            if head.priority > priority:
                total += line.live
            elif head.priority == priority:
                total += min(line.live, (own + 1) * head.weight / weight)
        return total

    def excess(self, newcomer: Waiting) -> Waiting | None:
        """Who has to make room for the newcomer in a queue that is full; None: nobody has less right to it.

        The newest of the tenant whose line is longest for its weight, among the lowest priority.
        """
        mine = self._lines.get(newcomer.tenant)
        own = (mine.live if mine is not None else 0) + 1
        longest, worst = newcomer, (newcomer.priority, -own / newcomer.weight)
        for name, line in self._lines.items():
            if name == newcomer.tenant or not line.live:
                continue
            last = next(r for r in reversed(line.requests) if not r.gone)
            rank = (last.priority, -line.live / last.weight)
            if rank < worst:
                longest, worst = last, rank
        return None if longest is newcomer else longest
