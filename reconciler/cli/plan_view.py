"""What a plan means for people: what starts, restarts and stops, and what it takes. Pure.

Not here: making the plan (core.plan), or how it is written out (plan_text, plan_markdown).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from reconciler.core.action import Action, Change, Create, Delete, Noop, Plan, Update
from reconciler.core.capacity import gpus_of_tenants
from reconciler.core.config import ConfigObject, ObjectKey, Problem
from reconciler.core.diff import diff
from reconciler.core.last_good import Objects
from reconciler.core.observed import Observation, ObservedWorkload, Unknown
from reconciler.core.plan import template_data
from reconciler.core.rollout import surge_replicas
from reconciler.core.workload import Desired, Workload
from schemas.cluster import Cluster, ClusterSpec
from schemas.deployment import Deployment
from schemas.function import Function
from schemas.kinds import ConfigSpec
from schemas.tenant import Tenant

Verb = Literal["create", "roll", "scale", "delete", "held"]
VERBS: Final[tuple[Verb, ...]] = ("create", "roll", "scale", "delete", "held")

# What a workload's own row tells: fields that start, stop, move or replace replicas.
_TOLD_BY_WORKLOADS: Final[dict[str, tuple[str, ...]]] = {
    "Function": (
        "spec.model.uri",
        "spec.model.format",
        "spec.model.quantization",
        "spec.model.servedName",
        "spec.runtime",
        "spec.resources",
        "spec.readiness",
        "spec.scaling.minReplicas",
    ),
    "Deployment": (
        "spec.function",
        "spec.placement.cluster",
        "spec.placement.anyOf",
        "spec.replicas",
        "spec.suspend",
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One workload that is acted on, or would be were it not `held`."""

    verb: Verb
    workload: str
    deployment: str
    cluster: str
    reason: str
    effect: str
    """What happens to replicas, in words."""
    replicas_before: int
    replicas_after: int
    changes: tuple[Change, ...] = ()
    placement: str = ""
    """Why it goes to this cluster, where it could go to another; with its price where one is known."""


@dataclass(frozen=True, slots=True)
class ObjectChange:
    """An object of the repo that differs in ways that restart nothing."""

    verb: Literal["add", "change", "remove"]
    key: ObjectKey
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class GpuUse:
    """GPUs of one type in one cluster; `listed` is the cluster's inventory, where it has one."""

    cluster: str
    type: str
    before: int
    after: int
    listed: int | None
    price_per_hour: float | None
    """USD a GPU."""


@dataclass(frozen=True, slots=True)
class TenantUse:
    """GPUs of a tenant's own deployments, against what it is promised and the most it may have."""

    tenant: str
    before: int
    after: int
    quota: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class PlanView:
    """Everything that a plan's reader wants to know, in the order they want it."""

    before: str
    after: str
    rows: tuple[Row, ...] = ()
    objects: tuple[ObjectChange, ...] = ()
    unchanged: int = 0
    gpus: tuple[GpuUse, ...] = ()
    tenants: tuple[TenantUse, ...] = ()
    refusals: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    def count(self, verb: Verb) -> int:
        return sum(row.verb == verb for row in self.rows)

    @property
    def changes_anything(self) -> bool:
        return bool(self.objects) or any(row.verb != "held" for row in self.rows)

    @property
    def errors(self) -> int:
        return sum(problem.severity == "error" for problem in self.problems)

    @property
    def price_per_hour(self) -> tuple[float, float] | None:
        """USD before and after, over the GPUs with a price; None where nothing has one."""
        priced = [(use, use.price_per_hour) for use in self.gpus if use.price_per_hour is not None]
        if not priced:
            return None
        return (
            sum(use.before * price for use, price in priced),
            sum(use.after * price for use, price in priced),
        )

    @property
    def unpriced(self) -> tuple[str, ...]:
        """GPU types in use that no inventory has a price for, as `type in cluster`."""
        return tuple(f"{u.type} in {u.cluster}" for u in self.gpus if u.price_per_hour is None)


def plan_view(
    made: Plan,
    observed: Sequence[Observation | Unknown],
    desired: Desired,
    objects: Objects,
    *,
    objects_before: Objects,
    labels: tuple[str, str],
    problems: Sequence[Problem] = (),
    notes: Sequence[str] = (),
) -> PlanView:
    """A plan with what it starts from and leads to.

    Args:
        made: the plan from `observed` to `desired`.
        observed: what is there, or is predicted to be.
        desired: what is wanted.
        objects: the repo's objects that `desired` was compiled from.
        objects_before: those in effect before.
        labels: what is compared, for people: (before, after).
        problems: of the repo.
        notes: further sentences for the reader.
    """
    current = {
        name: workload
        for seen in observed
        if isinstance(seen, Observation)
        for name, workload in seen.workloads.items()
    }
    rows = tuple(row for action in made.actions if (row := _row(action, current, desired)))
    unchanged = sum(isinstance(a, Noop) and not a.held for a in made.actions)
    return PlanView(
        before=labels[0],
        after=labels[1],
        rows=rows,
        objects=tuple(_objects(objects_before, objects)),
        unchanged=unchanged,
        gpus=tuple(_gpus(made, current, desired, [*objects_before.values(), *objects.values()])),
        tenants=tuple(_tenants(objects_before, objects)),
        refusals=made.refusals,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _row(action: Action, current: Mapping[str, ObservedWorkload], desired: Desired) -> Row | None:
    before = current.get(action.name)
    was = before.replicas_wanted if before else 0
    match action:
        case Create(workload=workload):
            return _effective_row(
                "create", workload, action.reason, was, f"{_replicas(workload.replicas)} started"
            )
        case Update(workload=workload, how="scale"):
            delta = workload.replicas - was
            word = "started" if delta > 0 else "drained and stopped"
            return _effective_row(
                "scale",
                workload,
                action.reason,
                was,
                f"{_replicas(abs(delta))} {word}",
                action.changes,
            )
        case Update(workload=workload):
            return _effective_row(
                "roll", workload, action.reason, was, _roll(workload, was), action.changes
            )
        case Delete():
            effect = f"{_replicas(was)} drained and stopped"
            cluster = cluster_of(action.name, action.deployment)
            return Row(
                "delete", action.name, action.deployment, cluster, action.reason, effect, was, 0
            )
        case Noop(held=True):
            wanted = desired.workloads.get(action.name)
            cluster = wanted.cluster if wanted else cluster_of(action.name, action.deployment)
            return Row(
                "held",
                action.name,
                action.deployment,
                cluster,
                action.reason,
                "left as it is",
                was,
                was,
            )
        case _:
            return None


def _effective_row(
    verb: Verb,
    workload: Workload,
    reason: str,
    was: int,
    effect: str,
    changes: tuple[Change, ...] = (),
) -> Row:
    return Row(
        verb,
        workload.name,
        workload.deployment,
        workload.cluster,
        reason,
        effect,
        was,
        workload.replicas,
        changes,
        _placement(workload),
    )


def _placement(workload: Workload) -> str:
    placed = workload.placement
    if not placed.why or placed.why == "named":
        return ""
    price = workload.price_per_hour
    cost = f", ${price:,.2f} an hour" if price else ""
    return f"{workload.cluster}{cost}: {placed.why}"


def _roll(workload: Workload, was: int) -> str:
    if not was:
        return f"{_replicas(workload.replicas)} started" if workload.replicas else "nothing runs"
    scaled = f", {was} -> {workload.replicas}" if was != workload.replicas else ""
    how = {
        "rolling": f"rolling, with at most {workload.rollout.max_surge} more than wanted",
        "blueGreen": "all at once when as many new ones are ready",
        "canary": "as a canary",
    }[workload.rollout.strategy]
    surge = surge_replicas(workload, was)
    gpus = surge * workload.placement.gpus_each
    meanwhile = f"; {gpus} GPU{'s' * (gpus != 1)} more meanwhile" if gpus else ""
    return f"{_replicas(was)} replaced{scaled}, {how}{meanwhile}"


def _replicas(count: int) -> str:
    return f"{count} replica{'' if count == 1 else 's'}"


def cluster_of(workload: str, deployment: str) -> str:
    """The cluster in a workload's name; "" where the name was too long to hold it."""
    found = workload.removeprefix(f"{deployment}--")
    return found if found != workload else ""


def _objects(before: Objects, after: Objects) -> Iterator[ObjectChange]:
    used_before, used_after = _used_functions(before), _used_functions(after)
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old is None or new is None:
            # A deployment comes and goes as its workload does.
            if key.kind != "Deployment":
                yield ObjectChange("add" if old is None else "remove", key)
            continue
        if old.digest == new.digest:
            continue
        told = _TOLD_BY_WORKLOADS.get(key.kind, ())
        if key.kind == "Function" and key.name not in used_before | used_after:
            told = ()
        changes = tuple(
            change
            for change in diff(_readable(old.value), _readable(new.value))
            if not change.path.startswith(told or ("\0",))
        )
        if changes:
            yield ObjectChange("change", key, changes)


def _tenants(before: Objects, after: Objects) -> Iterator[TenantUse]:
    was, now = _gpus_of_tenants(before), _gpus_of_tenants(after)
    for key, obj in sorted(after.items()):
        if isinstance(obj.value, Tenant):
            gpus = obj.value.spec.gpus
            if gpus.quota or gpus.limit is not None:
                yield TenantUse(
                    key.name, was.get(key.name, 0), now.get(key.name, 0), gpus.quota, gpus.limit
                )


def _gpus_of_tenants(objects: Objects) -> dict[str, int]:
    functions = {k.name: o.value for k, o in objects.items() if isinstance(o.value, Function)}
    deployments = {k.name: o.value for k, o in objects.items() if isinstance(o.value, Deployment)}
    used = gpus_of_tenants(functions, deployments)
    return {tenant: sum(each.values()) for tenant, each in used.items()}


def _used_functions(objects: Objects) -> set[str]:
    return {
        str(obj.value.spec.function) for obj in objects.values() if obj.value.kind == "Deployment"
    }


def _readable(value: ConfigSpec) -> dict[str, Any]:
    """As the YAML has it, but keys by their ids, so that one more does not look like many changed."""
    data = value.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    keys = data.get("spec", {}).get("keys")
    if isinstance(keys, list):
        data["spec"]["keys"] = {
            key["id"]: {n: v for n, v in key.items() if n != "id"}
            | {"sha256": f"{key['sha256'][:12]}..."}
            for key in keys
        }
    return data


def _gpus(
    made: Plan,
    current: Mapping[str, ObservedWorkload],
    desired: Desired,
    objects: Sequence[ConfigObject],
) -> Iterator[GpuUse]:
    clusters = {o.key.name: o.value.spec for o in objects if isinstance(o.value, Cluster)}
    before: Counter[tuple[str, str]] = Counter()
    after: Counter[tuple[str, str]] = Counter()

    def take(
        into: Counter[tuple[str, str]], cluster: str, template: Mapping[str, Any], replicas: int
    ) -> None:
        types, count = gpus_of(template)
        if types and count:
            into[cluster, _likely(types, clusters.get(cluster))] += count * replicas

    kept = {a.name for a in made.actions if isinstance(a, Noop)}
    told = {a.name for a in made.effects if not isinstance(a, Delete)}
    for name, seen in current.items():
        cluster = cluster_of(name, seen.deployment)
        take(before, cluster, seen.template, seen.replicas_wanted)
        if name in kept:
            take(after, cluster, seen.template, seen.replicas_wanted)
    for name, workload in desired.workloads.items():
        if name in told:
            take(after, workload.cluster, template_data(workload.template), workload.replicas)
    for cluster, gpu_type in sorted(before.keys() | after.keys()):
        listed = [
            g
            for g in (clusters[cluster].gpus if cluster in clusters else ())
            if _same(g.type, gpu_type)
        ]
        yield GpuUse(
            cluster,
            gpu_type,
            before[cluster, gpu_type],
            after[cluster, gpu_type],
            sum(g.count for g in listed) if listed else None,
            next((g.price_per_hour for g in listed if g.price_per_hour is not None), None),
        )


def gpus_of(template: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Acceptable GPU types and how many one replica takes, from a template as plain data."""
    gpu = template.get("resources", {}).get("gpu") or {}
    types = tuple(gpu.get("types", ()))
    stages = template.get("runtime", {}).get("disaggregation")
    if stages:
        count = sum(
            stages.get(side, {}).get("replicas", 1) * stages.get(side, {}).get("gpus", 1)
            for side in ("prefill", "decode")
        )
        return types or ("any",), count
    return types, int(gpu.get("count", 1)) if gpu else 0


def _likely(types: Sequence[str], cluster: ClusterSpec | None) -> str:
    """The first acceptable type that the cluster lists; the first of all where it lists none."""
    for gpu_type in types:
        for listed in cluster.gpus if cluster else ():
            if _same(listed.type, gpu_type):
                return listed.type
    return types[0]


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def view_json(view: PlanView) -> dict[str, Any]:
    """The plan as plain data; fields are only ever added."""
    from reconciler.cli.problem_lines import problem_json  # noqa: PLC0415 - keeps this module a leaf

    price = view.price_per_hour
    return {
        "before": view.before,
        "after": view.after,
        "changes": view.changes_anything,
        "counts": {verb: view.count(verb) for verb in VERBS} | {"unchanged": view.unchanged},
        "workloads": [
            {
                "verb": row.verb,
                "workload": row.workload,
                "deployment": row.deployment,
                "cluster": row.cluster,
                "reason": row.reason,
                "effect": row.effect,
                "replicas": {"before": row.replicas_before, "after": row.replicas_after},
                "changes": [_change_json(c) for c in row.changes],
                "placement": row.placement,
            }
            for row in view.rows
        ],
        "objects": [
            {
                "verb": change.verb,
                "object": str(change.key),
                "changes": [_change_json(c) for c in change.changes],
            }
            for change in view.objects
        ],
        "gpus": [
            {
                "cluster": use.cluster,
                "type": use.type,
                "before": use.before,
                "after": use.after,
                "listed": use.listed,
                "pricePerHour": use.price_per_hour,
            }
            for use in view.gpus
        ],
        "tenants": [
            {
                "tenant": use.tenant,
                "gpus": {"before": use.before, "after": use.after},
                "quota": use.quota,
                "limit": use.limit,
            }
            for use in view.tenants
        ],
        "pricePerHour": {"before": price[0], "after": price[1]} if price else None,
        "refusals": list(view.refusals),
        "problems": [problem_json(p) for p in view.problems],
        "notes": list(view.notes),
    }


def _change_json(change: Change) -> dict[str, Any]:
    return {"path": change.path, "before": change.before, "after": change.after}
