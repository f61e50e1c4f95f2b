"""Jobs as SkyPilot's managed jobs, beside the services of the same API server.

A job that is over is shown while it is wanted, and adopted when it is wanted again, so that nothing
runs twice because a reconciler restarted. Without any job SkyPilot is asked once, at the start.
Not here: what a job is to SkyPilot (core.skypilot.job).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Final

import msgspec
from ruamel.yaml import YAML

from reconciler.backends.secret_values import resolve
from reconciler.backends.skypilot.api import Refusal, RequestUnknown, SkyPilotApi
from reconciler.core.action import Create, Delete, Effect, Update
from reconciler.core.observed import Observation, ObservedReplica, ObservedWorkload, Unknown
from reconciler.core.plan import template_data
from reconciler.core.skypilot.job import CANCELLED, JobRow, job_name, job_row, job_task
from reconciler.core.workload import Workload
from reconciler.errors import BackendUnreachable, Stalled, Transient, Waiting

log = logging.getLogger("detoserve.skypilot")

_NOTES: Final = "skypilot-jobs.json"
_FIELDS: Final = ["job_id", "job_name", "status", "failure_reason", "recovery_count"]
_NO_CONTROLLER: Final = frozenset({"ClusterNotUpError", "ClusterDoesNotExist"})
_LAUNCH_CHECK_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Launch:
    """A job that was asked for: never asked for again until SkyPilot has said what became of it."""

    digest: str
    request_id: str


class _Notes(msgspec.Struct):
    """By workload. `over`: the last one that ended by itself, for SkyPilot's controller stops when idle."""

    launches: dict[str, _Launch] = {}
    over: dict[str, JobRow] = {}


class SkyPilotJobs:
    """`leading` gives the lease generation, None without one."""

    name = "skypilot-jobs"

    def __init__(
        self,
        api: SkyPilotApi,
        state_dir: Path,
        owner: str,
        *,
        environ: Mapping[str, str] = os.environ,
        leading: Callable[[], int | None] = lambda: 0,
        look_every_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._path = state_dir / _NOTES
        self._owner = owner
        self._environ = environ
        self._leading = leading
        self._look_every_s = look_every_s
        self._clock = clock
        self._told: dict[str, Workload] = {}
        self._rows: list[JobRow] = []
        self._looked_at: float | None = None
        notes = _Notes()
        with contextlib.suppress(OSError, msgspec.DecodeError):  # there were no jobs
            notes = msgspec.json.decode(self._path.read_bytes(), type=_Notes)
        self._launches = notes.launches
        self._over = notes.over

    async def observe(self) -> Observation | Unknown:
        active = any(not row.over for row in self._rows)
        if self._told or self._launches or active or self._looked_at is None:
            try:
                await self._look()
            except BackendUnreachable as error:
                return Unknown(self.name, str(error))
        names = {row.workload for row in self._rows if not row.over} | self._told.keys()
        return Observation(self.name, {name: self._observed(name) for name in sorted(names)})

    async def apply(self, action: Effect) -> None:
        if self._leading() is None:
            raise Transient("another reconciler leads")
        await self._look(anew=True)
        match action:
            case Create(workload=workload) | Update(workload=workload):
                await self._take(workload)
            case Delete(name=name):
                await self._cancel([r for r in self._of(name) if not r.over])
                self._told.pop(name, None)
        self._looked_at = None

    async def release(self, replica_ids: Collection[str]) -> None:
        """No request reaches a job: there is nothing to let go."""

    async def close(self) -> None:
        """Jobs go on; the connection is the services'."""

    async def _take(self, workload: Workload) -> None:
        name, digest = workload.name, workload.spec_digest
        task = job_task(workload, self._owner)
        secrets = workload.template.runtime.secrets
        sent = {n: ref for n, ref in secrets.items() if ref.kubernetes_secret is None}
        if values := resolve(sent, self._environ):
            task["secrets"] = values
        rows = self._of(name)
        wanted = workload.replicas > 0
        await self._cancel([r for r in rows if not r.over and (r.digest != digest or not wanted)])
        known = any(r.digest == digest and r.status not in CANCELLED for r in rows)
        if wanted and not known and not await self._under_way(name, digest):
            body: dict[str, Any] = {"task": _yaml(task), "name": job_name(workload, self._owner)}
            try:
                request_id = await self._api.submit("/jobs/launch", body)
            except Refusal as refusal:
                raise Stalled(f"SkyPilot refused the job: {refusal.kind}: {refusal}") from None
            self._note(name, _Launch(digest, request_id))
            log.info("%s: asked SkyPilot to launch it", name)
        self._told[name] = workload

    async def _under_way(self, name: str, digest: str) -> bool:
        """Whether this very job was asked for and is not listed yet."""
        launch = self._launches.get(name)
        if launch is None or launch.digest != digest:
            return False
        try:
            await self._api.result(launch.request_id, _LAUNCH_CHECK_S)
        except TimeoutError:
            return True
        except RequestUnknown:
            self._note(name, None)
            return False
        except Refusal as refusal:
            self._note(name, None)
            raise Stalled(f"SkyPilot did not launch the job: {refusal.kind}: {refusal}") from None
        await self._look(anew=True)
        if any(row.digest == digest for row in self._of(name)):
            return True
        raise Waiting(f"{name} was launched, but SkyPilot does not list it yet", retry_after_s=15.0)

    async def _cancel(self, rows: list[JobRow]) -> None:
        ids = [row.id for row in rows if row.status not in CANCELLED]
        if ids:
            try:
                await self._api.submit("/jobs/cancel", {"job_ids": ids})
            except Refusal as refusal:
                raise Transient(f"SkyPilot did not cancel {ids}: {refusal}") from None

    async def _look(self, *, anew: bool = False) -> None:
        now = self._clock()
        if not anew and self._looked_at is not None and now - self._looked_at < self._look_every_s:
            return
        body = {"refresh": False, "skip_finished": False, "fields": _FIELDS}
        try:
            request_id = await self._api.submit("/jobs/queue/v2", body)
            answer = json.loads(await self._api.result(request_id, 60.0))
        except Refusal as refusal:
            if refusal.kind not in _NO_CONTROLLER:
                raise BackendUnreachable(f"SkyPilot's jobs: {refusal}") from None
            if any(not row.over for row in self._rows):
                # There were jobs: their controller is away, which says nothing of them.
                raise BackendUnreachable("SkyPilot's jobs controller is not up") from None
            answer = []
        except (RequestUnknown, TimeoutError, ValueError):
            raise BackendUnreachable("SkyPilot did not say which jobs it has") from None
        rows = answer.get("jobs", []) if isinstance(answer, dict) else answer
        found = (job_row(row, self._owner) for row in rows)
        listed = {row.id: row for row in found if row is not None}
        remembered = {row.id: row for row in self._over.values()}
        self._rows = sorted((remembered | listed).values(), key=lambda row: row.id)
        self._looked_at = now
        over = {r.workload: r for r in self._rows if r.over and r.status not in CANCELLED}
        came = {r.workload for r in self._rows if _is_of(self._launches.get(r.workload), r)}
        if came or over != self._over:
            self._over = over
            for name in came:
                del self._launches[name]
            self._save()

    def _of(self, name: str) -> list[JobRow]:
        return [row for row in self._rows if row.workload == name]

    def _observed(self, name: str) -> ObservedWorkload:
        told, rows = self._told.get(name), self._of(name)
        newest = rows[-1] if rows else None
        shown: tuple[ObservedReplica, ...] = ()
        if newest is not None and not (newest.status in CANCELLED and newest.over):
            shown = (
                ObservedReplica(
                    id=f"{name}-{newest.id}",
                    phase=newest.phase,
                    spec_digest=newest.digest,
                    detail=newest.detail if newest.over else "",
                    restarts=newest.recoveries,
                ),
            )
        deployment = told.deployment if told else name.partition("--")[0]
        return ObservedWorkload(
            name=name,
            deployment=deployment,
            spec_digest=told.spec_digest if told else (newest.digest if newest else ""),
            replicas_wanted=told.replicas if told else 1,
            replicas=shown,
            deleting=told is None and newest is not None and newest.status in CANCELLED,
            template=template_data(told.template) if told else {},
            detail="SkyPilot was asked to launch it" if name in self._launches else "",
        )

    def _note(self, name: str, launch: _Launch | None) -> None:
        if launch is None:
            self._launches.pop(name, None)
        else:
            self._launches[name] = launch
        self._save()

    def _save(self) -> None:
        """On disk before anything follows from it."""
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as file:
            file.write(msgspec.json.encode(_Notes(self._launches, self._over)))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)


def _is_of(launch: _Launch | None, row: JobRow) -> bool:
    return launch is not None and launch.digest == row.digest


def _yaml(task: Mapping[str, Any]) -> str:
    out = StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.dump(dict(task), out)
    return out.getvalue()
