"""The workloads that are held, and the steps by which their replicas come to be as wanted.

Everything happens on one event loop, and every step is decided anew (rollout) after every change.
Not here: what is promised, on disk and to the loop (backend), or one engine's life (replica).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from reconciler.backends.local.describe import describe
from reconciler.backends.local.launch import Launch, prepare
from reconciler.backends.local.processes import Mark, Running, boot_id, is_alive, kill_session
from reconciler.backends.local.replica import Replica, ReplicaSettings, Surroundings
from reconciler.backends.local.rollout import Member, Room, Steps, decide
from reconciler.backends.local.state import (
    ReplicaProcesses,
    ReplicaRecord,
    StateDir,
    WorkloadRecord,
)
from reconciler.backends.probe import Prober
from reconciler.backends.secret_values import resolve
from reconciler.core.observed import ObservedWorkload, Phase
from reconciler.core.plan import template_data
from reconciler.core.workload import Template, Workload
from reconciler.errors import Stalled
from schemas.cluster import LocalProvider

log = logging.getLogger("detoserve.local")


@dataclass(slots=True)
class Held:
    """One workload as it stands. `record` is None where it cannot be read."""

    name: str
    record: WorkloadRecord | None = None
    unreadable: str = ""
    replicas: dict[str, Replica] = field(default_factory=dict)
    steps: Steps = field(default_factory=Steps)
    timer: asyncio.TimerHandle | None = None

    @property
    def cluster(self) -> str | None:
        return self.record.workload.cluster if self.record else None


class Fleet:
    """All replicas of one owner and place. `news` is called when an observation would differ.

    `environ` is what engines inherit and where secrets are looked up. `pick_port` offers a port.
    """

    def __init__(
        self,
        state: StateDir,
        mark: Mark,
        *,
        news: Callable[[], None],
        environ: Mapping[str, str],
        settings: ReplicaSettings,
        pick_port: Callable[[str], int],
    ) -> None:
        self.held: dict[str, Held] = {}
        self._state = state
        self._mark = mark
        self._news = news
        self._environ = environ
        self._settings = settings
        self._pick_port = pick_port
        self._prober = Prober()
        self._around = Surroundings(
            settings=settings,
            state=state,
            mark=mark,
            prober=self._prober,
            changed=self._changed,
            secrets=self._secret_values,
        )
        self._due: set[str] = set()
        self._order = 0

    async def close(self) -> None:
        """Forgets all replicas, which run on."""
        for held in self.held.values():
            self._cancel_timer(held)
            for replica in held.replicas.values():
                replica.close()
        self.held.clear()
        await self._prober.close()

    def check(self, workload: Workload) -> None:
        """Raises Stalled for what can never work, before anything is touched."""
        if not isinstance(workload.provider, LocalProvider):
            raise Stalled(
                f"cluster {workload.cluster} is {workload.provider.type}, which the local backend "
                "does not run"
            )
        self._prepare(workload.template, workload.name, port=0)

    def converge(self, name: str) -> None:
        """Takes the next steps of one workload; starts at most one process, and comes again."""
        self._due.discard(name)
        held = self.held.get(name)
        if held is None or held.record is None:
            return
        workload = held.record.workload
        self._cancel_timer(held)
        if held.record.deleting:
            for replica in list(held.replicas.values()):
                self._stop(held, replica)
            if not held.replicas:
                self._forget(held)
            return
        now = asyncio.get_running_loop().time()
        steps = decide(
            workload.replicas,
            [_member(replica, workload, now) for replica in held.replicas.values()],
            max_surge=workload.rollout.max_surge,
            blue_green=workload.rollout.strategy == "blueGreen",
            room=self._room(workload),
        )
        if (steps.waiting, steps.without_surge) != (held.steps.waiting, held.steps.without_surge):
            self._news()
        held.steps = steps
        for replica_id in steps.stop:
            self._stop(held, held.replicas[replica_id])
        if steps.restart:
            self._restart(held, workload, held.replicas[steps.restart[0]])
        elif steps.start:
            self._order += 1
            self._launch(held, self._new_record(workload, workload.template, workload.spec_digest))
        if len(steps.restart) + steps.start > 1:
            self.soon(name)
        self._wake_when_due(held, now)

    def _restart(self, held: Held, workload: Workload, failed: Replica) -> None:
        old = failed.record
        same = old.spec_digest == workload.spec_digest
        self._remove(held, failed)
        self._order += 1
        fresh = self._new_record(
            workload, workload.template if same else old.template, old.spec_digest, after=old
        )
        self._launch(held, fresh)

    def _new_record(
        self,
        workload: Workload,
        template: Template,
        spec_digest: str,
        *,
        after: ReplicaRecord | None = None,
    ) -> ReplicaRecord:
        return ReplicaRecord(
            owner=self._mark.owner,
            id=f"{workload.name}-{secrets.token_hex(4)}",
            workload=workload.name,
            deployment=workload.deployment,
            cluster=workload.cluster,
            port=0,
            spec_digest=spec_digest,
            template=template,
            drain_timeout_s=workload.rollout.drain_timeout,
            order=self._order,
            failures=after.failures if after else 0,
            restarts=after.restarts + 1 if after else 0,
            was_ready=after.was_ready if after else False,
        )

    def _launch(self, held: Held, record: ReplicaRecord) -> None:
        """Records a replica, then starts it; what goes wrong is its failure, not the backend's."""
        replica = held.replicas[record.id] = Replica(record, self._around)
        try:
            replica.record = record = replace(record, port=self._port())
            launch = self._prepare(record.template, record.id, port=record.port)
            self._state.write_replica(record)
            replica.start(launch.program, launch.argv, launch.environ)
        except Stalled as error:
            replica.could_not_start(str(error))
        except OSError as error:
            replica.could_not_start(f"it cannot be started: {error.strerror or error}")
        self._state.remove_old_logs(self.ids())
        self._news()

    def _stop(self, held: Held, replica: Replica) -> None:
        assert held.record is not None
        if replica.has_process:
            replica.drain(held.record.workload.rollout.drain_timeout)
        else:
            self._remove(held, replica)

    def _remove(self, held: Held, replica: Replica) -> None:
        replica.close()
        held.replicas.pop(replica.id, None)
        self._state.remove_replica(replica.id)
        self._news()

    def _forget(self, held: Held) -> None:
        self._state.remove_workload(held.name)
        del self.held[held.name]
        self._state.remove_old_logs(self.ids())
        self._news()

    def _changed(self, replica: Replica) -> None:
        """A replica has news. Steps are taken from the loop, never from inside of another step."""
        held = self.held.get(replica.record.workload)
        if held is None:
            return
        if replica.phase is Phase.DRAINING and not replica.has_process:
            self._remove(held, replica)
        self._news()
        self.soon(held.name)
        if not replica.has_process:
            # Its place may be what others in the cluster wait for.
            for other in self.held.values():
                if other.steps.waiting and other.cluster == held.cluster:
                    self.soon(other.name)

    def soon(self, name: str) -> None:
        if name not in self._due:
            self._due.add(name)
            asyncio.get_running_loop().call_soon(self.converge, name)

    def _wake_when_due(self, held: Held, now: float) -> None:
        failed = [
            r.due_at
            for r in held.replicas.values()
            if r.phase is Phase.FAILED and not r.has_process and r.due_at > now
        ]
        if failed:
            loop = asyncio.get_running_loop()
            held.timer = loop.call_at(min(failed), self.soon, held.name)

    def _cancel_timer(self, held: Held) -> None:
        if held.timer is not None:
            held.timer.cancel()
            held.timer = None

    def _room(self, workload: Workload) -> Room:
        provider = workload.provider
        assert isinstance(provider, LocalProvider)
        alive = [
            replica
            for held in self.held.values()
            if held.cluster == workload.cluster
            for replica in held.replicas.values()
            if replica.has_process
        ]
        leaving = any(replica.phase in (Phase.DRAINING, Phase.FAILED) for replica in alive)
        return Room(provider.max_processes - len(alive), soon=leaving)

    def _prepare(self, template: Template, replica: str, *, port: int) -> Launch:
        return prepare(
            template,
            host=self._settings.host,
            port=port,
            replica=replica,
            inherited=self._environ,
        )

    def _port(self) -> int:
        taken = {r.record.port for held in self.held.values() for r in held.replicas.values()}
        port = self._pick_port(self._settings.host)
        while port in taken:
            port = self._pick_port(self._settings.host)
        return port

    def take_up(
        self, record: ReplicaRecord, processes: ReplicaProcesses | None, found: Running | None
    ) -> None:
        self._order = max(self._order, record.order)
        held = self.held.get(record.workload)
        if processes is None and found is not None:
            # Killed between starting it and writing that down.
            processes = ReplicaProcesses(found.id)
        alive = (
            processes is not None
            and processes.engine.boot == boot_id()
            and is_alive(processes.engine)
        )
        if held is None:
            if alive and processes is not None:
                kill_session(processes.engine)
            self._state.remove_replica(record.id)
            return
        if processes is None or (record.draining and not alive):
            self._state.remove_replica(record.id)
            return
        replica = held.replicas[record.id] = Replica(record, self._around)
        if alive:
            self._state.write_processes(record.id, processes)
            replica.adopt(processes)
        else:
            replica.could_not_start("it ended while nobody watched", pause=False)

    def end_strays(self, running: Sequence[Running]) -> None:
        """Ends engines under our mark that no record speaks of."""
        known = self.ids()
        for seen in running:
            if seen.replica and seen.leads and seen.replica not in known:
                log.warning("ending %s (pid %d): no record of it", seen.replica, seen.id.pid)
                kill_session(seen.id)

    def observed(self, held: Held) -> ObservedWorkload:
        replicas = sorted(held.replicas.values(), key=lambda r: r.record.order)
        if held.record is None:
            return ObservedWorkload(
                name=held.name,
                deployment=replicas[0].record.deployment if replicas else "",
                spec_digest="",
                replicas_wanted=len(replicas),
                replicas=tuple(r.observed() for r in replicas),
                detail=held.unreadable,
                quarantined=True,
            )
        workload = held.record.workload
        seen = tuple(r.observed() for r in replicas)
        return ObservedWorkload(
            name=held.name,
            deployment=workload.deployment,
            spec_digest=workload.spec_digest,
            replicas_wanted=workload.replicas,
            replicas=seen,
            deleting=held.record.deleting,
            template=template_data(workload.template),
            detail=describe(workload, seen, held.steps, deleting=held.record.deleting),
        )

    def ids(self) -> set[str]:
        return {replica_id for held in self.held.values() for replica_id in held.replicas}

    def _secret_values(self, record: ReplicaRecord) -> Sequence[str]:
        found: list[str] = []
        for name, ref in record.template.runtime.secrets.items():
            try:
                found += resolve({name: ref}, self._environ).values()
            except Stalled:
                continue
        return found


def _member(replica: Replica, workload: Workload, now: float) -> Member:
    failed = replica.phase is Phase.FAILED
    return Member(
        id=replica.id,
        newest=replica.record.spec_digest == workload.spec_digest,
        phase=replica.phase,
        order=replica.record.order,
        proven=replica.record.was_ready,
        due=failed and not replica.has_process and now >= replica.due_at,
    )
