"""What is observed of one name: the service as seen, and over it what was told and is under way. Pure.

An accepted action shows at once, or the next pass would ask for it again. Not here: whose it is, and
what SkyPilot says (the backend).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from reconciler.core.observed import ObservedWorkload
from reconciler.core.plan import template_data
from reconciler.core.skypilot.service import Service
from reconciler.core.skypilot.states import observed_service
from reconciler.core.skypilot.steps import Removal, leaving
from reconciler.core.workload import Workload


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A request that SkyPilot is working on. `wanted`: how many replicas."""

    verb: str
    deployment: str
    spec_digest: str
    wanted: int


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a name besides the service itself.

    `digests`: of templates by version; `template`: plain data of `template_digest`. `trouble`: why what
    was told is not done, `stalled` if only a human can change that.
    """

    told: Workload | Removal | None = None
    under_way: UnderWay | None = None
    digests: Mapping[int, str] | None = None
    template: Mapping[str, Any] | None = None
    template_digest: str = ""
    trouble: str = ""
    stalled: bool = False
    stuck: str = ""
    """It has been in one passing state for far too long."""


def observed(name: str, service: Service | None, known: Known) -> ObservedWorkload | None:
    """None where there is nothing, and nothing is on its way."""
    base = _base(name, service, known)
    if base is None:
        return None
    if base.quarantined:
        return base
    told, flight = known.told, known.under_way
    if isinstance(told, Workload):
        base = replace(
            base,
            spec_digest=told.spec_digest,
            replicas_wanted=told.replicas,
            template=template_data(told.template),
            detail=_doing(service, flight),
        )
    elif isinstance(told, Removal) or (flight is not None and flight.verb == "down"):
        gone = leaving(base.replicas)
        base = replace(base, deleting=True, replicas=gone, detail=f"deleting: {len(gone)} replicas")
    elif flight is not None:
        # Sent before a restart: what it leads to is as good as told.
        base = replace(
            base,
            spec_digest=flight.spec_digest,
            replicas_wanted=flight.wanted,
            template=_template(known, flight.spec_digest),
            detail=_doing(service, flight),
        )
    if known.trouble:
        base = replace(base, detail=known.trouble)
    if known.stuck or known.stalled:
        base = replace(base, stalled=known.stuck or known.trouble)
    return base


def _base(name: str, service: Service | None, known: Known) -> ObservedWorkload | None:
    if service is not None and service.marks is not None:
        template = _template(known, service.marks.spec_digest)
        return observed_service(service, known.digests or {}, template)
    match known.told, known.under_way:
        case Workload() as workload, _:
            return _empty(name, workload.deployment, workload.spec_digest, workload.replicas)
        case Removal() as removal, flight:
            # Gone already, unless something is still being made.
            return _empty(name, removal.deployment, "", 0) if flight or service else None
        case _, UnderWay() as flight:
            return _empty(name, flight.deployment, flight.spec_digest, flight.wanted)
        case _:
            return None


def _empty(name: str, deployment: str, digest: str, wanted: int) -> ObservedWorkload:
    return ObservedWorkload(name, deployment, digest, wanted)


def _template(known: Known, digest: str) -> Mapping[str, Any]:
    return (known.template or {}) if known.template_digest == digest else {}


def _doing(service: Service | None, flight: UnderWay | None) -> str:
    if service is None:
        return "SkyPilot is creating it" if flight else "to be created in SkyPilot"
    return "SkyPilot is updating it" if flight else "to be updated in SkyPilot"
