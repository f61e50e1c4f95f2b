"""The local backend: told a Workload, it makes processes of this machine match, and goes on doing so.

What it was told is on disk before anything is started, so a crash anywhere leads, at the next
`start`, to exactly the processes wanted: running ones are adopted, missing ones started, strays ended.
Everything happens on one event loop: a step is decided (rollout) and taken at every change.

Not here: one engine's life (replica), commands (engine_command), what is on disk (state).
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from reconciler.backends.local import reaper
from reconciler.backends.local.describe import describe
from reconciler.backends.local.engine_command import Place, engine_argv, engine_environ
from reconciler.backends.local.processes import (
    Running,
    boot_id,
    is_alive,
    kill_session,
    mark_of,
    marked,
)
from reconciler.backends.local.replica import Replica, ReplicaSettings, Surroundings
from reconciler.backends.local.rollout import Member, Room, Steps, decide
from reconciler.backends.local.secret_values import resolve
from reconciler.backends.local.state import (
    ReplicaProcesses,
    ReplicaRecord,
    StateDir,
    Unreadable,
    WorkloadRecord,
)
from reconciler.backends.probe import Prober
from reconciler.core.action import Create, Delete, Effect, Update
from reconciler.core.observed import Observation, ObservedWorkload, Phase, Unknown
from reconciler.core.plan import template_data
from reconciler.core.workload import Template, Workload
from reconciler.errors import BackendUnreachable, NotOurs, Stalled, Waiting
from schemas.cluster import LocalProvider

log = logging.getLogger("detoserve.local")

# A process that an earlier reconciler was starting when it was killed shows its mark by then.
_SWEEP_AFTER_S: Final = 2.0


def free_port(host: str) -> int:
    """A port that the kernel says is free now; another process may still be faster."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class _Held:
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


class LocalBackend:
    """Engines as supervised processes. `notify` is called when an observation would differ.

    `environ` is what engines inherit and where secrets are looked up. `pick_port` offers a port.
    """

    name = "local"

    def __init__(
        self,
        state_dir: Path,
        owner: str,
        *,
        notify: Callable[[], None],
        environ: Mapping[str, str] = os.environ,
        settings: ReplicaSettings | None = None,
        pick_port: Callable[[str], int] = free_port,
    ) -> None:
        self._owner = owner
        self._notify = notify
        self._environ = environ
        self._settings = settings or ReplicaSettings()
        self._pick_port = pick_port
        self._state = StateDir(state_dir)
        self._mark = mark_of(owner, state_dir)
        self._prober = Prober()
        self._around = Surroundings(
            settings=self._settings,
            state=self._state,
            mark=self._mark,
            prober=self._prober,
            changed=self._changed,
            secrets=self._secret_values,
        )
        self._held: dict[str, _Held] = {}
        self._foreign: frozenset[str] = frozenset()
        self._seen: Observation | None = None
        self._due: set[str] = set()
        self._taking = asyncio.Lock()
        self._lock_descriptor = -1
        self._order = 0
        self._running = False
        self._sweeping: asyncio.Task[None] | None = None

    # --- the Protocol

    async def start(self) -> None:
        """Adopts what runs and takes up what was promised. Once, before anything else.

        Raises:
            Stalled: another reconciler works in this state directory.
            BackendUnreachable: the directory cannot be used.
        """
        try:
            self._state.create()
            self._lock()
            records = await asyncio.to_thread(lambda: list(self._state.read_workloads()))
            replicas = await asyncio.to_thread(lambda: list(self._state.read_replicas()))
            running = await asyncio.to_thread(marked, self._mark)
        except OSError as error:
            raise BackendUnreachable(f"{self._state.path}: {error.strerror}") from error
        foreign = set()
        for record in records:
            if isinstance(record, Unreadable):
                self._held[record.name] = _Held(record.name, unreadable=record.reason)
            elif record.owner == self._owner:
                self._held[record.workload.name] = _Held(record.workload.name, record)
            else:
                foreign.add(record.workload.name)
        self._foreign = frozenset(foreign)
        self._running = True
        leaders = {seen.replica: seen for seen in running if seen.replica and seen.leads}
        for replica_record, processes in replicas:
            if replica_record.owner == self._owner:
                self._take_up(replica_record, processes, leaders.get(replica_record.id))
        self._state.remove_old_logs(self._ids())
        self._end_strays(running)
        for name in self._held:
            self._soon(name)
        self._sweeping = asyncio.create_task(self._sweep())

    async def observe(self) -> Observation | Unknown:
        if not self._running:
            return Unknown(self.name, "the local backend is not started")
        try:
            self._state.check()
        except OSError as error:
            return Unknown(self.name, f"{self._state.workloads}: {error.strerror}")
        if self._seen is None:
            workloads = {name: self._observed(held) for name, held in sorted(self._held.items())}
            self._seen = Observation(self.name, workloads, self._foreign)
        return self._seen

    async def apply(self, action: Effect) -> None:
        if not self._running:
            raise BackendUnreachable("the local backend is not started")
        async with self._taking:
            if action.name in self._foreign:
                raise NotOurs(
                    f"{action.name} in {self._state.workloads} belongs to another owner; "
                    "remove it there, or use another state directory"
                )
            match action:
                case Create(workload=workload) | Update(workload=workload):
                    await self._take(workload)
                case Delete(name=name):
                    await self._delete(name)

    async def release(self, replica_ids: Collection[str]) -> None:
        for held in self._held.values():
            for replica_id in held.replicas.keys() & set(replica_ids):
                held.replicas[replica_id].release()

    async def close(self) -> None:
        """Lets go of everything; the engines run on, for the next one to adopt."""
        self._running = False
        if self._sweeping is not None:
            self._sweeping.cancel()
        for held in self._held.values():
            self._cancel_timer(held)
            for replica in held.replicas.values():
                replica.close()
        self._held.clear()
        self._seen = None
        await self._prober.close()
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1

    async def stop_all(self, *, grace_s: float = reaper.GRACE_S) -> None:
        """Ends every engine of this owner, also after `close`; what it was told stays on disk."""
        await self.close()
        ids = {record.id for record, _ in self._state.read_replicas() if self._is_ours(record)}
        await asyncio.to_thread(reaper.end_all, self._mark, self._state.path, grace_s=grace_s)
        for replica_id in ids:
            # Ended on purpose: nothing that a next start would have to make up for.
            self._state.remove_replica(replica_id)

    # --- what it is told

    async def _take(self, workload: Workload) -> None:
        held = self._held.get(workload.name)
        if held is not None and held.record is None:
            raise Stalled(f"{workload.name} is quarantined: {held.unreadable}")
        if held is not None and held.record is not None and held.record.deleting:
            raise Waiting(f"{workload.name} is still being deleted", retry_after_s=1.0)
        record = WorkloadRecord(self._owner, workload)
        if held is not None and held.record == record:
            return
        self._check(workload)
        await self._write(record)
        if held is None:
            held = self._held.setdefault(workload.name, _Held(workload.name))
        held.record = record
        self._news()
        self._converge(workload.name)

    async def _delete(self, name: str) -> None:
        held = self._held.get(name)
        if held is None:
            return
        if held.record is None:
            raise Stalled(f"{name} is quarantined: {held.unreadable}")
        if not held.record.deleting:
            record = WorkloadRecord(self._owner, held.record.workload, deleting=True)
            await self._write(record)
            held.record = record
            self._news()
        self._converge(name)

    async def _write(self, record: WorkloadRecord) -> None:
        try:
            self._state.check()
            await asyncio.to_thread(self._state.write_workload, record)
        except OSError as error:
            raise BackendUnreachable(
                f"{record.workload.name} cannot be recorded in {self._state.workloads}: "
                f"{error.strerror}"
            ) from error

    def _check(self, workload: Workload) -> None:
        """Raises Stalled for what can never work, before anything is touched."""
        if not isinstance(workload.provider, LocalProvider):
            raise Stalled(
                f"cluster {workload.cluster} is {workload.provider.type}, which the local backend "
                "does not run"
            )
        place = Place(self._settings.host, 0, workload.name, sys.executable)
        argv = engine_argv(workload.template, place)
        values = resolve(workload.template.runtime.secrets, self._environ)
        _program(argv[0], engine_environ(workload.template, place, self._environ, values))

    # --- making it so

    def _converge(self, name: str) -> None:
        """Takes the next steps of one workload; starts at most one process, and comes again."""
        self._due.discard(name)
        held = self._held.get(name)
        if not self._running or held is None or held.record is None:
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
            self._soon(name)
        self._wake_when_due(held, now)

    def _restart(self, held: _Held, workload: Workload, failed: Replica) -> None:
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
            owner=self._owner,
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

    def _launch(self, held: _Held, record: ReplicaRecord) -> None:
        """Records a replica, then starts it; what goes wrong is its failure, not the backend's."""
        replica = held.replicas[record.id] = Replica(record, self._around)
        template = record.template
        try:
            replica.record = record = replace(record, port=self._port())
            place = Place(self._settings.host, replica.record.port, record.id, sys.executable)
            argv = engine_argv(template, place)
            values = resolve(template.runtime.secrets, self._environ)
            environ = engine_environ(template, place, self._environ, values)
            program = _program(argv[0], environ)
            self._state.write_replica(replica.record)
            replica.start(program, argv, environ)
        except Stalled as error:
            replica.could_not_start(str(error))
        except OSError as error:
            replica.could_not_start(f"it cannot be started: {error.strerror or error}")
        self._state.remove_old_logs(self._ids())
        self._news()

    def _stop(self, held: _Held, replica: Replica) -> None:
        assert held.record is not None
        if replica.has_process:
            replica.drain(held.record.workload.rollout.drain_timeout)
        else:
            self._remove(held, replica)

    def _remove(self, held: _Held, replica: Replica) -> None:
        replica.close()
        held.replicas.pop(replica.id, None)
        self._state.remove_replica(replica.id)
        self._news()

    def _forget(self, held: _Held) -> None:
        self._state.remove_workload(held.name)
        del self._held[held.name]
        self._state.remove_old_logs(self._ids())
        self._news()

    def _changed(self, replica: Replica) -> None:
        """A replica has news. Steps are taken from the loop, never from inside of another step."""
        held = self._held.get(replica.record.workload)
        if held is None or not self._running:
            return
        if replica.phase is Phase.DRAINING and not replica.has_process:
            self._remove(held, replica)
        self._news()
        self._soon(held.name)
        if not replica.has_process:
            # Its place may be what others in the cluster wait for.
            for other in self._held.values():
                if other.steps.waiting and other.cluster == held.cluster:
                    self._soon(other.name)

    def _soon(self, name: str) -> None:
        if name not in self._due:
            self._due.add(name)
            asyncio.get_running_loop().call_soon(self._converge, name)

    def _wake_when_due(self, held: _Held, now: float) -> None:
        failed = [
            r.due_at
            for r in held.replicas.values()
            if r.phase is Phase.FAILED and not r.has_process and r.due_at > now
        ]
        if failed:
            loop = asyncio.get_running_loop()
            held.timer = loop.call_at(min(failed), self._soon, held.name)

    def _cancel_timer(self, held: _Held) -> None:
        if held.timer is not None:
            held.timer.cancel()
            held.timer = None

    def _room(self, workload: Workload) -> Room:
        provider = workload.provider
        assert isinstance(provider, LocalProvider)
        alive = [
            replica
            for held in self._held.values()
            if held.cluster == workload.cluster
            for replica in held.replicas.values()
            if replica.has_process
        ]
        leaving = any(replica.phase in (Phase.DRAINING, Phase.FAILED) for replica in alive)
        return Room(provider.max_processes - len(alive), soon=leaving)

    def _port(self) -> int:
        taken = {r.record.port for held in self._held.values() for r in held.replicas.values()}
        port = self._pick_port(self._settings.host)
        while port in taken:
            port = self._pick_port(self._settings.host)
        return port

    # --- what was there before

    def _take_up(
        self, record: ReplicaRecord, processes: ReplicaProcesses | None, found: Running | None
    ) -> None:
        self._order = max(self._order, record.order)
        held = self._held.get(record.workload)
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

    def _end_strays(self, running: Sequence[Running]) -> None:
        """Ends engines under our mark that no record speaks of."""
        known = self._ids()
        for seen in running:
            if seen.replica and seen.leads and seen.replica not in known:
                log.warning("ending %s (pid %d): no record of it", seen.replica, seen.id.pid)
                kill_session(seen.id)

    async def _sweep(self) -> None:
        await asyncio.sleep(_SWEEP_AFTER_S)
        self._end_strays(await asyncio.to_thread(marked, self._mark))

    def _lock(self) -> None:
        descriptor = os.open(self._state.path / "local.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Stalled(
                f"another reconciler runs engines from {self._state.path}; stop it, or use another "
                "state directory"
            ) from None
        self._lock_descriptor = descriptor

    # --- what it sees

    def _news(self) -> None:
        self._seen = None
        self._notify()

    def _observed(self, held: _Held) -> ObservedWorkload:
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

    def _ids(self) -> set[str]:
        return {replica_id for held in self._held.values() for replica_id in held.replicas}

    def _is_ours(self, record: ReplicaRecord) -> bool:
        return record.owner == self._owner

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


def _program(word: str, environ: Mapping[str, str]) -> str:
    found = shutil.which(word, path=environ.get("PATH", os.defpath))
    if found is None:
        where = "is no program" if "/" in word else "is not on the reconciler's PATH"
        raise Stalled(f"{word} {where}; install it, or give its path in runtime.command")
    return found
