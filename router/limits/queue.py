"""Requests that wait while every replica of their function is full.

A request that finds no room enters with two calls of its own: one that tries to be sent, and one that is
told why not. Whenever room may have come the next in turn tries; nobody overtakes. Costs nothing while nobody
waits. Not here: whose turn it is (core.fairness), or what a replica may carry (core.pick).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from router.core.errors import Refusal, waited_in_vain, would_wait_too_long
from router.core.fairness import FairQueue, Waiting
from schemas.wire.routing import Function, Tenant

_LOOK_S: Final = 0.02
"""How often the first in turn tries, besides when a request ends here: room also comes from elsewhere."""
_SMOOTHING: Final = 0.2


class Place(Waiting):
    """One request's place in a queue. Leave it whichever way the request ends."""

    __slots__ = ("_alarm", "_line", "_queue", "_refused", "_try")

    def __init__(
        self,
        line: _Line,
        tenant: Tenant,
        cost: float,
        now: float,
        try_: Callable[[], bool],
        refused: Callable[[Refusal], None],
    ) -> None:
        super().__init__(tenant.name, cost, now, weight=tenant.weight, priority=tenant.priority)
        self._line: _Line | None = line
        self._queue = line.queue
        self._try = try_
        self._refused = refused
        self._alarm: asyncio.TimerHandle | None = None

    def needed(self, tokens: float) -> None:
        """What it used in the end: its tenant was charged for an estimate."""
        self._queue.correct(self, max(1.0, tokens))

    def leave(self) -> None:
        """It waits no longer. Harmless when it does not wait."""
        line, self._line = self._line, None
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if line is not None:
            line.queue.leave(self)

    def refuse(self, refusal: Refusal) -> None:
        """It leaves, and is told why."""
        if self._line is not None:
            self.leave()
            self._refused(refusal)

    def late_at(self, alarm: asyncio.TimerHandle) -> None:
        self._alarm = alarm

    def try_now(self) -> bool:
        """Whether it was sent; it waits no longer then."""
        line, self._line = self._line, None
        if self._try():
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None
            return True
        self._line = line
        return False


class _Line:
    """One function's queue, and how fast it moves."""

    __slots__ = ("interval_s", "moved_at", "queue")

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.interval_s = 0.0
        """Between two that are sent while others wait; 0: not known yet."""
        self.moved_at = 0.0

    def moved(self, now: float) -> None:
        if self.moved_at:
            gap = now - self.moved_at
            self.interval_s += (gap - self.interval_s) * (_SMOOTHING if self.interval_s else 1.0)
        self.moved_at = now


class Queues:
    """One a function; owned by one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._lines: dict[str, _Line] = {}
        self._pump: asyncio.Handle | None = None
        self._look: asyncio.TimerHandle | None = None
        self.waiting = 0
        """Requests in all queues when last looked; not 0 while any waits."""

    def __len__(self) -> int:
        return sum(line.queue.live for line in self._lines.values())

    def by_function(self) -> dict[str, int]:
        """Requests that wait, for metrics."""
        return {name: line.queue.live for name, line in self._lines.items()}

    def must_wait(self, function: str) -> bool:
        """Others wait already, and are not to be overtaken."""
        if not self.waiting:
            return False
        line = self._lines.get(function)
        return line is not None and line.queue.live > 0

    def enter(
        self,
        function: Function,
        tenant: Tenant,
        tokens: float,
        try_: Callable[[], bool],
        refused: Callable[[Refusal], None],
    ) -> Place | Refusal:
        """A place, or why there is none. `tokens`: what the request is taken to need.

        `try_` sends the request and says whether it could; either it returns True once, or `refused` is
        called once, or whoever entered leaves.
        """
        policy = function.policy
        line = self._lines.get(function.name)
        if line is None:
            line = self._lines[function.name] = _Line()
        queue, now = line.queue, self._now()
        if not queue.live:
            line.moved_at = 0.0  # what happened before nobody waited tells nothing
        ahead = queue.before(tenant.name, tenant.weight, tenant.priority)
        wait_s = ahead * line.interval_s
        if wait_s > policy.queue_max_wait_s:
            return would_wait_too_long(function.name, wait_s - policy.queue_max_wait_s)
        place = Place(line, tenant, max(1.0, tokens), now, try_, refused)
        if queue.live >= policy.queue_max_requests:
            displaced = queue.excess(place)
            refusal = would_wait_too_long(function.name, max(1.0, wait_s))
            if displaced is None:
                return refusal
            assert isinstance(displaced, Place)
            displaced.refuse(refusal)
        queue.push(place)
        self.waiting += 1
        place.late_at(self._loop.call_later(policy.queue_max_wait_s, self._late, place, function))
        self._look_later()
        return place

    def freed(self) -> None:
        """A request has ended somewhere: there may be room. Call it only while `waiting`."""
        if self._pump is None:
            self._pump = self._loop.call_soon(self._move)

    def close(self) -> None:
        """Stops the timers; whoever still waits is somebody else's to end."""
        for handle in (self._pump, self._look):
            if handle is not None:
                handle.cancel()

    def _late(self, place: Place, function: Function) -> None:
        place.refuse(waited_in_vain(function.name, function.policy.queue_max_wait_s))

    def _look_later(self) -> None:
        if self._look is None and self.waiting:
            self._look = self._loop.call_later(_LOOK_S, self._look_now)

    def _look_now(self) -> None:
        self._look = None
        self._move()
        self._look_later()

    def _move(self) -> None:
        """Lets those in turn try, until one finds no room."""
        self._pump = None
        for name, line in list(self._lines.items()):
            queue = line.queue
            while queue.live:
                place = queue.pop()
                assert isinstance(place, Place)
                if not place.try_now():
                    queue.put_back(place)
                    break
                line.moved(self._now())
            queue.rest()
            if not queue.live and not line.interval_s:
                del self._lines[name]
        self.waiting = len(self)
