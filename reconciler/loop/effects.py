"""Applies what a plan decided, many at once; what fails waits by itself and holds up nothing else.

Not here: what is to be done (core.plan), or how (backends).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from reconciler.again import backoff_s
from reconciler.backends.base import Backend
from reconciler.core.action import Delete, Effect, Noop, Plan
from reconciler.core.plan import Pending
from reconciler.core.workload import Desired
from reconciler.errors import ReconcileError, Stalled, Waiting
from reconciler.loop.ports import Leadership

log = logging.getLogger("detoserve.reconciler")

AT_ONCE = 16
_PASSING_BASE_S = 1.0
_STALLED_BASE_S = 30.0
_CAP_S = 600.0


@dataclass(slots=True)
class Failure:
    """A workload's failed action: not tried again before `until`, unless what is wanted changes."""

    count: int
    until: float
    reason: str
    wanted: object
    passing: bool = False
    """It needs no human: the backend asked to wait, or did not answer."""


class Effects:
    """`clock` is a monotonic clock's."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        leadership: Leadership,
        clock: Callable[[], float],
    ) -> None:
        self._backends = backends
        self._leadership = leadership
        self._clock = clock
        self.failures: dict[str, Failure] = {}
        """By workload."""

    def pending(self, desired: Desired) -> dict[str, Pending]:
        """What waits before it is tried again. What is wanted otherwise now waits no more."""
        for name, failure in list(self.failures.items()):
            if failure.wanted != desired.workloads.get(name):
                del self.failures[name]
        return {name: Pending(f.until, f.reason) for name, f in self.failures.items()}

    def due_after(self, planned_at: float) -> Iterator[float]:
        """When to try again what was not due in the pass of that time.

        What was due then and still stands waits for something else than time.
        """
        return (f.until for f in self.failures.values() if f.until > planned_at)

    def planned(self, made: Plan) -> None:
        """What needs no action any more has not failed."""
        open_ = {a.name for a in made.actions if not isinstance(a, Noop) or a.held}
        for name in self.failures.keys() - open_:
            del self.failures[name]

    async def apply(self, made: Plan, desired: Desired) -> None:
        """All effects of a plan, while the lease is held. Raises nothing: what failed is in `failures`."""
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(action: Effect) -> None:
            async with limit:
                if self._leadership.held is not None:
                    await self._apply_one(action, desired)

        await asyncio.gather(*map(one, made.effects))

    async def _apply_one(self, action: Effect, desired: Desired) -> None:
        name = action.name
        wanted = desired.workloads.get(name)
        backend = self._backends[
            action.backend if isinstance(action, Delete) else action.workload.backend
        ]
        log.info("%s %s: %s", type(action).__name__.lower(), name, action.reason)
        before = self.failures.get(name)
        count = before.count if before else 0
        try:
            await backend.apply(action)
        except Waiting as error:
            until = self._clock() + error.retry_after_s
            self.failures[name] = Failure(count, until, str(error), wanted, passing=True)
            return
        except ReconcileError as error:
            passing = not isinstance(error, Stalled)
            reason, base_s = str(error), _PASSING_BASE_S if passing else _STALLED_BASE_S
        except Exception as error:
            # A defect met by one object must not keep the others from being applied.
            log.exception("%s: applying failed", name)
            reason, passing = f"applying failed: {type(error).__name__}", False
            base_s = _STALLED_BASE_S
        else:
            self.failures.pop(name, None)
            return
        pause_s = backoff_s(count + 1, base_s=base_s, cap_s=_CAP_S)
        log.warning("%s: %s; next try in %.0f s", name, reason, pause_s)
        until = self._clock() + pause_s
        self.failures[name] = Failure(count + 1, until, reason, wanted, passing)
