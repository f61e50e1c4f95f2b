"""Desired against observed: what to create, update and delete, and what to leave and why. Pure.

    plan(desired, predict(plan, observed)) is empty; the order of the input does not matter.

Not here: doing it (backends), or when to try again (backoff).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from reconciler.core.action import Action, Change, Create, Delete, Noop, Plan, Update
from reconciler.core.canary import is_canary
from reconciler.core.diff import diff
from reconciler.core.observed import Observation, ObservedWorkload, Phase, Unknown
from reconciler.core.workload import Desired, Scheduling, Template, Workload
from schemas.platform import Prune

CONFIRMATION: Final = re.compile(
    r"^Detoserve-Confirm-Deletions:\s*(\d+)\s+([0-9a-f]{7,64})\s*$", re.MULTILINE | re.IGNORECASE
)

_HOW_TO: Final = {
    "skypilot": "; set SKYPILOT_API_SERVER_ENDPOINT to the URL of a SkyPilot API server",
    "skypilot-jobs": "; set SKYPILOT_API_SERVER_ENDPOINT to the URL of a SkyPilot API server",
}


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
            reason = f"no {workload.backend} backend runs in this reconciler{_HOW_TO.get(workload.backend, '')}"
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
        if not current.template or not changes:
            return Update(workload, "roll", "template changed")
        what = ", ".join(c.path for c in changes[:3])
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        return Update(workload, "roll", f"{what}{more} changed", changes)
    if current.replicas_wanted != workload.replicas:
        change = Change("replicas", current.replicas_wanted, workload.replicas)
        return Update(workload, "scale", f"replicas {change.before} -> {change.after}", (change,))
    if current.gave_up:
        return Update(workload, "roll", "its replicas failed before one was ready; tried again")
    return Noop(name, deployment, "as wanted")


def _deletions(
    desired: Desired, seen: Mapping[str, Observation], policy: PlanPolicy, now: float
) -> tuple[list[Action], list[str]]:
    """Deletes, or the reasons why there are none."""
    extra = [
        _Extra(backend, current)
        for backend, observation in sorted(seen.items())
        for name, current in sorted(observation.workloads.items())
        if not current.deleting and not _is_wanted(desired, backend, name)
    ]
    if not extra:
        return [], []
    if policy.rewritten:
        reason = (
            "history was rewritten: nothing is deleted until a commit descends from what was seen"
        )
        return [item.hold(reason) for item in extra], [reason]
    if desired.prune_blocked:
        reason = f"nothing is deleted: {desired.prune_blocked}"
        return [item.hold(reason) for item in extra], [reason]

    places = _places(desired)
    actions: list[Action] = []
    refusals: list[str] = []
    orphans: list[_Extra] = []
    pruned: list[_Extra] = []
    for item in extra:
        name = item.current.deployment
        if name in desired.shielded:
            actions.append(item.hold(desired.shielded[name]))
        elif name in places or (policy.known is not None and name in policy.known):
            pruned.append(item)
        else:
            orphans.append(item)
    if orphans and policy.prune.orphans == "report":
        shown = ", ".join(item.current.name for item in orphans[:5])
        more = f" and {len(orphans) - 5} more" if len(orphans) > 5 else ""
        refusals.append(f"orphans, carrying our mark but named by no commit: {shown}{more}")
        actions += [item.hold("an orphan: the prune policy reports it") for item in orphans]
    else:
        pruned += orphans
    if not pruned:
        return actions, refusals

    # The second workload of a roll comes and goes by itself; no commit deletes it.
    counted = [item for item in pruned if not item.is_canary]
    if refusal := _too_many(len(counted), desired, policy):
        held = [item.hold("too many deletions at once: not confirmed") for item in pruned]
        return actions + held, [*refusals, refusal]

    pending = policy.pending or {}
    for item in pruned:
        current = item.current
        wait = pending.get(current.name)
        if current.quarantined:
            actions.append(item.hold(f"quarantined: {current.detail}"))
        elif wait is not None and wait.until > now:
            actions.append(item.hold(wait.reason))
        elif reason := _still_carries(current, places.get(current.deployment, ()), seen):
            actions.append(item.hold(reason))
        else:
            reason = f"Deployment/{current.deployment} no longer places it here"
            if item.is_canary and current.deployment in places:
                reason = "the canary is over"
            actions.append(Delete(current.name, current.deployment, item.backend, reason))
    return actions, refusals


@dataclass(frozen=True, slots=True)
class _Extra:
    """A workload of ours that runs where nothing is wanted."""

    backend: str
    current: ObservedWorkload

    @property
    def is_canary(self) -> bool:
        return is_canary(self.current.name, self.current.deployment)

    def hold(self, reason: str) -> Noop:
        return Noop(self.current.name, self.current.deployment, reason, True, self.backend)


def _is_wanted(desired: Desired, backend: str, name: str) -> bool:
    wanted = desired.workloads.get(name)
    return wanted is not None and wanted.backend == backend


def _places(desired: Desired) -> dict[str, list[Workload]]:
    """Deployment -> where it is wanted."""
    places: dict[str, list[Workload]] = {}
    for workload in desired.workloads.values():
        places.setdefault(workload.deployment, []).append(workload)
    return places


def _too_many(count: int, desired: Desired, policy: PlanPolicy) -> str:
    """Why so many deletions need a confirmation; "" where they do not.

    The share is of what there was before this revision, not of what runs: that grows by what the
    same revision creates, and would let through in a second pass what the first one refused.
    """
    share = int(desired.deployments_before * policy.prune.max_deletions_percent / 100)
    allowed = max(policy.prune.max_deletions, share)
    everything = not desired.workloads and count > 1
    if count <= allowed and not everything:
        return ""
    if policy.confirmation is not None and policy.confirmation.covers(count, policy.parents):
        return ""
    why = "which leaves none" if everything else f"more than the {allowed} the policy allows"
    return (
        f"{count} workloads would be deleted, {why}; to confirm, commit with the trailer "
        f"'Detoserve-Confirm-Deletions: {count} {policy.revision[:12]}'"
    )


def _still_carries(
    old: ObservedWorkload, places: Sequence[Workload], seen: Mapping[str, Observation]
) -> str:
    """Why a deployment's old place must stay until its new one can take over; "" where it need not."""
    if not places:
        return ""
    needed = min(old.count(Phase.READY), sum(place.replicas for place in places))
    ready = 0
    for place in places:
        observation = seen.get(place.backend)
        current = observation.workloads.get(place.name) if observation else None
        ready += current.count(Phase.READY) if current and not current.deleting else 0
    if ready >= needed:
        return ""
    where = ", ".join(sorted(place.cluster for place in places))
    return f"it serves until {where} has {needed} replicas ready; {ready} are"


def template_data(template: Template) -> dict[str, Any]:
    """A template as plain data, for showing differences and for backends that keep it."""
    data: dict[str, Any] = {"servedName": template.served_name}
    for part in ("model", "runtime", "resources", "readiness"):
        data[part] = getattr(template, part).model_dump(
            mode="json", by_alias=True, exclude_defaults=True
        )
    if template.job is not None:
        data["job"] = template.job.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    # Names and tasks change nothing that runs.
    for routed in ("servedName", "aliases", "tasks"):
        data["model"].pop(routed, None)
    if template.scheduling != Scheduling():
        data["scheduling"] = {k: v for k, v in asdict(template.scheduling).items() if v}
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
