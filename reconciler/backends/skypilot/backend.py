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
import random
import re
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from reconciler.backends.secret_values import redact, resolve
from reconciler.backends.skypilot.api import (
    ApiSettings,
    Pending,
    Refusal,
    RequestUnknown,
    SkyPilotApi,
)
from reconciler.backends.skypilot.requests import (
    DRAIN_TIMEOUT_S,
    Flight,
    Note,
    RequestDir,
    Verb,
)
from reconciler.backends.skypilot.rows import RowReader
from reconciler.core.action import Create, Delete, Effect, Update
from reconciler.core.backoff import delay_s
from reconciler.core.observed import Observation, ObservedWorkload, Phase, Unknown
from reconciler.core.plan import template_data
from reconciler.core.skypilot import steps
from reconciler.core.skypilot.render import check, service_task
from reconciler.core.skypilot.service import Service
from reconciler.core.skypilot.states import Stage, replica_state, service_state
from reconciler.core.skypilot.view import Known, UnderWay, observed
from reconciler.core.workload import Workload
from reconciler.errors import (
    BackendUnreachable,
    NotOurs,
    ReconcileError,
    Stalled,
    Transient,
    Waiting,
)

log = logging.getLogger("detoserve.skypilot")

_AT_REST: Final = frozenset({Phase.READY, Phase.FAILED})
CALLS_AT_ONCE: Final = 8
# A request whose sending was cut off may reach the server late; it is given up for lost after this.
LOST_AFTER_ROUNDS: Final = 2
_ANSI: Final = re.compile(r"\x1b\[[0-9;]*m")
# What SkyPilot says no to whatever the time; anything else may go away by itself.
_FOR_A_HUMAN: Final = frozenset(
    {
        "InvalidRequest",
        "InvalidSkyPilotConfigError",
        "NoCloudAccessError",
        "NoWorkspaceAccessError",
        "NotSupportedError",
        "PermissionDeniedError",
        "ResourcesUnavailableError",
        "UserRequestRejectedByPolicy",
        "ValueError",
    }
)
_PATHS: Final[dict[Verb, str]] = {
    "up": "/serve/up",
    "update": "/serve/update",
    "down": "/serve/down",
}


@dataclass(frozen=True, slots=True)
class Pace:
    """How often SkyPilot is asked, and when something counts as stuck. Seconds."""

    idle_s: float = 10.0
    moving_s: float = 3.0
    least_s: float = 0.5
    first_look_s: float = 10.0
    """How long the first observation waits for the first answer."""
    retry_s: float = 15.0
    stuck_after_s: float = 900.0


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
        self._environ = environ
        self._leading = leading
        self._pace = pace or Pace()
        self._clock = clock
        self._dir = RequestDir(state_dir)
        self._reader = RowReader()
        self._notes: dict[str, Note] = {}
        self._told: dict[str, _Told] = {}
        self._lost: dict[str, int] = {}
        """Rounds in which a request of unknown fate was not seen."""
        self._since: dict[str, tuple[str, float]] = {}
        self._services: dict[str, Service] | None = None
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
            self._notes = dict(await asyncio.to_thread(lambda: list(self._dir.read())))
        except OSError as error:
            raise BackendUnreachable(f"{self._dir.path}: {error.strerror}") from error
        self._task = asyncio.create_task(self._run())

    async def observe(self) -> Observation | Unknown:
        await self._first_look()
        if self._seen is None:
            self._seen = self._observation()
        return self._seen

    async def apply(self, action: Effect) -> None:
        """As the Protocol says. What was taken on and is lost in a crash is planned again."""
        await self._first_look()
        services, lease = self._services, self._leading()
        if services is None or self._problem:
            raise BackendUnreachable(self._problem)
        if lease is None:
            raise Transient("another reconciler leads")
        service = services.get(action.name)
        if service is not None and service.marks is not None and not self._is_ours(service):
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
        flight = self._flight(name)
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
        # Fails here and now where a secret is missing.
        self._secrets(workload)
        as_wanted = steps.next_step(workload, service, self._owner, 0.0) == steps.Settled()
        if as_wanted and told is None and flight is None:
            return
        self._told[name] = _Told(workload, lease, self._looks)
        self._changed()

    def _remove(self, name: str, deployment: str, service: Service | None, lease: int) -> None:
        told, flight = self._told.get(name), self._flight(name)
        if service is None and flight is None:
            if self._told.pop(name, None):
                self._changed()
            return
        if told is not None and isinstance(told.goal, steps.Removal) and told.lease == lease:
            return
        note = self._notes.get(name)
        drain_s = note.drain_timeout_s if note else DRAIN_TIMEOUT_S
        goal = steps.Removal(name, deployment, self._clock() + drain_s)
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
            services = await self._look()
        except (BackendUnreachable, Refusal) as error:
            problem = _plain(str(error)) or "no reason given"
            if not self._problem:
                log.warning("SkyPilot cannot be asked: %s", problem)
            self._problem = problem
            self._news()
            return
        self._problem = ""
        self._services = services
        await self._note_down(services)
        self._since = self._statuses(services)
        await self._act(services, pending, look)
        self._news()

    async def _look(self) -> dict[str, Service]:
        try:
            rows = await self.api.status()
        except Refusal as error:
            if error.kind != "ClusterNotUpError" or "No live services" not in str(error):
                raise
            # So it says where there never was a controller, and where it takes one for stopped.
            if self._services or self._notes:
                await self._believe_gone()
            return {}
        services = await asyncio.to_thread(self._reader.read, rows)
        return {name: self._with_task(service) for name, service in services.items()}

    async def _believe_gone(self) -> None:
        """Raises: BackendUnreachable, where services may well live on under a controller that is not seen."""
        if await self.api.has_controller():
            raise BackendUnreachable(
                "SkyPilot takes the controller of its services for stopped; start it again with: "
                "sky start NAME, where sky status -u shows its name"
            )

    def _with_task(self, service: Service) -> Service:
        """The service as of its last version that had a task: an update numbers the next one first.

        An update that was cut off leaves it so; what was last known of the service is then in its note.
        """
        if service.marks is not None:
            return service
        note = self._notes.get(service.name)
        if note is None or note.incarnation != service.incarnation:
            return service
        return replace(service, version=max(note.digests, default=1), marks=note.marks)

    async def _finish_requests(self) -> list[Pending] | None:
        """Our unfinished requests (None where that was not asked); results of finished are taken in."""
        flights = {n: f for n in self._notes if (f := self._flight(n))}
        creating = any(
            isinstance(t.goal, Workload) and n not in (self._services or {})
            for n, t in self._told.items()
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
                    await self._landed(name)
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
                told.failures, told.trouble, told.stalled = 0, "", False
        if told is not None:
            told.since = self._looks - 1
        await self._landed(name)

    def _failed(self, name: str, told: _Told | None, verb: str, error: Refusal) -> None:
        text = _plain(str(error))
        if told is not None and isinstance(told.goal, Workload):
            with contextlib.suppress(ReconcileError):
                text = redact(text, self._secrets(told.goal).values())
        text = f"SkyPilot refused to {verb}: {error.kind}: {text}"
        log.warning("%s: %s", name, text)
        if told is None:
            return
        if not error.interrupted:
            told.failures += 1
            told.trouble, told.stalled = text, error.kind in _FOR_A_HUMAN
        told.again_at = self._clock() + delay_s(
            told.failures,
            base_s=self._pace.retry_s * (20 if told.stalled else 1),
            cap_s=600.0,
            jitter_fraction=0.2,
            random_value=random.random(),
        )

    async def _act(
        self, services: Mapping[str, Service], pending: list[Pending] | None, look: int
    ) -> None:
        """The next request for every name that needs one."""
        lease, now = self._leading(), self._clock()
        mine = {f.request_id for n in self._notes if (f := self._flight(n))}
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
            if self._flight(name) or told.since >= look or told.again_at > now:
                continue
            step = steps.next_step(told.goal, services.get(name), self._owner, now)
            match step:
                case steps.Settled():
                    del self._told[name]
                case steps.Wait(reason=reason) | steps.Refused(reason=reason):
                    told.trouble, told.stalled = reason, isinstance(step, steps.Refused)
                case steps.Up() if pending is None or strange:
                    told.trouble = "an earlier request to create a service is still under way"
                case _:
                    due.append((name, told, step))
        await _some_at_once(self._send(*item) for item in due)

    async def _send(self, name: str, told: _Told, step: steps.Step) -> None:
        """Writes down that a request is sent, sends it, and writes down its id."""
        goal = told.goal
        verb: Verb = "down"
        try:
            if isinstance(goal, Workload):
                verb = "up" if isinstance(step, steps.Up) else "update"
                body = self._body(goal)
                await self.api.check(_yaml(service_task(goal, self._owner) | {"secrets": {}}))
            else:
                body = {"service_names": [name], "purge": False}
            if isinstance(step, steps.Update):
                body["mode"] = step.mode
        except Refusal as error:
            return self._failed(name, told, verb, error)
        except (BackendUnreachable, Stalled) as error:
            told.trouble, told.stalled = str(error), isinstance(error, Stalled)
            told.again_at = self._clock() + self._pace.retry_s
            return None
        return await self._fly(name, told, verb, body)

    async def _fly(self, name: str, told: _Told, verb: Verb, body: dict[str, Any]) -> None:
        goal, note = told.goal, self._notes.get(name, Note())
        flight = Flight(verb, goal.deployment, "", 0)
        if isinstance(goal, Workload):
            flight = Flight(verb, goal.deployment, goal.spec_digest, goal.replicas)
            note = msgspec.structs.replace(
                note,
                template=template_data(goal.template),
                template_digest=goal.spec_digest,
                drain_timeout_s=goal.rollout.drain_timeout,
            )
        try:
            await self._write(name, msgspec.structs.replace(note, flight=flight), sync=True)
            log.info("%s: asking SkyPilot: %s", name, verb)
            request_id = await self.api.submit(_PATHS[verb], body)
            flight = msgspec.structs.replace(flight, request_id=request_id)
            await self._write(name, msgspec.structs.replace(note, flight=flight), sync=True)
        except BackendUnreachable as error:
            # Whether it was taken on is not known; the next rounds find out.
            told.trouble = str(error)
        except Refusal as error:
            self._failed(name, told, verb, error)
            await self._landed(name)
        except OSError as error:
            told.trouble = f"{self._dir.path} takes nothing: {error.strerror}"
            told.again_at = self._clock() + self._pace.retry_s
        else:
            told.trouble, told.stalled = "", False

    def _body(self, workload: Workload) -> dict[str, Any]:
        """The body that says what to run; it holds the values of secrets, and goes nowhere else."""
        task = service_task(workload, self._owner)
        values = self._secrets(workload)
        if values:
            task["secrets"] = values
        body = {"service_name": workload.name, "task": _yaml(task)}
        if namespace := workload.template.scheduling.namespace:
            config = {"kubernetes": {"namespace": namespace}}
            return {**body, "override_skypilot_config": config}
        return body

    def _secrets(self, workload: Workload) -> dict[str, str]:
        """Values for SkyPilot; those in Kubernetes stay there."""
        named = workload.template.runtime.secrets
        return resolve(
            {n: r for n, r in named.items() if r.kubernetes_secret is None}, self._environ
        )

    async def _landed(self, name: str) -> None:
        """The request for a name is done with, one way or the other."""
        self._lost.pop(name, None)
        note = self._notes.get(name)
        if note is not None and note.flight is not None:
            with contextlib.suppress(OSError):
                await self._write(name, msgspec.structs.replace(note, flight=None))

    async def _note_down(self, services: Mapping[str, Service]) -> None:
        """Which version of which service ran which template; and forgets those that are gone."""
        for name, service in services.items():
            if service.marks is None or not self._is_ours(service):
                continue
            note = self._notes.get(name, Note())
            same = note.incarnation == service.incarnation
            digests = dict(note.digests) if same else {}
            if (
                digests.get(service.version) != service.marks.spec_digest
                or note.marks != service.marks
            ):
                digests[service.version] = service.marks.spec_digest
                fresh = msgspec.structs.replace(
                    note, incarnation=service.incarnation, digests=digests, marks=service.marks
                )
                with contextlib.suppress(OSError):
                    await self._write(name, fresh)
        for name in self._notes.keys() - services.keys():
            if not self._flight(name) and name not in self._told:
                del self._notes[name]
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(self._dir.remove, name)

    async def _write(self, name: str, note: Note, *, sync: bool = False) -> None:
        await asyncio.to_thread(self._dir.write, name, note, sync=sync)
        self._notes[name] = note

    def _flight(self, name: str) -> Flight | None:
        note = self._notes.get(name)
        return note.flight if note else None

    def _is_ours(self, service: Service) -> bool:
        return service.marks is not None and service.marks.owner == self._owner

    def _statuses(self, services: Mapping[str, Service]) -> dict[str, tuple[str, float]]:
        """Since when each of ours shows what it shows."""
        now, since = self._clock(), {}
        for name, service in services.items():
            if self._is_ours(service):
                shows = service.status if service.answering else f"{service.status} silent"
                before = self._since.get(name)
                since[name] = before if before and before[0] == shows else (shows, now)
        return since

    def _stuck(self, name: str, service: Service) -> str:
        shows, since = self._since.get(name, ("", self._clock()))
        for_s = self._clock() - since
        stage = service_state(service.status, name).stage
        if for_s < self._pace.stuck_after_s:
            return ""
        if stage is Stage.LEAVING:
            return (
                f"SkyPilot has been taking it down for {for_s / 60:.0f} min; if it stays so, look for "
                f"machines left running, then run: sky serve down --purge {name}"
            )
        if stage is Stage.BUSY or shows.endswith("silent"):
            return (
                f"its controller has not come up or not answered for {for_s / 60:.0f} min; look at: "
                f"sky serve logs --controller {name}"
            )
        return ""

    def _pause_s(self) -> float:
        moving = bool(self._told or self._problem) or any(map(self._flight, self._notes))
        for service in (self._services or {}).values():
            if not moving and self._is_ours(service):
                stage = service_state(service.status, service.name).stage
                phases = {replica_state(r.status).phase for r in service.replicas}
                moving = stage in (Stage.BUSY, Stage.LEAVING) or not phases <= _AT_REST
        return self._pace.moving_s if moving else self._pace.idle_s

    def _observation(self) -> Observation | Unknown:
        services = self._services
        if services is None or self._problem:
            return Unknown(self.name, self._problem)
        foreign = {n for n, s in services.items() if s.marks is not None and not self._is_ours(s)}
        names = {n for n, s in services.items() if self._is_ours(s)}
        names |= self._told.keys() | {n for n in self._notes if self._flight(n)}
        workloads: dict[str, ObservedWorkload] = {}
        for name in sorted(names - foreign):
            service, told, note = services.get(name), self._told.get(name), self._notes.get(name)
            flight = note.flight if note else None
            known = Known(
                told=told.goal if told else None,
                under_way=UnderWay(
                    flight.verb, flight.deployment, flight.spec_digest, flight.wanted
                )
                if flight
                else None,
                digests=note.digests if note else None,
                template=note.template if note else None,
                template_digest=note.template_digest if note else "",
                trouble=told.trouble if told else "",
                stalled=told.stalled if told else False,
                stuck=self._stuck(name, service) if service else "",
            )
            if (shown := observed(name, service, known)) is not None:
                workloads[name] = shown
        return Observation(self.name, workloads, frozenset(foreign))

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


def _yaml(task: Mapping[str, Any]) -> str:
    """JSON is YAML."""
    return msgspec.json.encode(task).decode()


async def _some_at_once(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    limit = asyncio.Semaphore(CALLS_AT_ONCE)

    async def one(item: Coroutine[Any, Any, None]) -> None:
        async with limit:
            await item

    await asyncio.gather(*map(one, work))


def _plain(text: str) -> str:
    """Without colours and line breaks, and not endless."""
    return " ".join(_ANSI.sub("", text).split())[:500]
