"""One pass after another: what every edge says goes through core, and what core decides goes out.

Publishing comes before applying: routes follow from what is observed, not from what is planned, so a
revoked key or a removed deployment never waits for a slow backend. Not here: any decision (core).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from reconciler.again import backoff_s
from reconciler.backends.base import Backend
from reconciler.core.action import Plan
from reconciler.core.compile import compile_workloads, places_of, platform_of
from reconciler.core.last_good import Effective, Objects, effective
from reconciler.core.observed import Observation, Unknown
from reconciler.core.placement import Catalogue
from reconciler.core.plan import PlanPolicy, parse_confirmation, plan
from reconciler.core.price_questions import Question, price_questions
from reconciler.core.routes import changed_deployments, compile_routes, released
from reconciler.core.signals import Signals
from reconciler.core.status import RoutingView, World
from reconciler.core.steer import Steering, resumed, steer
from reconciler.core.workload import Desired
from reconciler.errors import ReconcileError, Stalled, Transient
from reconciler.loop.effects import Effects
from reconciler.loop.ports import Config, Leadership, Prices, Reading, Reverts, Routers, Routes
from reconciler.loop.revert_task import RevertTask
from reconciler.loop.state import State, StateFile
from reconciler.loop.status_task import rfc3339_now
from reconciler.publish.lease import Held
from schemas.platform import PlatformSpec
from schemas.wire.routing import RoutingTable

log = logging.getLogger("detoserve.reconciler")

OBSERVE_TIMEOUT_S = 30.0
FETCH_PATIENCE_S = 1.0
"""How long a pass waits for the config repo before it goes on with what is in effect."""
FETCH_AGAIN_BASE_S = 1.0
FETCH_AGAIN_CAP_S = 60.0
PUBLISH_AGAIN_S = 1.0
STEER_EVERY_S = 1.0
"""Between passes while load or a roll may change what is wanted."""
PRICES_AGAIN_S = 300.0
PRICES_LAST_S = 24 * 3600.0


@dataclass(slots=True)
class Memory:
    """What one pass leaves to the next. All of it can be rebuilt."""

    effective: Effective | None = None
    desired: Desired = field(default_factory=Desired)
    compile_due: bool = False
    compiled: Desired = field(default_factory=Desired)
    """As Git says; `desired` is what came of it with load and rolls."""
    steering: Steering = field(default_factory=Steering)
    restless: bool = False
    """Load or a roll may change what is wanted at any time."""
    catalogue: Catalogue = field(default_factory=dict)
    asked: frozenset[Question] = frozenset()
    """Prices that the catalogue was asked for and has answered, or has not been able to."""
    ask_again_at: float = inf
    places: Mapping[str, str] = field(default_factory=dict)
    """Deployment -> the cluster it was put in."""
    objects: Objects | None = None
    known: frozenset[str] | None = None
    observed: tuple[Observation | Unknown, ...] = ()
    plan: Plan = field(default_factory=Plan)
    table: RoutingTable | None = None
    routes_due: bool = True
    """What routes follow from has changed since they were last published."""
    generation: int = 0
    changed_at: dict[str, int] = field(default_factory=dict)
    source_problem: str = ""
    routing_problem: str = ""
    lease: int = 0
    """Generation under which this reconciler published last."""


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
        on_source_problem: Callable[[str], None] = lambda _: None,
        signals: Signals | None = None,
        reverts: Reverts | None = None,
        prices: Prices | None = None,
        clock: Callable[[], float] = time.monotonic,
        now_text: Callable[[], str] = rfc3339_now,
    ) -> None:
        self._config = config
        self._backends = backends
        self._routes = routes
        self._routers = routers
        self._leadership = leadership
        self._state_file = state_file
        self._on_world = on_world
        self._on_source_problem = on_source_problem
        self._signals = signals or Signals()
        self._reverts = RevertTask(reverts, self._proposed) if reverts is not None else None
        self._prices = prices
        self._asking: asyncio.Task[None] | None = None
        self.effects = Effects(backends, leadership, clock)
        self._clock = clock
        self._now_text = now_text
        self._wake = asyncio.Event()
        self._fetch_due = True
        self._fetch_failures = 0
        self._fetch_again_at = inf
        self._reading: asyncio.Task[Reading] | None = None
        self._planned_at = clock()
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
        self.memory.places = state.places
        self.memory.steering = state.steering

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
            for task in (self._reading, self._asking):
                if task is not None:
                    task.cancel()
            if self._reverts is not None:
                self._reverts.cancel()

    def _pause_s(self) -> float:
        now = self._clock()
        pause = min(self.platform().intervals.resync, self._fetch_again_at - now)
        if self.memory.restless:
            pause = min(pause, STEER_EVERY_S)
        if self.memory.routes_due and self._leadership.held is not None:
            pause = min(pause, PUBLISH_AGAIN_S)
        for due_at in self.effects.due_after(self._planned_at):
            pause = min(pause, due_at - now)
        return max(0.05, pause)

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
        if self._clock() >= memory.ask_again_at:
            memory.ask_again_at = inf
            self._ask_prices(price_questions(current.objects))
        if memory.compile_due:
            self._compile(current)
        self._steer(current)

        policy = self._policy(current)
        self._planned_at = self._clock()
        made = plan(memory.desired, observed, policy, self._planned_at)
        self.effects.planned(made)
        if made.staying != memory.plan.staying:
            memory.routes_due = True
        memory.plan = made
        lease = self._leadership.held
        if lease is None:
            self._tell(observed)
            return
        if await self._publish(current, observed, lease):
            # Before the first effect: what is killed while it applies must know its own work again.
            self._remember(observed)
            if not made.empty:
                await self.effects.apply(made, memory.desired)
                self.wake()
            if self._reverts is not None:
                canaries = memory.steering.canaries
                self._reverts.look(canaries, memory.compiled, current.objects)
            await self._release(observed)
        self._tell(observed)

    async def _take_in_config(self) -> None:
        memory = self.memory
        if self._reading is None:
            if not self._fetch_due and self._clock() < self._fetch_again_at:
                return
            self._fetch_due, self._fetch_again_at = False, inf
            self._reading = asyncio.create_task(self._config.read(memory.objects))
        await asyncio.wait({self._reading}, timeout=FETCH_PATIENCE_S)
        if not self._reading.done():
            # A remote that hangs delays no route: its answer wakes a later pass.
            self._reading.remove_done_callback(self._read)
            self._reading.add_done_callback(self._read)
            return
        done, self._reading = self._reading, None
        if self._fetch_due:
            self.wake()  # asked for again meanwhile
        try:
            reading = done.result()
        except ReconcileError as error:
            self._fetch_failures += 1
            pause_s = backoff_s(
                self._fetch_failures,
                base_s=FETCH_AGAIN_BASE_S,
                cap_s=FETCH_AGAIN_CAP_S,
            )
            self._fetch_again_at = self._clock() + pause_s
            self._source_has(str(error))
            return
        self._fetch_failures = 0
        self._source_has(
            f"history was rewritten: the config does not descend from {rewritten_from[:12]} any more, "
            "and nothing is deleted until it does; to accept it, commit with the trailer "
            f"'Detoserve-Accept-History: {rewritten_from}'"
            if (rewritten_from := self._config.rewritten_from)
            else ""
        )
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
        memory.compile_due = True
        named = frozenset(k.name for k in merged.objects if k.kind == "Deployment")
        if memory.known is not None or before is not None:
            named |= memory.known or frozenset()
        memory.known = named

    def _compile(self, current: Effective) -> None:
        memory = self.memory
        # What runs somewhere stays there; of two places, as while it moves, the newest decision counts.
        places = {**places_of(current, memory.observed), **memory.places}
        questions = price_questions(current.objects) if self._prices is not None else frozenset()
        memory.compiled = compile_workloads(
            current,
            places=places,
            catalogue=memory.catalogue,
            unpriced={question.cluster for question in questions - memory.asked},
        )
        if questions - memory.asked:
            self._ask_prices(questions)
        memory.places = {w.deployment: w.cluster for w in memory.compiled.workloads.values()}
        memory.compile_due = False

    def _ask_prices(self, questions: frozenset[Question]) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._take_prices(questions))

    async def _take_prices(self, questions: frozenset[Question]) -> None:
        memory = self.memory
        assert self._prices is not None
        try:
            memory.catalogue = await self._prices.prices(questions)
            pause_s = PRICES_LAST_S
        except Exception as error:  # noqa: BLE001 - nobody awaits this task
            log.warning("prices are not known, so what has none in Git counts last: %s", error)
            pause_s = PRICES_AGAIN_S
        memory.asked = questions
        memory.ask_again_at = self._clock() + pause_s
        memory.compile_due = True
        self.wake()

    def _steer(self, current: Effective) -> None:
        memory, now = self.memory, self._clock()
        before = memory.desired
        steered = steer(
            memory.compiled,
            memory.observed,
            memory.steering,
            self._signals,
            before=before,
            revision=current.revision,
            now=now,
            now_text=self._now_text(),
        )
        for deployment, event in steered.news:
            log.info("Deployment/%s: %s: %s", deployment, event.reason, event.message)
        memory.desired, memory.steering = steered.desired, steered.steering
        memory.restless = steered.restless
        if memory.desired != before:
            memory.routes_due = True
        self._signals.forget(
            now, {(w.routed_as, w.cluster) for w in memory.desired.workloads.values()}
        )

    def _proposed(self, name: str, template: str, branch: str) -> None:
        steering = self.memory.steering
        canary = steering.canaries.get(name)
        if canary is not None and canary.rejected == template:
            self.memory.steering = replace(
                steering,
                canaries={**steering.canaries, name: replace(canary, revert_branch=branch)},
            )
        self.wake()

    def _read(self, _: object) -> None:
        self.wake()

    def _source_has(self, problem: str) -> None:
        if problem and problem != self.memory.source_problem:
            log.warning("config repo: %s", problem)
            self._on_source_problem(problem)
        self.memory.source_problem = problem

    async def _observe(self) -> tuple[Observation | Unknown, ...]:
        async def one(backend: Backend) -> Observation | Unknown:
            try:
                async with asyncio.timeout(OBSERVE_TIMEOUT_S):
                    return await backend.observe()
            except TimeoutError:
                return Unknown(backend.name, f"no answer within {OBSERVE_TIMEOUT_S:g} s")
            except Exception as error:
                # A defect in one backend must not take the others with it.
                log.exception("observing %s failed", backend.name)
                return Unknown(backend.name, f"observing failed: {type(error).__name__}")

        return tuple(await asyncio.gather(*map(one, self._backends.values())))

    def _policy(self, current: Effective) -> PlanPolicy:
        memory, head = self.memory, self._config.head
        return PlanPolicy(
            prune=self.platform().prune,
            known=memory.known,
            confirmation=parse_confirmation(head.message) if head else None,
            parents=head.parents if head else (),
            revision=current.revision,
            rewritten=self._config.rewritten_from is not None,
            pending=self.effects.pending(memory.desired),
        )

    async def _publish(
        self,
        current: Effective,
        observed: Sequence[Observation | Unknown],
        lease: Held,
    ) -> bool:
        """True once routers can have what follows from this pass; nothing is applied before."""
        memory = self.memory
        try:
            holding = lease.require().generation
            if holding != memory.lease:
                # Another may have published since: what is current is looked up anew.
                memory.lease, memory.table, memory.routes_due = holding, None, True
            if not memory.routes_due:
                return True
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
        except (Stalled, Transient) as error:
            if memory.routing_problem != str(error):
                log.warning("routes not published, routers keep what they have: %s", error)
            memory.routing_problem = str(error)
            return False
        placed = {workload.deployment for workload in memory.desired.workloads.values()}
        # After a restart nothing is known of who has what: live is then what has all of it.
        changed = placed if memory.table is None else changed_deployments(before, table)
        memory.changed_at |= dict.fromkeys(changed, generation)
        memory.changed_at = {n: g for n, g in memory.changed_at.items() if n in placed}
        memory.table = table
        memory.generation = generation
        memory.routes_due = False
        memory.routing_problem = ""
        return True

    async def _release(self, observed: Sequence[Observation | Unknown]) -> None:
        beats = self._routers.alive()
        if beats is None:
            return
        routers = {name: (beat.generation, beat.in_flight) for name, beat in beats.items()}
        free = released(observed, self.memory.generation, routers)
        if free:
            done = await asyncio.gather(
                *(b.release(free) for b in self._backends.values()), return_exceptions=True
            )
            for error in done:
                if isinstance(error, Exception):
                    log.warning("not released yet, the drain timeout will: %s", error)

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
            self._state_file.save(
                State(
                    memory.objects,
                    memory.known,
                    memory.generation,
                    memory.places,
                    resumed(memory.steering),
                )
            )
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
        failures = self.effects.failures
        self._on_world(
            World(
                memory.effective,
                memory.desired,
                observed,
                memory.plan,
                view,
                {n: f.reason for n, f in failures.items()},
                frozenset(n for n, f in failures.items() if f.passing),
                memory.source_problem,
                memory.routing_problem,
                steering=memory.steering,
            )
        )
