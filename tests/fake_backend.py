"""A backend in memory that moves only when told to: for the contract suite and tests of the loop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from reconciler.core.action import Create, Delete, Effect, Update
from reconciler.core.observed import (
    Observation,
    ObservedReplica,
    ObservedWorkload,
    Phase,
    Unknown,
)
from reconciler.core.plan import template_data
from reconciler.core.workload import BackendName, Workload
from reconciler.errors import BackendUnreachable, NotOurs, ReconcileError, Waiting


@dataclass(slots=True)
class _Told:
    workload: Workload
    template: dict[str, Any]
    replicas: dict[str, ObservedReplica] = field(default_factory=dict)
    deleting: bool = False


class FakeBackend:
    """Deterministic. Replicas are STARTING until `step` (or at once, with `instant`).

    `broken`: why it cannot be asked, "" when it can. `failures`: workload name -> error that apply
    raises. `applied`: every action taken on, in order.
    """

    def __init__(self, name: BackendName = "local", *, instant: bool = False) -> None:
        self.name: str = name
        self.instant = instant
        self.broken = ""
        self.foreign: set[str] = set()
        self.failures: dict[str, ReconcileError] = {}
        self.applied: list[Effect] = []
        self.closed = False
        self._told: dict[str, _Told] = {}
        self._born = 0

    async def observe(self) -> Observation | Unknown:
        if self.broken:
            return Unknown(self.name, self.broken)
        workloads = {name: _observed(told) for name, told in sorted(self._told.items())}
        return Observation(self.name, workloads, frozenset(self.foreign))

    async def apply(self, action: Effect) -> None:
        if self.broken:
            raise BackendUnreachable(self.broken)
        if action.name in self.failures:
            raise self.failures[action.name]
        if action.name in self.foreign:
            raise NotOurs(f"{action.name} belongs to another owner")
        told = self._told.get(action.name)
        match action:
            case Create(workload=workload) | Update(workload=workload):
                if told is not None and told.deleting:
                    raise Waiting(f"{action.name} is still being deleted", retry_after_s=1.0)
                if told is None:
                    told = self._told[action.name] = _Told(workload, {})
                told.workload = workload
                told.template = template_data(workload.template)
                self._start_missing(told)
            case Delete():
                if told is not None:
                    told.deleting = True
                    for replica_id in list(told.replicas):
                        self._drain(told, replica_id)
                    self._sweep()
        self.applied.append(action)
        if self.instant:
            self.step()

    async def release(self, replica_ids: Collection[str]) -> None:
        for told in self._told.values():
            for replica_id in list(told.replicas):
                replica = told.replicas[replica_id]
                if replica_id in replica_ids and replica.phase is Phase.DRAINING:
                    del told.replicas[replica_id]
        self._sweep()

    async def close(self) -> None:
        self.closed = True

    def step(self) -> None:
        """Starting ones become ready, and ready ones beyond what is wanted begin to drain."""
        for told in self._told.values():
            for replica in list(told.replicas.values()):
                if replica.phase is Phase.STARTING:
                    self.set_phase(replica.id, Phase.READY)
            self._drain_surplus(told)

    def set_phase(self, replica_id: str, phase: Phase, detail: str = "") -> None:
        """Puts one replica into a phase, as if the world had."""
        for told in self._told.values():
            if replica_id in told.replicas:
                changed = replace(told.replicas[replica_id], phase=phase, detail=detail)
                told.replicas[replica_id] = changed

    def _start_missing(self, told: _Told) -> None:
        digest = told.workload.spec_digest
        newest = [r for r in told.replicas.values() if r.spec_digest == digest]
        running = [r for r in newest if r.phase is not Phase.DRAINING]
        for _ in range(told.workload.replicas - len(running)):
            self._born += 1
            replica_id = f"{told.workload.name}-{self._born}"
            url = f"http://{replica_id}.test:8000"
            told.replicas[replica_id] = ObservedReplica(replica_id, Phase.STARTING, digest, url)
        self._drain_surplus(told)

    def _drain_surplus(self, told: _Told) -> None:
        active = [r for r in told.replicas.values() if r.phase is not Phase.DRAINING]
        digest, wanted = told.workload.spec_digest, told.workload.replicas
        ready = sum(r.phase is Phase.READY and r.spec_digest == digest for r in active)
        old = [r for r in active if r.spec_digest != digest]
        newest = [r for r in active if r.spec_digest == digest]
        leaving = newest[wanted:] + (old if ready >= wanted else [])
        for replica in leaving:
            self._drain(told, replica.id)

    def _drain(self, told: _Told, replica_id: str) -> None:
        if told.replicas[replica_id].phase is Phase.READY:
            self.set_phase(replica_id, Phase.DRAINING)
        elif told.replicas[replica_id].phase is not Phase.DRAINING:
            del told.replicas[replica_id]

    def _sweep(self) -> None:
        for name in [n for n, t in self._told.items() if t.deleting and not t.replicas]:
            del self._told[name]


def _observed(told: _Told) -> ObservedWorkload:
    return ObservedWorkload(
        name=told.workload.name,
        deployment=told.workload.deployment,
        spec_digest=told.workload.spec_digest,
        replicas_wanted=told.workload.replicas,
        replicas=tuple(told.replicas.values()),
        deleting=told.deleting,
        template=told.template,
    )
