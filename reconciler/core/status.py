"""What Git shows of the world: one document an object, and a summary. Pure.

Conditions follow Kubernetes: Ready; abnormal-true Reconciling, Stalled, Degraded, BudgetLow. A
lastTransitionTime moves only when its condition's status does, and nothing here depends on rates,
heartbeats or the clock otherwise, so an unchanged world gives equal bytes. Not here: YAML or Git.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reconciler.core import budget
from reconciler.core.action import Create, Noop, Plan, Update
from reconciler.core.autoscale import bounds
from reconciler.core.config import ConfigObject, ObjectKey, Problem
from reconciler.core.last_good import Effective
from reconciler.core.observed import Observation, ObservedWorkload, Phase, Unknown
from reconciler.core.steer import Steering
from reconciler.core.unacted import not_acted_on_yet
from reconciler.core.workload import Desired, Workload
from schemas.base import API_VERSION
from schemas.tenant import Tenant
from schemas.wire.events import MonthToDate

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RoutingView:
    """What routers serve. `changed_at` is the generation that last changed a deployment's arm."""

    generation: int = 0
    revision: str = ""
    routers: Mapping[str, int] = field(default_factory=dict)
    """Router id -> generation it serves."""
    changed_at: Mapping[str, int] = field(default_factory=dict)

    def behind(self, deployment: str) -> list[str]:
        """Routers that do not serve the deployment's newest arm yet."""
        need = self.changed_at.get(deployment, 0)
        return sorted(router for router, served in self.routers.items() if served < need)


@dataclass(frozen=True, slots=True)
class World:
    """Everything a status is written from."""

    effective: Effective
    desired: Desired
    observed: Sequence[Observation | Unknown]
    plan: Plan
    routing: RoutingView
    failures: Mapping[str, str] = field(default_factory=dict)
    """Workload name -> why its last action failed."""
    retrying: frozenset[str] = frozenset()
    """Of those: they may well succeed without anybody doing anything."""
    source_problem: str = ""
    """Why the repo could not be read, or what is odd about it, where that is so."""
    routing_problem: str = ""
    """Why routers cannot have what follows from all this, where that is so."""
    steering: Steering = field(default_factory=Steering)
    month_to_date: Mapping[str, MonthToDate] = field(default_factory=dict)
    """Tenant -> what the ledger has of this month."""


def status_path(key: ObjectKey) -> str:
    return f"status/{key.kind.lower()}/{key.name}.yaml"


SUMMARY_PATH = "status/summary.yaml"


def documents(world: World, before: Mapping[str, Document], now: str) -> dict[str, Document]:
    """Path -> document, for every object known and the summary. `now` is RFC 3339 in UTC."""
    view = _View.of(world)
    errors: dict[ObjectKey, list[Problem]] = {}
    for problem in world.effective.problems:
        if problem.key is not None and problem.severity == "error":
            errors.setdefault(problem.key, []).append(problem)

    made: dict[str, Document] = {}
    ready: dict[str, bool] = {}
    for key, obj in sorted(world.effective.objects.items()):
        facts: Document = {}
        conditions: list[Document]
        if key.kind == "Deployment":
            conditions, facts = _deployment(view, key.name)
        elif key.kind == "Function":
            conditions, facts = _function(view, key.name)
        else:
            conditions = [_condition("Ready", True, "Accepted", "in effect")]
            if isinstance(obj.value, Tenant):
                used = world.month_to_date.get(key.name, MonthToDate())
                if low := budget.warning(obj.value.spec.budget, used):
                    conditions.append(_condition("BudgetLow", True, *low))
        conditions = _with_problems(conditions, errors.get(key, []), key in world.effective.held)
        path = status_path(key)
        status = _status(obj, world.effective.revision, facts, conditions, before.get(path), now)
        made[path] = _document(key, status)
        ready[str(key)] = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    for key, problems in sorted(errors.items()):
        path = status_path(key)
        if path not in made:
            conditions = _with_problems([], problems, held=False)
            revision = world.effective.revision
            status = _status(None, revision, {}, conditions, before.get(path), now)
            made[path] = _document(key, status)
            ready[str(key)] = False
    made[SUMMARY_PATH] = _summary(world, ready)
    return made


def _condition(kind: str, status: bool | None, reason: str, message: str) -> Document:
    word = "Unknown" if status is None else str(status)
    return {"type": kind, "status": word, "reason": reason, "message": message}


@dataclass(frozen=True, slots=True)
class _View:
    """The world, ordered for looking up one object after another."""

    world: World
    by_deployment: Mapping[str, Sequence[Workload]]
    by_function: Mapping[str, Sequence[Workload]]
    observed: Mapping[tuple[str, str], ObservedWorkload]
    """(backend, workload name) -> what is seen."""
    unknown: Mapping[str, str]
    held: Mapping[str, str]
    acting: Mapping[str, str]

    @staticmethod
    def of(world: World) -> _View:
        by_deployment: dict[str, list[Workload]] = {}
        by_function: dict[str, list[Workload]] = {}
        for _, workload in sorted(world.desired.workloads.items()):
            by_deployment.setdefault(workload.deployment, []).append(workload)
            by_function.setdefault(workload.function, []).append(workload)
        seen = [o for o in world.observed if isinstance(o, Observation)]
        actions = world.plan.actions
        return _View(
            world,
            by_deployment,
            by_function,
            {(o.backend, name): w for o in seen for name, w in o.workloads.items()},
            {o.backend: o.reason for o in world.observed if isinstance(o, Unknown)},
            {a.name: a.reason for a in actions if isinstance(a, Noop) and a.held and not a.backend},
            {a.name: a.reason for a in actions if isinstance(a, Create | Update)},
        )

    def of_workload(self, workload: Workload) -> ObservedWorkload | None:
        return self.observed.get((workload.backend, workload.name))


def _deployment(view: _View, name: str) -> tuple[list[Document], Document]:
    world, held, unknown, acting = view.world, view.held, view.unknown, view.acting
    workloads = view.by_deployment.get(name, ())
    if not workloads:
        reason = world.desired.shielded.get(
            name, "no listed cluster meets the placement constraints"
        )
        return [
            _condition("Ready", False, "NoPlacement", reason),
            _condition("Stalled", True, "NoPlacement", reason),
        ], {}
    workload = next(w for w in workloads if not w.arm)
    current = view.of_workload(workload)
    facts: Document = {"workload": workload.name, "cluster": workload.cluster}
    if workload.placement.gpus_each:
        facts["placement"] = _placement(workload)
    canary = world.steering.canaries.get(workload.name)
    facts |= _steered(view, workload, [w for w in workloads if w.arm])
    if workload.backend in unknown:
        text = f"backend {workload.backend} cannot be asked: {unknown[workload.backend]}"
        return [
            _condition("Ready", None, "BackendUnknown", text),
            _condition("Degraded", True, "BackendUnknown", text),
        ], facts | {"replicas": {"wanted": workload.replicas}}
    if workload.template.job is not None and (current or workload.name not in held):
        judged, told = _job(workload, current, world.failures.get(workload.name, ""))
        return judged, facts | told
    replicas = current.replicas if current else ()
    fresh = [r for r in replicas if r.spec_digest == workload.spec_digest]
    up = [r for r in replicas if r.phase is Phase.READY]
    up_fresh = [r for r in fresh if r.phase is Phase.READY]
    facts["replicas"] = {
        "wanted": workload.replicas,
        "ready": len(up),
        "updated": len(up_fresh),
    }
    leaving = [r for r in replicas if r.phase is Phase.DRAINING]
    if leaving:
        facts["replicas"]["draining"] = len(leaving)
    facts["endpoints"] = [
        {"replica": r.id, "url": r.url, "phase": r.phase.value}
        for r in sorted(replicas, key=lambda r: r.id)
        if r.url and r.phase in (Phase.READY, Phase.DRAINING)
    ]

    if workload.name in held and current is None:
        known = any(o.backend == workload.backend for o in world.observed)
        reason = "Held" if known else "NoBackend"
        return [
            _condition("Ready", False, reason, held[workload.name]),
            _condition("Stalled", True, reason, held[workload.name]),
        ], facts

    conditions: list[Document] = []
    reconciling: Document | None = None
    failure = world.failures.get(workload.name, "")
    complete = len(up_fresh) >= workload.replicas and len(replicas) - len(leaving) == len(up_fresh)
    behind = world.routing.behind(name)
    routers = len(world.routing.routers)
    counted = f"{len(up_fresh)} of {workload.replicas} replicas ready"
    if complete and not leaving and not behind:
        asleep = "Asleep" if workload.scaling else "Suspended"
        reason = asleep if workload.replicas == 0 else "Serving"
        live = f"; live on {routers} router{'s' * (routers != 1)}" if routers else ""
        conditions.append(_condition("Ready", True, reason, counted + live))
    else:
        why = "RoutersBehind" if complete and behind else "Progressing"
        waiting = f"; waiting for router {', '.join(behind)}" if complete and behind else ""
        older = f", {len(up) - len(up_fresh)} of the spec before" if len(up) > len(up_fresh) else ""
        is_up = complete and not behind
        conditions.append(
            _condition("Ready", is_up, "Serving" if is_up else why, counted + older + waiting)
        )
        doing = acting.get(workload.name) or (current.detail if current else "") or "converging"
        reconciling = _condition("Reconciling", True, why, doing)
    sick = [r for r in replicas if r.phase in (Phase.FAILED, Phase.NOT_READY)]
    if failure and workload.name in world.retrying:
        conditions.append(_condition("Reconciling", True, "Retrying", failure))
    elif failure:
        conditions.append(_condition("Stalled", True, "ActionFailed", failure))
    elif current is not None and current.quarantined:
        conditions.append(_condition("Stalled", True, "Quarantined", current.detail))
    elif current is not None and current.stalled:
        conditions.append(_condition("Stalled", True, "BackendStalled", current.stalled))
    elif workload.name in held:
        conditions.append(_condition("Stalled", True, "Held", held[workload.name]))
    elif canary is not None and canary.rejected:
        where = canary.revert_branch or "none yet"
        text = f"{canary.why}; the old spec serves; revert branch: {where}"
        conditions.append(_condition("Stalled", True, "RolledBack", text))
    elif second := [w for w in workloads if w.arm]:
        share = f"{_share(workload, second[0])} % of sessions go to {second[0].spec_digest[:8]}"
        conditions.append(_condition("Reconciling", True, "Canary", share))
    elif reconciling:
        conditions.append(reconciling)
    if sick:
        text = "; ".join(f"{r.id} {r.phase.value}: {r.detail or 'no detail'}" for r in sick[:3])
        conditions.append(_condition("Degraded", True, "ReplicasFailing", text))
    return conditions, facts


def _job(
    workload: Workload, current: ObservedWorkload | None, failure: str
) -> tuple[list[Document], Document]:
    """What runs once to its end: ready is one that has succeeded."""
    job = workload.template.job
    assert job is not None
    runs = [r for r in current.replicas if r.spec_digest == workload.spec_digest] if current else []
    run = runs[-1] if runs else None
    told: Document = {"job": {"kind": job.kind, "run": job.run, "state": "pending"}}
    if run is not None:
        told["job"] |= {"state": run.phase.value, "attempt": run.restarts + 1}
    if workload.replicas == 0:
        return [_condition("Ready", True, "Suspended", "it is not run")], told
    match run.phase if run else None:
        case Phase.SUCCEEDED:
            return [_condition("Ready", True, "Succeeded", "it ran to its end")], told
        case Phase.FAILED if run is not None:
            why = run.detail or "no detail"
            return [
                _condition("Ready", False, "Failed", why),
                _condition("Stalled", True, "JobFailed", f"attempt {run.restarts + 1}: {why}"),
            ], told
        case _:
            detail = failure or (run.detail if run else "")
            text = "it runs" if run and run.phase is Phase.RUNNING else detail
            return [
                _condition("Ready", False, "Running", text or "it waits to be started"),
                _condition("Reconciling", True, "Running", text or "it waits to be started"),
            ], told


def _steered(view: _View, workload: Workload, second: Sequence[Workload]) -> Document:
    """What load and a canary decided, and the last decisions. Says the same until one is made."""
    steering = view.world.steering
    found: Document = {}
    if (scale := steering.scales.get(workload.name)) and workload.scaling:
        low, high = bounds(workload.scaling)
        found["scaling"] = {"replicas": scale.replicas, "min": low, "max": high}
        if scale.reason:
            found["scaling"]["last"] = scale.reason
    canary = steering.canaries.get(workload.name)
    if second and canary is not None:
        current = view.of_workload(second[0])
        found["canary"] = {
            "specDigest": second[0].spec_digest,
            "step": canary.step + 1,
            "steps": len(workload.rollout.steps),
            "weightPercent": _share(workload, second[0]),
            "replicas": {
                "wanted": second[0].replicas,
                "ready": current.count(Phase.READY) if current else 0,
            },
        }
    if events := steering.events.get(workload.deployment):
        found["events"] = [{"time": e.at, "reason": e.reason, "message": e.message} for e in events]
    return found


def _share(stable: Workload, canary: Workload) -> int:
    total = stable.weight + canary.weight
    return round(100 * canary.weight / total) if total else 0


def _placement(workload: Workload) -> Document:
    """Where it was put and why, with its GPUs and what they cost at the number wanted now."""
    placed = workload.placement
    price = workload.price_per_hour
    return {
        "reason": placed.why,
        "gpus": workload.replicas * placed.gpus_each,
        "gpuType": placed.gpu_type,
        "pricePerHour": "unknown" if price is None else f"{price:.2f} USD",
    }


def _function(view: _View, name: str) -> tuple[list[Document], Document]:
    mine = view.by_function.get(name, ())
    seen = [current for w in mine if (current := view.of_workload(w))]
    up = sum(current.count(Phase.READY) for current in seen)
    facts: Document = {
        "deployments": list(dict.fromkeys(w.deployment for w in mine)),
        "readyReplicas": up,
    }
    if not mine:
        return [_condition("Ready", False, "NotDeployed", "no Deployment runs it")], facts
    if mine[0].template.job is not None:
        del facts["readyReplicas"]
        return [_condition("Ready", True, "Job", "its deployments tell how its runs went")], facts
    if up:
        ready = f"{up} replica{'s' * (up != 1)} ready"
        return [_condition("Ready", True, "Serving", ready)], facts
    if unknown := sorted({w.backend for w in mine if w.backend in view.unknown}):
        del facts["readyReplicas"]
        text = f"backend {', '.join(unknown)} cannot be asked"
        return [_condition("Ready", None, "BackendUnknown", text)], facts
    return [_condition("Ready", False, "NoReplicas", "no replica is ready")], facts


def _with_problems(
    conditions: list[Document], problems: Sequence[Problem], held: bool
) -> list[Document]:
    if not problems:
        return conditions
    text = str(problems[0]) + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
    if held:
        text = f"the last good version stays in effect; {text}"
    also = [c["message"] for c in conditions if c["type"] == "Stalled"]
    text = "; also: ".join([text, *also])
    kept = [c for c in conditions if c["type"] not in ("Stalled", "Reconciling")]
    if not kept:
        kept = [
            _condition("Ready", False, "Invalid", "not in effect: the repo's version is invalid")
        ]
    return [*kept, _condition("Stalled", True, "Invalid", text)]


def _document(key: ObjectKey, status: Document) -> Document:
    return {
        "apiVersion": API_VERSION,
        "kind": key.kind,
        "metadata": {"name": key.name},
        "status": status,
    }


def _status(
    obj: ConfigObject | None,
    revision: str,
    facts: Document,
    conditions: list[Document],
    before: Document | None,
    now: str,
) -> Document:
    old = (before or {}).get("status", {})
    times = {
        (c.get("type"), c.get("status")): c.get("lastTransitionTime")
        for c in old.get("conditions", [])
    }
    status: Document = {}
    if obj:
        same = old.get("specDigest") == obj.digest
        generation = int(old.get("observedGeneration", 0))
        status["observedGeneration"] = generation if same else generation + 1
        status["observedRevision"] = old.get("observedRevision") if same else revision
        status["specDigest"] = obj.digest
        status["source"] = str(obj.location)
        if unacted := not_acted_on_yet(obj.value):
            status["notActedOnYet"] = unacted
    elif "observedGeneration" in old:
        # Not in effect now; counted on from here when it is again.
        status["observedGeneration"] = old["observedGeneration"]
    status |= facts
    status["conditions"] = [
        {**c, "lastTransitionTime": times.get((c["type"], c["status"])) or now} for c in conditions
    ]
    return status


def _summary(world: World, ready: Mapping[str, bool]) -> Document:
    counts: dict[str, dict[str, int]] = {}
    for name, is_ready in sorted(ready.items()):
        count = counts.setdefault(name.split("/", 1)[0], {"total": 0, "ready": 0})
        count["total"] += 1
        count["ready"] += is_ready
    summary: Document = {
        "apiVersion": API_VERSION,
        "kind": "Summary",
        "revision": world.effective.revision,
        "desiredDigest": world.effective.digest,
        "objects": counts,
        "routing": {
            "generation": world.routing.generation,
            "revision": world.routing.revision,
            "routers": len(world.routing.routers),
        },
    }
    if world.routing_problem:
        summary["routing"]["problem"] = world.routing_problem
    if world.source_problem:
        summary["source"] = world.source_problem
    if world.plan.refusals:
        summary["refused"] = list(world.plan.refusals)
    if world.effective.problems:
        summary["problems"] = [str(p) for p in world.effective.problems[:100]]
    return summary
