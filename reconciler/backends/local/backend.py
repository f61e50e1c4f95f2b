"""The local backend: told a Workload, it makes processes of this machine match, and goes on doing so.

What it was told is on disk before anything is started, so a crash anywhere leads, at the next
`start`, to exactly the processes wanted: running ones are adopted, missing ones started, strays ended.

Not here: the steps towards it (fleet), one engine's life (replica), the files (state).
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final

from reconciler.backends.local import reaper
from reconciler.backends.local.fleet import Fleet, Held
from reconciler.backends.local.jobs import LocalJobs
from reconciler.backends.local.launch import free_port
from reconciler.backends.local.processes import (
    mark_of,
    marked,
)
from reconciler.backends.local.replica import ReplicaSettings
from reconciler.backends.local.state import (
    ReplicaRecord,
    StateDir,
    Unreadable,
    WorkloadRecord,
)
from reconciler.core.action import Create, Delete, Effect, Update
from reconciler.core.observed import Observation, Unknown
from reconciler.core.workload import Workload
from reconciler.errors import BackendUnreachable, NotOurs, Stalled, Waiting

# A process that an earlier reconciler was starting when it was killed shows its mark by then.
_SWEEP_AFTER_S: Final = 2.0


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
        self._state = StateDir(state_dir)
        self._mark = mark_of(owner, state_dir)
        self._fleet = Fleet(
            self._state,
            self._mark,
            news=self._news,
            environ=environ,
            settings=settings or ReplicaSettings(),
            pick_port=pick_port,
        )
        chosen = settings or ReplicaSettings()
        self._jobs = LocalJobs(
            self._state, self._mark, self._news, environ, chosen.host, chosen.log_size_bytes
        )
        self._foreign: frozenset[str] = frozenset()
        self._seen: Observation | None = None
        self._taking = asyncio.Lock()
        self._lock_descriptor = -1
        self._running = False
        self._sweeping: asyncio.Task[None] | None = None

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
        jobs: list[WorkloadRecord] = []
        for record in records:
            if isinstance(record, Unreadable):
                self._fleet.held[record.name] = Held(record.name, unreadable=record.reason)
            elif record.owner == self._owner and record.workload.template.job is not None:
                jobs.append(record)
            elif record.owner == self._owner:
                self._fleet.held[record.workload.name] = Held(record.workload.name, record)
            else:
                foreign.add(record.workload.name)
        self._foreign = frozenset(foreign)
        self._running = True
        leaders = {seen.replica: seen for seen in running if seen.replica and seen.leads}
        for replica_record, processes in replicas:
            if replica_record.owner == self._owner:
                self._fleet.take_up(replica_record, processes, leaders.get(replica_record.id))
        self._state.remove_old_logs(self._fleet.ids())
        self._fleet.end_strays(running)
        for name in self._fleet.held:
            self._fleet.soon(name)
        for record in jobs:
            self._jobs.take(record)
        self._sweeping = asyncio.create_task(self._sweep())

    async def observe(self) -> Observation | Unknown:
        if not self._running:
            return Unknown(self.name, "the local backend is not started")
        try:
            self._state.check()
        except OSError as error:
            return Unknown(self.name, f"{self._state.workloads}: {error.strerror}")
        if self._seen is None:
            workloads = {
                name: self._fleet.observed(held) for name, held in sorted(self._fleet.held.items())
            }
            workloads |= self._jobs.observed()
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
        for held in self._fleet.held.values():
            for replica_id in held.replicas.keys() & set(replica_ids):
                held.replicas[replica_id].release()

    async def close(self) -> None:
        """Lets go of everything; the engines run on, for the next one to adopt."""
        self._running = False
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._jobs.close()
        await self._fleet.close()
        self._seen = None
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

    async def _take(self, workload: Workload) -> None:
        if workload.template.job is not None or workload.name in self._jobs.held:
            await self._take_job(workload)
            return
        held = self._fleet.held.get(workload.name)
        if held is not None and held.record is None:
            raise Stalled(f"{workload.name} is quarantined: {held.unreadable}")
        if held is not None and held.record is not None and held.record.deleting:
            raise Waiting(f"{workload.name} is still being deleted", retry_after_s=1.0)
        record = WorkloadRecord(self._owner, workload)
        if held is not None and held.record == record:
            return
        self._fleet.check(workload)
        await self._write(record)
        if not self._running:
            # Closed meanwhile: the next one finds the promise.
            return
        if held is None:
            held = self._fleet.held.setdefault(workload.name, Held(workload.name))
        held.record = record
        self._news()
        self._fleet.converge(workload.name)

    async def _take_job(self, workload: Workload) -> None:
        name = workload.name
        if name in self._fleet.held or workload.template.job is None:
            raise Stalled(
                f"{name} is {'a job' if name in self._jobs.held else 'no job'} already; give the "
                "other a deployment of its own name"
            )
        held = self._jobs.held.get(name)
        if held is not None and held.record.deleting:
            raise Waiting(f"{name} is still being deleted", retry_after_s=1.0)
        record = WorkloadRecord(self._owner, workload)
        if held is None or held.record != record:
            self._jobs.check(workload)
            await self._write(record)
            if self._running:
                self._jobs.take(record)
                self._news()

    async def _delete_job(self, record: WorkloadRecord) -> None:
        if not record.deleting:
            record = WorkloadRecord(self._owner, record.workload, deleting=True)
            await self._write(record)
        self._jobs.take(record)
        self._news()

    async def _delete(self, name: str) -> None:
        if name in self._jobs.held:
            await self._delete_job(self._jobs.held[name].record)
            return
        held = self._fleet.held.get(name)
        if held is None:
            return
        if held.record is None:
            raise Stalled(f"{name} is quarantined: {held.unreadable}")
        if not held.record.deleting:
            record = WorkloadRecord(self._owner, held.record.workload, deleting=True)
            await self._write(record)
            held.record = record
            self._news()
        self._fleet.converge(name)

    async def _write(self, record: WorkloadRecord) -> None:
        try:
            self._state.check()
            await asyncio.to_thread(self._state.write_workload, record)
        except OSError as error:
            raise BackendUnreachable(
                f"{record.workload.name} cannot be recorded in {self._state.workloads}: "
                f"{error.strerror}"
            ) from error

    async def _sweep(self) -> None:
        await asyncio.sleep(_SWEEP_AFTER_S)
        self._fleet.end_strays(await asyncio.to_thread(marked, self._mark))

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

    def _news(self) -> None:
        self._seen = None
        self._notify()

    def _is_ours(self, record: ReplicaRecord) -> bool:
        return record.owner == self._owner
