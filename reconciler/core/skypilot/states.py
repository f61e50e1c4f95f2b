"""What every status of SkyServe means here: one table for services, one for replicas. Pure.

NO_REPLICA is not empty, PREEMPTED is not a failure, and a word that no table knows is not absence.
Not here: what to do about it (steps).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from reconciler.core.observed import ObservedReplica, ObservedWorkload, Phase
from reconciler.core.skypilot.service import Service, ServiceReplica


class Stage(Enum):
    """What may be asked of a service."""

    BUSY = auto()
    """Nothing yet: its controller takes no change."""
    OPEN = auto()
    """Anything."""
    LEAVING = auto()
    """Nothing any more."""
    BROKEN = auto()
    """Nothing by itself: a human must look before the name is used again."""


@dataclass(frozen=True, slots=True)
class ServiceState:
    stage: Stage
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaState:
    phase: Phase
    detail: str = ""
    ended: bool = False
    """Its row only tells what was; SkyServe keeps such rows until the service is taken down."""


SERVICE_STATES: Final[Mapping[str, ServiceState]] = {
    "CONTROLLER_INIT": ServiceState(Stage.BUSY, "its controller is starting"),
    "REPLICA_INIT": ServiceState(Stage.OPEN, "no replica is ready yet"),
    "READY": ServiceState(Stage.OPEN),
    "NO_REPLICA": ServiceState(Stage.OPEN, "it has no replica at the moment"),
    "FAILED": ServiceState(Stage.OPEN, "no replica is ready, and some have failed"),
    "SHUTTING_DOWN": ServiceState(Stage.LEAVING, "SkyPilot is taking it down"),
    "FAILED_CLEANUP": ServiceState(
        Stage.BROKEN,
        "SkyPilot could not clean up after it, so machines may be left running; look for them, then "
        "run: sky serve down --purge {name}",
    ),
    "CONTROLLER_FAILED": ServiceState(
        Stage.BROKEN,
        "its controller has failed, so nothing looks after its replicas; look at: sky serve logs "
        "--controller {name}, then run: sky serve down --purge {name}",
    ),
}

REPLICA_STATES: Final[Mapping[str, ReplicaState]] = {
    "PENDING": ReplicaState(Phase.PENDING, "waits for its turn to be launched"),
    "PROVISIONING": ReplicaState(Phase.PENDING, "its machine is being provisioned"),
    "STARTING": ReplicaState(Phase.STARTING, "the engine is starting"),
    "READY": ReplicaState(Phase.READY),
    "NOT_READY": ReplicaState(Phase.NOT_READY, "it fails its readiness probe"),
    "SHUTTING_DOWN": ReplicaState(Phase.DRAINING, "finishes its requests"),
    "PREEMPTED": ReplicaState(Phase.PENDING, "it was preempted; SkyServe replaces it"),
    "FAILED": ReplicaState(Phase.FAILED, "its setup or its engine ended with an error", ended=True),
    "FAILED_INITIAL_DELAY": ReplicaState(
        Phase.FAILED, "it was not ready within readiness.initialDelay", ended=True
    ),
    "FAILED_PROBING": ReplicaState(
        Phase.FAILED, "it failed its readiness probe for too long", ended=True
    ),
    "FAILED_PROVISION": ReplicaState(
        Phase.FAILED, "no machine could be provisioned for it", ended=True
    ),
    "FAILED_CLEANUP": ReplicaState(
        Phase.FAILED, "its machine could not be taken down and may still cost money"
    ),
    "UNKNOWN": ReplicaState(Phase.NOT_READY, "SkyPilot does not know its state"),
}

_NOT_TRIED_AGAIN: Final = frozenset({"FAILED", "FAILED_INITIAL_DELAY"})


def service_state(status: str, name: str) -> ServiceState:
    """A status that this version does not know leaves the service alone."""
    found = SERVICE_STATES.get(status)
    if found is None:
        return ServiceState(
            Stage.BUSY, f"SkyPilot says {status}, which this version does not know; left alone"
        )
    return ServiceState(found.stage, found.detail.format(name=name))


def replica_state(status: str) -> ReplicaState:
    return REPLICA_STATES.get(status) or ReplicaState(
        Phase.NOT_READY, f"SkyPilot says {status}, which this version does not know"
    )


def replica_name(service: Service, replica: ServiceReplica) -> str:
    """SkyServe counts replicas from 1 again when a name is used again; the incarnation tells apart."""
    return f"{service.name}-{replica.id}-{service.incarnation[:6]}"


def observed_replicas(
    service: Service, digests: Mapping[int, str], wanted: int
) -> tuple[ObservedReplica, ...]:
    """Its replicas. `digests` of the templates by version of the service, as far as known.

    Rows of ended replicas are left out once as many as wanted are ready; before that the newest is
    shown, because it says why.
    """
    shown: list[ObservedReplica] = []
    ended: list[tuple[int, ObservedReplica]] = []
    for row in sorted(service.replicas, key=lambda r: r.id):
        state = replica_state(row.status)
        url = row.endpoint.rstrip("/") if row.endpoint and not state.ended else None
        replica = ObservedReplica(
            id=replica_name(service, row),
            phase=state.phase,
            spec_digest=digests.get(row.version, f"version-{row.version}"),
            url=url,
            detail=": ".join(filter(None, (state.detail, row.detail))),
        )
        if state.ended:
            ended.append((row.id, replica))
        else:
            shown.append(replica)
    ready = sum(replica.phase is Phase.READY for replica in shown)
    if ended and ready < wanted:
        shown.append(max(ended, key=lambda pair: pair[0])[1])
    return tuple(shown)


def gave_up(service: Service) -> bool:
    """Whether SkyServe may have stopped trying: it does so for good once a replica of the newest version
    fails before any of it was ready.
    """
    newest = [r for r in service.replicas if r.version == service.version]
    wanted = service.marks.replicas if service.marks else 0
    return (
        wanted > 0
        and any(r.status in _NOT_TRIED_AGAIN for r in newest)
        and all(replica_state(r.status).ended for r in newest)
    )


def observed_service(
    service: Service,
    digests: Mapping[int, str],
    template: Mapping[str, object],
) -> ObservedWorkload:
    """One of ours as it is, before anything that is under way for it. `service.marks` is there."""
    marks = service.marks
    assert marks is not None
    state = service_state(service.status, service.name)
    return ObservedWorkload(
        name=service.name,
        deployment=marks.deployment,
        spec_digest=marks.spec_digest,
        replicas_wanted=marks.replicas,
        replicas=observed_replicas(service, digests, marks.replicas),
        deleting=state.stage is Stage.LEAVING,
        template=template,
        detail=state.detail,
        quarantined=state.stage is Stage.BROKEN,
    )
