"""Whether a request may enter, and whether there is room: limits, queues, functions that sleep.

Not here: counting what it used (exchange).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

from msgspec.structs import replace

from router.core import errors
from router.core.errors import Refusal, Refused
from router.core.health import kept_out
from router.core.pick import full
from router.core.snapshot import Candidate
from router.exchange.asked import Asked
from router.limits.limiter import Admission
from schemas.wire.routing import Function


class Admitted(Asked):
    """Under its limits, and in its queue."""

    def _enter(self) -> None:
        """Takes what it needs of the limits that it stands under."""
        limiter, function = self._proxy.limiter, self._function
        self.record.function = function.name
        if not limiter.enabled:
            self._start()
            return
        answer = limiter.admit_now(self._principal, function, *self._estimated())
        if answer is None:
            self._later(self._enter_later)
        else:
            self._entered(answer)

    async def _enter_later(self) -> None:
        limiter = self._proxy.limiter
        answer = await limiter.admit(self._principal, self._function, *self._estimated())
        self._task = None  # what waits from here on is another's
        self._entered(answer)

    def _entered(self, answer: Admission | Refusal) -> None:
        if isinstance(answer, Refusal):
            raise Refused(answer)
        self._admission = answer
        self._start()

    def _wait(self) -> None:
        """Waits for room, where that is what is missing and no other function is to be asked."""
        function, proxy = self._function, self._proxy
        candidates, breakers = self._candidates, self._state.breakers
        if not candidates:
            self._wake()
            return
        ejected = kept_out(candidates, breakers, perf_counter()) if breakers else ()
        if (
            self._fallbacks
            or not function.policy.queue_max_wait_s
            # Where others wait there may be room that has just come: it is theirs.
            or not (
                proxy.queues.must_wait(function.name)
                or full(candidates, self._carried(candidates), ejected)
            )
        ):
            raise Refused(errors.at_capacity(function.name))
        self._line_up(function, self._try)

    def _line_up(self, function: Function, try_: Callable[[], bool]) -> None:
        """Takes a place in the queue of a function; `try_` is called when it is its turn."""
        place = self._proxy.queues.enter(
            function, self._principal.tenant, sum(self._estimated()), try_, self._refuse
        )
        if isinstance(place, Refusal):
            raise Refused(place)
        self._place = place

    def _carried(self, candidates: Sequence[Candidate]) -> Mapping[str, int]:
        """Requests on each replica, as they count against what it may carry."""
        own = self._state.in_flight.by_replica
        if self._function.name not in self._snapshot.bounded:
            return own
        return self._proxy.brain.carried(candidates, own)

    def _wake(self) -> None:
        """Waits for a function that sleeps, where it does and no other is to be asked."""
        function, proxy = self._function, self._proxy
        if not function.wake_wait_s:
            raise Refused(errors.no_replica(function.name))
        proxy.signals.wakes(function.name)
        if self._fallbacks:
            raise Refused(errors.no_replica(function.name))
        policy = replace(function.policy, queue_max_wait_s=function.wake_wait_s)
        self._line_up(replace(function, policy=policy), self._try_awake)

    def _try_awake(self) -> bool:
        """Its turn, if the newest table has a replica for it."""
        snapshot = self._state.snapshot
        if snapshot is not None and snapshot is not self._snapshot:
            function = snapshot.functions.get(self._function.name)
            if function is not None:
                self._snapshot, self._function = snapshot, function
                self._candidates = snapshot.candidates(function, self._principal.tenant)
        return bool(self._candidates) and self._try()

    def _try(self) -> bool:
        """Its turn: whether it need not wait any more."""
        try:
            chosen = self._choose()
            if chosen is None:
                return False
            self._attempt(*chosen)
        except Refused as refused:
            self._refuse(refused.refusal)
        except Exception as error:  # noqa: BLE001 - the others in the queue must not take the blame
            self._fail(error)
        return True
