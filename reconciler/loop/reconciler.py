"""One pass after another: what every edge says goes through core, and what core decides goes out.

Publishing comes before applying: routes follow from what is observed, not from what is planned, so a
revoked key or a removed deployment never waits for a slow backend. Not here: any decision (core).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from reconciler.backends.base import Backend
from reconciler.core.action import Effect, Plan
from reconciler.core.backoff import delay_s
from reconciler.core.compile import compile_workloads, platform_of
from reconciler.core.last_good import Effective, Objects, effective
from reconciler.core.observed import Observation, Unknown
from reconciler.core.plan import Pending, PlanPolicy, parse_confirmation, plan
from reconciler.core.routes import changed_deployments, compile_routes, released
from reconciler.core.status import RoutingView, World
from reconciler.core.workload import Desired
from reconciler.errors import (
    Fenced,
    ReconcileError,
    SourceInvalid,
    SourceUnreachable,
    Stalled,
    Transient,
    Waiting,
)
from reconciler.loop.ports import Config, Leadership, Routers, Routes
from reconciler.loop.state import State, StateFile
from reconciler.publish.lease import Held
from schemas.platform import PlatformSpec
from schemas.wire.routing import RoutingTable

log = logging.getLogger("detoserve.reconciler")

APPLY_AT_ONCE = 16
OBSERVE_TIMEOUT_S = 30.0


@dataclass(slots=True)
class _Failure:
    """A workload's failed action: not tried again before `until`, unless what is wanted changes."""

    count: int
    until: float
    reason: str
    wanted: object


@dataclass(slots=True)
class Memory:
    """What one pass leaves to the next. All of it can be rebuilt."""

    effective: Effective | None = None
    desired: Desired = field(default_factory=Desired)
    objects: Objects | None = None
    known: frozenset[str] | None = None
    observed: tuple[Observation | Unknown, ...] = ()
    plan: Plan = field(default_factory=Plan)
    table: RoutingTable | None = None
    routes_due: bool = True
    """What routes follow from has changed since they were last published."""
    generation: int = 0
    changed_at: dict[str, int] = field(default_factory=dict)
    failures: dict[str, _Failure] = field(default_factory=dict)
    source_problem: str = ""


class Reconciler:
    """Owns no edge: it is given them, and given back the same state whatever happened before."""

    def __init__(
        self,
        *,
        config: Config,
        backends: Mapping[str, Backend],
        routes: Routes,
        routers: Routers,
        leadership: Leadership,
        state_file: StateFile,
        on_world: Callable[[World], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._backends = backends
        self._routes = routes
        self._routers = routers
        self._leadership = leadership
        self._state_file = state_file
        self._on_world = on_world
        self._clock = clock
        self._wake = asyncio.Event()
        self._fetch_due = True
        self.memory = Memory()

    def wake(self, *, fetch: bool = False) -> None:
        """Something may have changed: a commit (`fetch`), a replica, a router, the lease."""
        self._fetch_due = self._fetch_due or fetch
        self._wake.set()

    def platform(self) -> PlatformSpec:
        """The Platform in effect, or its defaults."""
        current = self.memory.effective
        return platform_of(current.objects) if current else PlatformSpec()

    def restore(self) -> None:
        """Takes up what the last reconciler on this state directory left."""
        state = self._state_file.load()
        self.memory.objects = state.objects
        self.memory.known = state.known
        self.memory.generation = state.generation

    async def run(self, stop: asyncio.Event) -> None:
        """Passes until `stop` is set. Every failure is logged and tried again; none ends the loop."""
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                self._wake.clear()
                try:
                    await self.one_pass()
                except Exception:
                    # A defect must not take the fleet's reconciler down; the next pass starts afresh.
                    log.exception("a pass failed")
                waking = asyncio.create_task(self._wake.wait())
                await asyncio.wait(
                    {waking, stopping},
                    timeout=self._pause_s(),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                waking.cancel()
        finally:
            stopping.cancel()

    def _pause_s(self) -> float:
        intervals = self.platform().intervals
        pause = max(0.05, intervals.resync)
        now = self._clock()
        for failure in self.memory.failures.values():
            pause = min(pause, max(0.05, failure.until - now))
        return pause

    async def one_pass(self) -> None:
        """Fetch -> load -> compile -> observe -> plan -> publish -> apply -> status."""
        memory = self.memory
        await self._take_in_config()
        observed = await self._observe()
        current = memory.effective
        if current is None:
            self._tell(observed)
            return
        if observed != memory.observed:
            memory.routes_due = True
        memory.observed = observed

        policy = self._policy(current)
        made = plan(memory.desired, observed, policy, self._clock())
        if made.staying != memory.plan.staying:
            memory.routes_due = True
        memory.plan = made
        lease = self._leadership.held
        if lease is None:
            self._tell(observed)
            return
        if await self._publish(current, observed, lease):
            await self._apply(made)
            await self._release(observed)
            self._remember(observed)
        self._tell(observed)

    async def _take_in_config(self) -> None:
        memory = self.memory
        if not self._fetch_due:
            return
        self._fetch_due = False
        try:
            reading = await self._config.read(memory.objects)
        except (SourceUnreachable, SourceInvalid, Transient) as error:
            if memory.source_problem != str(error):
                log.warning("config repo: %s", error)
            memory.source_problem = str(error)
            self._fetch_due = True
            return
        memory.source_problem = ""
        loaded, before = reading.loaded, memory.effective
        if before is not None and before.digest == loaded.digest:
            if before.revision != loaded.revision:
                memory.effective = replace(before, revision=loaded.revision)
                memory.routes_due = True
            return
        merged = effective(loaded, {**reading.earlier, **(memory.objects or {})})
        if before is None or merged.objects != before.objects or merged.held != before.held:
            log.info(
                "config %s: %d objects, %d problems",
                merged.revision[:12],
                len(merged.objects),
                len(merged.problems),
            )
        for problem in merged.problems:
            log.warning("config: %s", problem)
        memory.effective = merged
        memory.routes_due = True
        memory.objects = merged.objects
        memory.desired = compile_workloads(merged)
        named = frozenset(k.name for k in merged.objects if k.kind == "Deployment")
        if memory.known is not None or before is not None:
            named |= memory.known or frozenset()
        memory.known = named

    async def _observe(self) -> tuple[Observation | Unknown, ...]:
        async def one(backend: Backend) -> Observation | Unknown:
            try:
                async with asyncio.timeout(OBSERVE_TIMEOUT_S):
                    return await backend.observe()
            except TimeoutError:
                return Unknown(backend.name, f"no answer within {OBSERVE_TIMEOUT_S:g} s")

        return tuple(await asyncio.gather(*map(one, self._backends.values())))

    def _policy(self, current: Effective) -> PlanPolicy:
        memory = self.memory
        for name, failure in list(memory.failures.items()):
            workload = memory.desired.workloads.get(name)
            if failure.wanted != workload:
                del memory.failures[name]
        head = self._config.head
        return PlanPolicy(
            prune=self.platform().prune,
            known=memory.known,
            confirmation=parse_confirmation(head.message) if head else None,
            parents=head.parents if head else (),
            revision=current.revision,
            rewritten=self._config.rewritten,
            pending={n: Pending(f.until, f.reason) for n, f in memory.failures.items()},
        )

    async def _publish(
        self,
        current: Effective,
        observed: Sequence[Observation | Unknown],
        lease: Held,
    ) -> bool:
        """True once routers can have what follows from this pass; nothing is applied before."""
        memory = self.memory
        if not memory.routes_due:
            return True
        try:
            before = memory.table or await self._routes.current()
            table = compile_routes(
                current.objects,
                memory.desired,
                observed,
                before,
                revision=current.revision,
                staying=memory.plan.staying,
            )
            generation = await self._routes.publish(table, lease=lease, floor=memory.generation)
        except Fenced as error:
            log.error("routes not published: %s", error)  # noqa: TRY400 - the message says it all
            return False
        except Transient as error:
            log.warning("routes not published, routers keep what they have: %s", error)
            return False
        for name in changed_deployments(before, table):
            memory.changed_at[name] = generation
        memory.table = table
        memory.generation = generation
        memory.routes_due = False
        return True

    async def _apply(self, made: Plan) -> None:
        if made.empty:
            return
        limit = asyncio.Semaphore(APPLY_AT_ONCE)

        async def one(action: Effect) -> None:
            async with limit:
                await self._apply_one(action)

        await asyncio.gather(*map(one, made.effects))
        self.wake()

    async def _apply_one(self, action: Effect) -> None:
        memory = self.memory
        name = action.name
        wanted = memory.desired.workloads.get(name)
        backend = self._backends[
            action.backend if not hasattr(action, "workload") else action.workload.backend
        ]
        log.info("%s %s: %s", type(action).__name__.lower(), name, action.reason)
        before = memory.failures.get(name)
        try:
            await backend.apply(action)
        except Waiting as error:
            count = before.count if before else 0
            until = self._clock() + error.retry_after_s
            memory.failures[name] = _Failure(count, until, str(error), wanted)
        except ReconcileError as error:
            count = (before.count if before else 0) + 1
            base_s = 30.0 if isinstance(error, Stalled) else 1.0
            pause_s = delay_s(
                count, base_s=base_s, cap_s=600.0, jitter_fraction=0.2, random_value=random.random()
            )
            log.warning("%s: %s; next try in %.0f s", name, error, pause_s)
            memory.failures[name] = _Failure(count, self._clock() + pause_s, str(error), wanted)
        else:
            memory.failures.pop(name, None)

    async def _release(self, observed: Sequence[Observation | Unknown]) -> None:
        beats = self._routers.alive()
        if beats is None:
            return
        routers = {name: (beat.generation, beat.in_flight) for name, beat in beats.items()}
        free = released(observed, self.memory.generation, routers)
        if free:
            await asyncio.gather(*(b.release(free) for b in self._backends.values()))

    def _remember(self, observed: Sequence[Observation | Unknown]) -> None:
        memory = self.memory
        if memory.known is not None and not any(isinstance(o, Unknown) for o in observed):
            # A deployment that is gone from the repo is forgotten once nothing of it runs.
            alive = {
                w.deployment
                for o in observed
                if isinstance(o, Observation)
                for w in o.workloads.values()
            }
            named = {k.name for k in memory.objects or () if k.kind == "Deployment"}
            memory.known &= alive | named
        try:
            self._state_file.save(State(memory.objects, memory.known, memory.generation))
        except OSError as error:
            log.warning("state not saved, a restart will be cautious: %s", error)

    def _tell(self, observed: Sequence[Observation | Unknown]) -> None:
        memory = self.memory
        if memory.effective is None:
            return
        beats = self._routers.alive() or {}
        view = RoutingView(
            generation=memory.generation,
            revision=memory.table.revision if memory.table else "",
            routers={name: beat.generation for name, beat in beats.items()},
            changed_at=dict(memory.changed_at),
        )
        failures = {n: f.reason for n, f in memory.failures.items()}
        self._on_world(
            World(
                memory.effective,
                memory.desired,
                observed,
                memory.plan,
                view,
                failures,
                memory.source_problem,
            )
        )
