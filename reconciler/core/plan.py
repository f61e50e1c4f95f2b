"""Desired against observed: what to create, update and delete, and what to leave and why. Pure.

    plan(desired, predict(plan, observed)) is empty; the order of the input does not matter.

Not here: doing it (backends), or when to try again (backoff).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from reconciler.core.action import Action, Change, Create, Delete, Noop, Plan, Update
from reconciler.core.diff import diff
from reconciler.core.observed import Observation, ObservedWorkload, Unknown
from reconciler.core.workload import Desired, Template, Workload
from schemas.platform import Prune

CONFIRMATION: Final = re.compile(
    r"^Detoserve-Confirm-Deletions:\s*(\d+)\s+([0-9a-f]{7,64})\s*$", re.MULTILINE | re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Confirmation:
    """A commit's word that so many deletions, seen at its parent, are meant."""

    count: int
    parent: str

    def covers(self, count: int, parents: Sequence[str]) -> bool:
        return count <= self.count and any(p.startswith(self.parent) for p in parents)


@dataclass(frozen=True, slots=True)
class Pending:
    """A workload whose last action failed and that is left alone until `until`."""

    until: float
    reason: str


@dataclass(frozen=True, slots=True)
class PlanPolicy:
    """What bounds a plan besides the two states.

    `known` are the deployments that the repo named before (None: not known, as on a fresh host):
    only those are pruned; anything else with our mark is an orphan.
    """

    prune: Prune = field(default_factory=Prune)
    known: frozenset[str] | None = None
    confirmation: Confirmation | None = None
    parents: tuple[str, ...] = ()
    revision: str = ""
    rewritten: bool = False
    pending: Mapping[str, Pending] | None = None


def parse_confirmation(message: str) -> Confirmation | None:
    """The trailer `Detoserve-Confirm-Deletions: <count> <parent>` of a commit message."""
    match = CONFIRMATION.search(message)
    return Confirmation(int(match.group(1)), match.group(2).lower()) if match else None


def plan(
    desired: Desired,
    observed: Sequence[Observation | Unknown],
    policy: PlanPolicy,
    now: float,
) -> Plan:
    """The ordered actions that lead from `observed` to `desired`.

    `now` is on the clock of `policy.pending`, in seconds.
    """
    unknown = {o.backend: o.reason for o in observed if isinstance(o, Unknown)}
    seen = {o.backend: o for o in observed if isinstance(o, Observation)}
    pending = policy.pending or {}

    actions: list[Action] = []
    for name, workload in sorted(desired.workloads.items()):
        if workload.backend in unknown:
            reason = f"backend {workload.backend} cannot be asked: {unknown[workload.backend]}"
            actions.append(Noop(name, workload.deployment, reason, held=True))
            continue
        if workload.backend not in seen:
            reason = f"not acted on yet: no {workload.backend} backend runs in this reconciler"
            actions.append(Noop(name, workload.deployment, reason, held=True))
            continue
        observation = seen[workload.backend]
        action = _one(workload, observation.workloads.get(name), name in observation.foreign)
        wait = pending.get(name)
        if wait is not None and wait.until > now and not isinstance(action, Noop):
            action = Noop(name, workload.deployment, wait.reason, held=True)
        actions.append(action)

    deletions, refusals = _deletions(desired, seen, policy, now)
    actions += deletions
    order = {Create: 0, Update: 1, Delete: 2, Noop: 3}
    actions.sort(key=lambda a: (order[type(a)], a.name))
    return Plan(tuple(actions), tuple(refusals))


def _one(workload: Workload, current: ObservedWorkload | None, foreign: bool) -> Action:
    name, deployment = workload.name, workload.deployment
    if foreign:
        reason = f"{name} exists in {workload.cluster} under another owner; it is never touched"
        return Noop(name, deployment, reason, held=True)
    if current is None:
        return Create(workload, f"{workload.replicas} x {workload.function} in {workload.cluster}")
    if current.quarantined:
        return Noop(name, deployment, f"quarantined: {current.detail}", held=True)
    if current.deleting:
        return Create(workload, "wanted again while it is being deleted")
    if current.spec_digest != workload.spec_digest:
        changes = tuple(diff(current.template, template_data(workload.template)))
        what = ", ".join(c.path for c in changes[:3]) if current.template else "template"
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        return Update(workload, "roll", f"{what}{more} changed", changes)
    if current.replicas_wanted != workload.replicas:
        change = Change("replicas", current.replicas_wanted, workload.replicas)
        return Update(workload, "scale", f"replicas {change.before} -> {change.after}", (change,))
    return Noop(name, deployment, "as wanted")


def _deletions(
    desired: Desired, seen: Mapping[str, Observation], policy: PlanPolicy, now: float
) -> tuple[list[Action], list[str]]:
    """Deletes, or the reasons why there are none."""
    extra: list[tuple[str, ObservedWorkload]] = []
    total = 0
    for backend, observation in sorted(seen.items()):
        for name, current in sorted(observation.workloads.items()):
            total += not current.deleting
            wanted = desired.workloads.get(name)
            if (wanted is None or wanted.backend != backend) and not current.deleting:
                extra.append((backend, current))
    if not extra:
        return [], []

    def hold(reason: str, items: Sequence[tuple[str, ObservedWorkload]]) -> list[Action]:
        return [Noop(c.name, c.deployment, reason, held=True) for _, c in items]

    if policy.rewritten:
        reason = (
            "history was rewritten: nothing is deleted until a commit descends from what was seen"
        )
        return hold(reason, extra), [reason]
    if desired.prune_blocked:
        reason = f"nothing is deleted: {desired.prune_blocked}"
        return hold(reason, extra), [reason]

    wanted_deployments = {w.deployment for w in desired.workloads.values()}
    orphans: list[tuple[str, ObservedWorkload]] = []
    pruned: list[tuple[str, ObservedWorkload]] = []
    for item in extra:
        name = item[1].deployment
        ours = policy.known is not None and name in policy.known
        (pruned if ours or name in wanted_deployments else orphans).append(item)

    actions: list[Action] = []
    refusals: list[str] = []
    if orphans and policy.prune.orphans == "report":
        names = ", ".join(c.name for _, c in orphans[:5])
        refusals.append(f"orphans, carrying our mark but named by no commit: {names}")
        actions += hold("an orphan: the prune policy reports it", orphans)
    else:
        pruned = sorted([*pruned, *orphans], key=lambda item: item[1].name)

    allowed = max(policy.prune.max_deletions, int(total * policy.prune.max_deletions_percent / 100))
    everything = not desired.workloads and len(pruned) > 1
    confirmed = policy.confirmation is not None and policy.confirmation.covers(
        len(pruned), policy.parents
    )
    if pruned and (len(pruned) > allowed or everything) and not confirmed:
        reason = (
            f"{len(pruned)} of {total} workloads would be deleted, "
            + (
                "which is all of them"
                if everything
                else f"more than the {allowed} the policy allows"
            )
            + "; to confirm, commit with the trailer "
            f"'Detoserve-Confirm-Deletions: {len(pruned)} {policy.revision[:12]}'"
        )
        return actions + hold("too many deletions at once: not confirmed", pruned), [
            *refusals,
            reason,
        ]

    pending = policy.pending or {}
    for backend, current in pruned:
        wait = pending.get(current.name)
        if wait is not None and wait.until > now:
            actions.append(Noop(current.name, current.deployment, wait.reason, held=True))
        elif current.quarantined:
            reason = f"quarantined: {current.detail}"
            actions.append(Noop(current.name, current.deployment, reason, held=True))
        else:
            reason = f"Deployment/{current.deployment} no longer places it here"
            actions.append(Delete(current.name, current.deployment, backend, reason))
    return actions, refusals


def template_data(template: Template) -> dict[str, Any]:
    """A template as plain data, for showing differences and for backends that keep it."""
    data: dict[str, Any] = {"servedName": template.served_name}
    for part in ("model", "runtime", "resources", "readiness"):
        data[part] = getattr(template, part).model_dump(
            mode="json", by_alias=True, exclude_defaults=True
        )
    # Names and tasks change nothing that runs.
    for routed in ("servedName", "aliases", "tasks"):
        data["model"].pop(routed, None)
    if template.endpoints:
        data["endpoints"] = [endpoint.url for endpoint in template.endpoints]
    return data


def predict(
    made: Plan, observed: Sequence[Observation | Unknown]
) -> tuple[Observation | Unknown, ...]:
    """What would be observed if every action of the plan had been taken on. For tests and previews."""
    after: list[Observation | Unknown] = []
    for before in observed:
        if isinstance(before, Unknown):
            after.append(before)
            continue
        workloads = dict(before.workloads)
        for action in made.effects:
            if isinstance(action, Delete):
                if action.backend == before.backend:
                    workloads.pop(action.name, None)
            elif action.workload.backend == before.backend:
                told = action.workload
                workloads[told.name] = ObservedWorkload(
                    name=told.name,
                    deployment=told.deployment,
                    spec_digest=told.spec_digest,
                    replicas_wanted=told.replicas,
                    template=template_data(told.template),
                )
        after.append(replace(before, workloads=workloads))
    return tuple(after)
