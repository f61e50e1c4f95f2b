"""The skypilot backend: told a Workload, it leads a SkyServe service there, one request at a time.

One round after another: which of our requests are done, how all services are (one status call), and
then the next request for each name that needs one. A round takes as long as SkyPilot takes; passes
of the reconciler are answered from the last one. Nothing is acted on without the lease it was told under.

Not here: which request is next (core.skypilot.steps), what it holds (core.skypilot.render), or what
an observation says (core.skypilot.view).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from reconciler.again import backoff_s
from reconciler.backends.skypilot.api import (
    ApiSettings,
    Pending,
    Refusal,
    RequestUnknown,
    SkyPilotApi,
)
from reconciler.backends.skypilot.notes import Flight, Notes
from reconciler.backends.skypilot.outbox import Outbox, for_a_human, plain
from reconciler.backends.skypilot.sight import Sight
from reconciler.core.action import Create, Delete, Effect, Update
from reconciler.core.observed import Observation, ObservedWorkload, Unknown
from reconciler.core.skypilot import steps
from reconciler.core.skypilot.render import check
from reconciler.core.skypilot.service import Service
from reconciler.core.skypilot.states import Stage, service_state
from reconciler.core.skypilot.view import Known, UnderWay, observed
from reconciler.core.workload import Workload
from reconciler.errors import BackendUnreachable, NotOurs, Stalled, Transient, Waiting

log = logging.getLogger("detoserve.skypilot")

CALLS_AT_ONCE: Final = 8
# A request whose sending was cut off may reach the server late; it is given up for lost after this.
LOST_AFTER_ROUNDS: Final = 2
# What only a human can change is tried again all the same, this much more seldom.
SELDOM: Final = 20


@dataclass(frozen=True, slots=True)
class Pace:
    """How often SkyPilot is asked, and when something counts as stuck. Seconds."""

    idle_s: float = 10.0
    moving_s: float = 3.0
    least_s: float = 0.5
    first_look_s: float = 3.0
    """How long the first observation waits for the first answer."""
    retry_s: float = 15.0
    stuck_after_s: float = 900.0
    again_after_s: float = 300.0
    """After SkyServe gave up on a service; doubled by every try."""


@dataclass(slots=True)
class _Told:
    """What is to become of one name. `since`: only a look begun after this one may be acted on."""

    goal: Workload | steps.Removal
    lease: int
    since: int
    failures: int = 0
    again_at: float = 0.0
    trouble: str = ""
    stalled: bool = False
    again: bool = False
    """SkyServe gave up on the same."""


class SkyPilotBackend:
    """`leading` gives the lease generation, None without one. `notify`: an observation would differ."""

    name = "skypilot"

    def __init__(
        self,
        settings: ApiSettings,
        state_dir: Path,
        owner: str,
        *,
        notify: Callable[[], None],
        environ: Mapping[str, str] = os.environ,
        leading: Callable[[], int | None] = lambda: 0,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.api = SkyPilotApi(settings, owner)
        self._owner = owner
        self._notify = notify
        self._leading = leading
        self._pace = pace or Pace()
        self._clock = clock
        self._notes = Notes(state_dir)
        self._sight = Sight(self.api, self._notes, owner, clock)
        self._outbox = Outbox(self.api, self._notes, owner, environ)
        self._told: dict[str, _Told] = {}
        self._lost: dict[str, int] = {}
        """Rounds in which a request of unknown fate was not seen."""
        self._problem = "it has not been asked yet"
        self._looks = 0
        """Begun so far; a look is one status call."""
        self._seen: Observation | Unknown | None = None
        self._said: Observation | Unknown | None = None
        self._looked = asyncio.Event()
        self._kick = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes up requests that an earlier reconciler left under way, and begins to look. Once.

        Raises:
            BackendUnreachable: the state directory cannot be used.
        """
        try:
            await self._notes.load()
        except OSError as error:
            raise BackendUnreachable(f"{self._notes.dir.path}: {error.strerror}") from error
        self._task = asyncio.create_task(self._run())

    async def observe(self) -> Observation | Unknown:
        await self._first_look()
        if self._seen is None:
            self._seen = self._observation()
        return self._seen

    async def apply(self, action: Effect) -> None:
        """As the Protocol says. What was taken on and is lost in a crash is planned again."""
        await self._first_look()
        services, lease = self._sight.services, self._leading()
        if services is None or self._problem:
            raise BackendUnreachable(self._problem)
        if lease is None:
            raise Transient("another reconciler leads")
        service = services.get(action.name)
        if action.name in self._sight.foreign:
            raise NotOurs(f"{action.name} {steps.NOT_OURS}; remove it there, or rename this one")
        match action:
            case Create(workload=workload) | Update(workload=workload):
                self._take(workload, service, lease)
            case Delete(name=name, deployment=deployment):
                self._remove(name, deployment, service, lease)

    async def release(self, replica_ids: Collection[str]) -> None:
        for told in self._told.values():
            goal = told.goal
            if isinstance(goal, steps.Removal):
                mine = {r for r in replica_ids if r.startswith(f"{goal.name}-")} - goal.released
                if mine:
                    told.goal = replace(goal, released=goal.released | mine)
                    self._kick.set()

    async def close(self) -> None:
        """Stops looking; services go on, and requests under way are taken up by the next one."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self.api.close()

    def _take(self, workload: Workload, service: Service | None, lease: int) -> None:
        name, told = workload.name, self._told.get(workload.name)
        flight = self._notes.flight(name)
        leaving = service and service_state(service.status, name).stage is Stage.LEAVING
        if (
            leaving
            or (told and isinstance(told.goal, steps.Removal))
            or (flight and flight.verb == "down")
        ):
            raise Waiting(f"{name} is still being deleted", retry_after_s=self._pace.least_s * 4)
        if told is not None and told.goal == workload and told.lease == lease:
            return
        check(workload)
        _check_namespace(workload, service)
        # Fails here and now where a secret is missing.
        self._outbox.secrets(workload)
        again = told is None and self._sight.retry_due(name, self._pace.again_after_s)
        step = steps.next_step(workload, service, self._owner, 0.0, again=again)
        if step == steps.Settled() and told is None and flight is None:
            return
        if again:
            self._sight.tried_again(name)
        self._told[name] = _Told(workload, lease, self._looks, again=again)
        self._changed()

    def _remove(self, name: str, deployment: str, service: Service | None, lease: int) -> None:
        told, flight = self._told.get(name), self._notes.flight(name)
        if service is None and flight is None:
            if self._told.pop(name, None):
                self._changed()
            return
        if told is not None and isinstance(told.goal, steps.Removal) and told.lease == lease:
            return
        until = self._clock() + self._notes.of(name).drain_timeout_s
        goal = steps.Removal(name, deployment, until)
        self._told[name] = _Told(goal, lease, self._looks)
        self._changed()

    async def _first_look(self) -> None:
        if not self._looked.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pace.first_look_s):
                    await self._looked.wait()

    async def _run(self) -> None:
        while True:
            self._kick.clear()
            try:
                await self._round()
            except Exception:
                # A defect must not end the watch; what is told stays told.
                log.exception("a round failed")
                self._problem = "a round failed; see the log"
                self._news()
            self._looked.set()
            await asyncio.sleep(self._pace.least_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s()):
                    await self._kick.wait()

    async def _round(self) -> None:
        """One look, and what follows from it."""
        self._looks += 1
        look = self._looks
        try:
            pending = await self._finish_requests()
            services = await self._sight.look()
        except (BackendUnreachable, Refusal) as error:
            problem = plain(str(error)) or "no reason given"
            if not self._problem:
                log.warning("SkyPilot cannot be asked: %s", problem)
            self._problem = problem
            self._news()
            return
        self._problem = ""
        await self._notes.learn(self._sight.ours, self._told.keys())
        await self._act(services, pending, look)
        self._news()

    async def _finish_requests(self) -> list[Pending] | None:
        """Our unfinished requests (None where that was not asked); results of finished are taken in."""
        flights, there = self._notes.flights(), self._sight.services or {}
        creating = any(
            isinstance(t.goal, Workload) and name not in there for name, t in self._told.items()
        )
        if not flights and not creating:
            return None
        pending = await self.api.pending()
        running = {request.request_id for request in pending}
        busy = {request.name.removeprefix("sky.") for request in pending}
        done: list[tuple[str, Flight, str]] = []
        for name, flight in flights.items():
            if flight.request_id is None:
                unseen = f"serve.{flight.verb}" not in busy
                self._lost[name] = self._lost.get(name, 0) + 1 if unseen else 0
                if self._lost[name] >= LOST_AFTER_ROUNDS:
                    del self._lost[name]
                    await self._notes.landed(name)
            elif flight.request_id not in running:
                done.append((name, flight, flight.request_id))
        await _some_at_once(self._take_result(*item) for item in done)
        return pending

    async def _take_result(self, name: str, flight: Flight, request_id: str) -> None:
        told = self._told.get(name)
        try:
            await self.api.result(request_id, self._pace.least_s + 5.0)
        except TimeoutError:
            return
        except RequestUnknown:
            log.warning("SkyPilot forgot the %s request for %s; asking again", flight.verb, name)
        except Refusal as error:
            self._failed(name, told, flight.verb, error)
        else:
            log.info("%s: %s done", name, flight.verb)
            if told is not None:
                told.failures, told.trouble, told.stalled, told.again = 0, "", False, False
        if told is not None:
            told.since = self._looks - 1
        await self._notes.landed(name)

    def _failed(self, name: str, told: _Told | None, verb: str, error: Refusal) -> None:
        text = self._outbox.words(told.goal if told else None, verb, error)
        log.warning("%s: %s", name, text)
        if told is None:
            return
        if not error.interrupted:
            told.failures += 1
            told.trouble, told.stalled = text, for_a_human(error)
        told.again_at = self._clock() + backoff_s(
            told.failures,
            base_s=self._pace.retry_s * (SELDOM if told.stalled else 1),
            cap_s=600.0,
        )

    async def _act(
        self, services: Mapping[str, Service], pending: list[Pending] | None, look: int
    ) -> None:
        """The next request for every name that needs one."""
        lease, now = self._leading(), self._clock()
        mine = {flight.request_id for flight in self._notes.flights().values()}
        # Somebody's `up` under our name whose end is not known: perhaps of the reconciler before.
        strange = any(
            r.name.removeprefix("sky.") == "serve.up" and r.request_id not in mine
            for r in pending or ()
        )
        due: list[tuple[str, _Told, steps.Step]] = []
        for name, told in list(self._told.items()):
            if told.lease != lease:
                # Told under a lease that is gone: what is wanted now, the plan says anew.
                del self._told[name]
                continue
            if self._notes.flight(name) or told.since >= look or told.again_at > now:
                continue
            step = steps.next_step(
                told.goal, services.get(name), self._owner, now, again=told.again
            )
            match step:
                case steps.Settled():
                    del self._told[name]
                case steps.Refused(reason=reason):
                    # What is seen of it says so too, and the plan leaves it alone.
                    log.warning("%s: %s", name, reason)
                    del self._told[name]
                case steps.Wait(reason=reason):
                    told.trouble, told.stalled = reason, False
                case steps.Up() if pending is None or strange:
                    told.trouble = "an earlier request to create a service is still under way"
                case _:
                    due.append((name, told, step))
        await _some_at_once(self._send(*item) for item in due)

    async def _send(self, name: str, told: _Told, step: steps.Step) -> None:
        try:
            verb, body = await self._outbox.prepare(told.goal, step)
        except Refusal as error:
            return self._failed(name, told, "run it", error)
        except (BackendUnreachable, Stalled) as error:
            told.trouble, told.stalled = str(error), isinstance(error, Stalled)
            told.again_at = self._clock() + self._pace.retry_s
            return None
        try:
            await self._outbox.send(told.goal, verb, body)
        except Refusal as error:
            return self._failed(name, told, verb, error)
        except BackendUnreachable as error:
            # Whether it was taken on is not known; the next rounds find out.
            told.trouble = str(error)
        except OSError as error:
            told.trouble = f"{self._notes.dir.path} takes nothing: {error.strerror}"
            told.again_at = self._clock() + self._pace.retry_s
        else:
            told.trouble, told.stalled = "", False
        return None

    def _pause_s(self) -> float:
        waiting = any(not told.stalled for told in self._told.values())
        moving = waiting or self._problem or self._notes.flights() or self._sight.moving
        return self._pace.moving_s if moving else self._pace.idle_s

    def _observation(self) -> Observation | Unknown:
        services = self._sight.services
        if services is None or self._problem:
            return Unknown(self.name, self._problem)
        foreign, flights = self._sight.foreign, self._notes.flights()
        names = (self._sight.ours.keys() | self._told.keys() | flights.keys()) - foreign
        workloads: dict[str, ObservedWorkload] = {}
        for name in sorted(names):
            service, told, note = services.get(name), self._told.get(name), self._notes.of(name)
            known = Known(
                told=told.goal if told else None,
                under_way=_under_way(note.flight),
                digests=note.digests,
                template=note.template,
                template_digest=note.template_digest,
                trouble=told.trouble if told else "",
                stalled=told.stalled if told else False,
                stuck=self._sight.stuck(service, self._pace.stuck_after_s) if service else "",
            )
            if (shown := observed(name, service, known)) is not None:
                idle = told is None and note.flight is None and not shown.quarantined
                due = idle and self._sight.retry_due(name, self._pace.again_after_s)
                workloads[name] = replace(shown, gave_up=due)
        return Observation(self.name, workloads, foreign)

    def _changed(self) -> None:
        """Something was told: it shows at once, and the next round is not waited for."""
        self._seen = None
        self._notify()
        self._kick.set()

    def _news(self) -> None:
        """Tells the loop, where what would be observed differs from what it was told last."""
        self._seen = self._observation()
        if self._seen != self._said:
            self._said = self._seen
            self._notify()


def _check_namespace(workload: Workload, service: Service | None) -> None:
    marks = service.marks if service else None
    wanted = workload.template.scheduling.namespace or ""
    if marks is not None and marks.namespace != wanted:
        raise Stalled(
            f"{workload.name} runs in namespace {marks.namespace or 'of its context'}, and SkyPilot moves no "
            f"service; to run it in {wanted or 'that of its context'}, delete the deployment, and make it anew"
        )


def _under_way(flight: Flight | None) -> UnderWay | None:
    if flight is None:
        return None
    return UnderWay(flight.verb, flight.deployment, flight.spec_digest, flight.wanted)


async def _some_at_once(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    limit = asyncio.Semaphore(CALLS_AT_ONCE)

    async def one(item: Coroutine[Any, Any, None]) -> None:
        async with limit:
            await item

    await asyncio.gather(*map(one, work))
