"""What Git leaves open: how many replicas a load takes, and how far a canary has come. Pure.

    steer(desired, observed, steering, signals, ...) -> the workloads to plan for, and the next steering

Steering can be lost: numbers are then taken from what runs, and a canary begins its step anew. Not here:
either decision (autoscale, canary), or what is done about them (plan, backends).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, inf
from typing import Final

from reconciler.core.autoscale import Scale, decide
from reconciler.core.canary import ARM_SUFFIX, Canary, Judged, Step, advance, canary_name
from reconciler.core.observed import Observation, ObservedWorkload, Phase, Unknown
from reconciler.core.signals import Load, Signals, Totals
from reconciler.core.workload import Desired, Template, Workload

EVENTS_KEPT: Final = 10
_RATE_OVER_S: Final = (5.0, 60.0)


@dataclass(frozen=True, slots=True)
class Event:
    """A decision, for people: when (RFC 3339, UTC), what kind, and why."""

    at: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Steering:
    """What was decided besides Git. By workload name, events by deployment."""

    scales: Mapping[str, Scale] = field(default_factory=dict)
    canaries: Mapping[str, Canary] = field(default_factory=dict)
    events: Mapping[str, tuple[Event, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Steered:
    """The workloads to plan for, and what follows besides."""

    desired: Desired
    steering: Steering
    news: tuple[tuple[str, Event], ...] = ()
    """(deployment, event) of this pass."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """Deployment -> percent of its sessions that the new template serves, of those with a canary."""

    @property
    def restless(self) -> bool:
        """Whether time alone may change something: then passes come often."""
        return bool(self.steering.scales) or bool(self.weights)


def steer(
    desired: Desired,
    observed: Sequence[Observation | Unknown],
    steering: Steering,
    signals: Signals,
    *,
    before: Desired,
    revision: str,
    now: float,
    now_text: str,
) -> Steered:
    """One pass.

    Args:
        desired: as compiled from Git.
        observed: what the backends see.
        steering: of the pass before.
        signals: what routers say.
        before: the workloads planned for in the pass before; they know what stable ones run.
        revision: the commit in effect.
        now: seconds, on the clock of `signals` and `steering`.
        now_text: the same for people.
    """
    if not any(_is_steered(w) for w in desired.workloads.values()):
        return Steered(desired, Steering())
    seen = {
        (o.backend, name): workload
        for o in observed
        if isinstance(o, Observation)
        for name, workload in o.workloads.items()
    }
    news: list[tuple[str, Event]] = []
    scaled, scales = _scaled(desired, seen, steering, signals, now)
    for name, scale in scales.items():
        old = steering.scales.get(name)
        if scale.reason and scale.reason != (old.reason if old else ""):
            deployment = desired.workloads[name].deployment
            news.append((deployment, Event(now_text, "Scaled", scale.reason)))

    asked = {o.backend for o in observed if isinstance(o, Observation)}
    workloads: dict[str, Workload] = {}
    canaries: dict[str, Canary] = {}
    weights: dict[str, int] = {}
    for name, workload in scaled.items():
        if not _has_canaries(workload):
            workloads[name] = workload
            continue
        state = steering.canaries.get(name, Canary())
        if workload.backend not in asked:
            # Nothing is concluded, and nothing changed, while nobody can look.
            canaries[name] = state
            for kept in (name, canary_name(name)):
                if kept in before.workloads:
                    workloads[kept] = before.workloads[kept]
            workloads.setdefault(name, workload)
            continue
        step = _canary_step(workload, state, seen, signals, before, revision, now)
        canaries[name] = step.state
        workloads[name] = step.stable
        if step.canary is not None:
            workloads[step.canary.name] = step.canary
            weights[workload.deployment] = step.weight_percent
        if step.said:
            kind = "RolledBack" if step.state.rejected else "Canary"
            news.append((workload.deployment, Event(now_text, kind, step.said)))

    events = {d: steering.events[d] for d in _deployments(desired) if d in steering.events}
    for deployment, event in news:
        events[deployment] = (*events.get(deployment, ()), event)[-EVENTS_KEPT:]
    return Steered(
        replace(desired, workloads=dict(sorted(_weighted(workloads, weights).items()))),
        Steering(scales, canaries, events),
        tuple(news),
        weights,
    )


def _is_steered(workload: Workload) -> bool:
    return workload.scaling is not None or _has_canaries(workload)


def _has_canaries(workload: Workload) -> bool:
    beside = workload.rollout.strategy == "canary" and workload.template.job is None
    return beside and workload.backend != "external"


Seen = Mapping[tuple[str, str], ObservedWorkload]
"""(backend, workload) -> what is seen."""


def _scaled(
    desired: Desired, seen: Seen, steering: Steering, signals: Signals, now: float
) -> tuple[dict[str, Workload], dict[str, Scale]]:
    """The workloads at the number of replicas that their load takes."""
    sharing: dict[str, int] = {}
    for workload in desired.workloads.values():
        if workload.scaling is not None:
            sharing[workload.function] = sharing.get(workload.function, 0) + 1
    used = _used(desired, steering)
    made: dict[str, Workload] = {}
    scales: dict[str, Scale] = {}
    for name, workload in desired.workloads.items():
        if workload.scaling is None:
            made[name] = workload
            continue
        current = seen.get((workload.backend, name))
        scale = steering.scales.get(name)
        if scale is None:
            # After a lost memory, what runs tells how far it had come.
            scale = Scale(current.replicas_wanted if current else workload.replicas)
        load = _load(workload, signals, now, sharing[workload.function])
        most = _most(workload, scale.replicas, used, desired)
        scale = decide(
            workload.scaling,
            scale,
            load,
            ready=current.count(Phase.READY) if current else 0,
            most=most,
            now=now,
        )
        for tenant in workload.tenants if len(workload.tenants) == 1 else ():
            before = steering.scales.get(name, Scale(workload.replicas)).replicas
            used[tenant] = (
                used.get(tenant, 0) + (scale.replicas - before) * workload.placement.gpus_each
            )
        scales[name] = scale
        made[name] = replace(workload, replicas=scale.replicas)
    return made, scales


def _load(workload: Workload, signals: Signals, now: float, sharing: int) -> Load | None:
    assert workload.scaling is not None
    low, high = _RATE_OVER_S
    if workload.scaling.metric is None:
        high = low  # whether anybody asks at all
    load = signals.load(
        workload.function,
        (workload.deployment, workload.deployment + ARM_SUFFIX),
        workload.cluster,
        now,
        over_s=min(max(workload.scaling.upscale_delay, low), high),
    )
    if load is None:
        return None
    # Who waits, waits for a function; its deployments share them.
    return replace(load, waiting=ceil(load.waiting / sharing))


def _used(desired: Desired, steering: Steering) -> dict[str, int]:
    """Tenant -> GPUs that its own deployments have."""
    used: dict[str, int] = {}
    for name, workload in desired.workloads.items():
        if len(workload.tenants) == 1:
            scale = steering.scales.get(name)
            replicas = scale.replicas if scale and workload.scaling else workload.replicas
            gpus = replicas * workload.placement.gpus_each
            used[workload.tenants[0]] = used.get(workload.tenants[0], 0) + gpus
    return used


def _most(
    workload: Workload, replicas: int, used: Mapping[str, int], desired: Desired
) -> int | None:
    """What a price ceiling and a tenant's GPUs allow; None where neither says anything."""
    placed = workload.placement
    most = inf
    if placed.max_price_per_hour is not None and placed.ceiling_each:
        most = floor(placed.max_price_per_hour / placed.ceiling_each + 1e-9)
    if placed.gpus_each and len(workload.tenants) == 1:
        tenant = workload.tenants[0]
        if tenant in desired.gpu_limits:
            others = used.get(tenant, 0) - replicas * placed.gpus_each
            most = min(most, (desired.gpu_limits[tenant] - others) // placed.gpus_each)
    return None if most == inf else max(0, int(most))


def _canary_step(
    workload: Workload,
    state: Canary,
    seen: Seen,
    signals: Signals,
    before: Desired,
    revision: str,
    now: float,
) -> Step:
    current = seen.get((workload.backend, workload.name))
    digest = current.spec_digest if current else ""
    running: Template | None = None
    known = before.workloads.get(workload.name)
    if known is not None and known.spec_digest == digest:
        running = known.template
    old = signals.totals(workload.deployment, workload.cluster, digest)
    new = signals.totals(workload.deployment + ARM_SUFFIX, workload.cluster, workload.spec_digest)
    return advance(
        workload,
        state,
        current,
        seen.get((workload.backend, canary_name(workload.name))),
        Judged(new, old),
        revision=revision,
        running=running,
        now=now,
    )


def _weighted(workloads: Mapping[str, Workload], weights: Mapping[str, int]) -> dict[str, Workload]:
    """Shares of sessions, in hundredths of a deployment's own weight, where one has a canary."""
    split = {w.function for w in workloads.values() if w.deployment in weights}
    made: dict[str, Workload] = {}
    for name, workload in workloads.items():
        if workload.function in split:
            percent = 100
            if workload.deployment in weights:
                canary = weights[workload.deployment]
                percent = canary if workload.arm else 100 - canary
            made[name] = replace(workload, weight=workload.weight * percent)
        else:
            made[name] = workload
    return made


def _deployments(desired: Desired) -> list[str]:
    return [w.deployment for w in desired.workloads.values()]


def resumed(steering: Steering) -> Steering:
    """What of it means something to another process: decisions, but no times and no counts."""
    return replace(
        steering,
        scales={
            name: replace(scale, above_since=None, above_least=0, below_since=None, below_most=0)
            for name, scale in steering.scales.items()
        },
        canaries={
            name: replace(canary, began=None, since=None, before_new=Totals(), before_old=Totals())
            for name, canary in steering.canaries.items()
        },
    )
