"""The one next request that leads a service from what it is to what was told. Pure.

    told, and the service as seen  ->  Up | Update | Down | Wait | Settled | Refused

`up` on a name that exists starts a second controller beside the first (seen with SkyPilot 0.14.1), so
it follows from an absence alone. Not here: sending it, and what is under way already (the backend).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final, Literal

from reconciler.core.observed import ObservedReplica, Phase
from reconciler.core.skypilot.service import Service
from reconciler.core.skypilot.states import Stage, observed_replicas, service_state
from reconciler.core.workload import Workload

UpdateMode = Literal["rolling", "blue_green"]


@dataclass(frozen=True, slots=True)
class Removal:
    """A service that is to go. Its replicas finish first: until released, or until `until`."""

    name: str
    deployment: str
    until: float
    released: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Up:
    """Nothing of that name exists."""


@dataclass(frozen=True, slots=True)
class Update:
    mode: UpdateMode
    rolls: bool = True
    """The template differs; else the number of replicas alone."""


@dataclass(frozen=True, slots=True)
class Down:
    """Nobody is sent to it any more."""


@dataclass(frozen=True, slots=True)
class Wait:
    reason: str


@dataclass(frozen=True, slots=True)
class Settled:
    """It is as told; or, for a removal, it is gone."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Not without a human."""

    reason: str


Step = Up | Update | Down | Wait | Settled | Refused

NOT_OURS: Final = "exists in SkyPilot under another owner; it is never touched"


def next_step(
    told: Workload | Removal,
    service: Service | None,
    owner: str,
    now: float,
    *,
    again: bool = False,
) -> Step:
    """`now` is on the clock of `Removal.until`. `again`: the same once more, because SkyServe gave up."""
    if service is None:
        return Settled() if isinstance(told, Removal) else Up()
    if service.marks is None:
        return Wait("SkyPilot does not show its task yet")
    if service.marks.owner != owner:
        return Refused(f"{service.name} {NOT_OURS}")
    state = service_state(service.status, service.name)
    match state.stage:
        case Stage.BROKEN:
            return Refused(state.detail)
        case Stage.LEAVING:
            return Wait(state.detail)
        case Stage.BUSY | Stage.OPEN:
            pass
    if isinstance(told, Removal):
        # A service whose controller never came up is taken down like any other.
        return _remove(told, service, now)
    same_spec = service.marks.spec_digest == told.spec_digest
    if same_spec and service.marks.replicas == told.replicas and not again:
        return Settled()
    if state.stage is Stage.BUSY:
        return Wait(state.detail)
    all_at_once = not same_spec and told.rollout.strategy == "blueGreen"
    return Update("blue_green" if all_at_once else "rolling", rolls=not same_spec)


def _remove(told: Removal, service: Service, now: float) -> Step:
    if now < told.until and (left := carrying(service, told.released)):
        return Wait(f"{left} replica{'s' * (left != 1)} to finish requests")
    return Down()


def carrying(service: Service, released: Collection[str]) -> int:
    """How many of its replicas routers may still have requests on."""
    return sum(
        bool(r.url) and r.phase in (Phase.READY, Phase.NOT_READY) and r.id not in released
        for r in observed_replicas(service, {}, 0)
    )


def leaving(replicas: Collection[ObservedReplica]) -> tuple[ObservedReplica, ...]:
    """Replicas of a service that is to go: no new requests, and streams finish."""
    return tuple(
        replace(r, phase=Phase.DRAINING, detail="finishes its requests")
        if r.url and r.phase in (Phase.READY, Phase.NOT_READY)
        else r
        for r in replicas
    )
