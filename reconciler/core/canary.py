"""A new template beside the old one: step by step, judged by what routers see, and back when it is worse. Pure.

The stable workload keeps the old template until the last step has held; a second workload runs the
new one with its share of the sessions. A template that fails its gates is not tried again: the old
one stays, though Git says otherwise, until Git says something else. Not here: how replicas are replaced
(backends), or the branch that proposes the revert (publish).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from reconciler.core.digest import canonical_digest
from reconciler.core.observed import ObservedWorkload, Phase
from reconciler.core.rollout import canary_replicas
from reconciler.core.signals import Totals
from reconciler.core.workload import MAX_NAME, Template, Workload, workload_name
from schemas.deployment import Gates

SUFFIX: Final = "--canary"
ARM_SUFFIX: Final = "/canary"
_GRACE_S: Final = 60.0
"""Over the readiness delay, for pulling and scheduling."""
_CLEARLY: Final = 2.0
"""So many times the allowed increase ends a step early."""
_NO_ACCIDENT: Final = 3
"""Failures of fewer requests than are to judge a step."""
_SOME_HITS: Final = 0.05
"""Below this the stable arm's hit rate is nothing to compare with."""


@dataclass(frozen=True, slots=True)
class Stable:
    """The template that serves until another has proved itself, and the last commit that wanted it."""

    digest: str
    revision: str = ""
    template: Template | None = None
    """None where only its digest is known; then it can be kept, but not changed in number."""


@dataclass(frozen=True, slots=True)
class Canary:
    """Where one deployment's roll stands. Times are of the caller's clock."""

    stable: Stable | None = None
    trying: str = ""
    """Digest of the new template; "" where none is tried."""
    step: int = 0
    began: float | None = None
    """When this step was first asked for."""
    since: float | None = None
    """When this step's replicas were first ready: its gates have been watched from then on."""
    promoting: bool = False
    rejected: str = ""
    """Digest of a template that failed its gates."""
    why: str = ""
    revert_branch: str = ""
    """Where the revert was pushed, once it was."""
    before_new: Totals = field(default_factory=Totals)
    before_old: Totals = field(default_factory=Totals)
    """What was counted before `since`."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What routers have counted so far of the two arms."""

    new: Totals = field(default_factory=Totals)
    old: Totals = field(default_factory=Totals)


@dataclass(frozen=True, slots=True)
class Step:
    """What to want now. `stable` and `canary` are workloads; `said` is news for people, "" for none."""

    state: Canary
    stable: Workload
    canary: Workload | None = None
    weight_percent: int = 0
    said: str = ""


def canary_name(workload: str) -> str:
    """Of the second workload; never the name of another deployment's."""
    if len(workload) + len(SUFFIX) <= MAX_NAME:
        return workload + SUFFIX
    mark = canonical_digest(workload)[:12]
    return f"{workload[: MAX_NAME - len(SUFFIX) - 13].rstrip('-')}-{mark}{SUFFIX}"


def is_canary(name: str, deployment: str) -> bool:
    """Whether a workload of a deployment is the second one of a roll."""
    return name.endswith(SUFFIX) and name != workload_name(deployment, "canary")


def advance(
    wanted: Workload,
    state: Canary,
    current: ObservedWorkload | None,
    canary: ObservedWorkload | None,
    judged: Judged,
    *,
    revision: str,
    running: Template | None,
    now: float,
) -> Step:
    """The next state of one deployment's roll.

    Args:
        wanted: the workload as Git and the load want it.
        state: where it stood.
        current: the stable workload as observed; None where there is none.
        canary: the second workload as observed.
        judged: what routers counted of both since this reconciler listens.
        revision: the commit in effect.
        running: the template that `current` runs, where that is known.
        now: seconds.
    """
    new = wanted.spec_digest
    if current is None or current.deleting:
        return Step(Canary(Stable(new, revision, wanted.template)), wanted)
    if current.spec_digest == new:
        if state.promoting and state.trying == new and not _rolled(wanted, current):
            return _with_canary(wanted, wanted, state)
        said = ""
        if state.promoting and state.trying == new:
            said = f"canary of {new[:8]} is done: it serves everything"
        return Step(Canary(Stable(new, revision, wanted.template)), wanted, said=said)

    stable = state.stable
    if stable is None or stable.digest != current.spec_digest:
        stable = Stable(current.spec_digest, "", running)
    elif stable.template is None:
        stable = replace(stable, template=running)
    kept = _kept(wanted, stable, current)
    if state.rejected == new:
        return Step(replace(state, stable=stable), kept)
    said = ""
    if state.trying != new:
        state = Canary(stable, trying=new, began=now)
        said = f"canary of {new[:8]} begins with {wanted.rollout.steps[0].weight_percent} %"
    state = replace(state, stable=stable)
    if state.promoting:
        # The stable workload is told the new template; the canary carries on meanwhile.
        return _with_canary(wanted, wanted, state)
    if state.began is None:
        state = replace(state, began=now)
    return _step(wanted, kept, state, canary, judged, now, said)


def _step(
    wanted: Workload,
    kept: Workload,
    state: Canary,
    canary: ObservedWorkload | None,
    judged: Judged,
    now: float,
    said: str,
) -> Step:
    steps, gates = wanted.rollout.steps, wanted.rollout.gates
    state = replace(state, step=min(state.step, len(steps) - 1))
    step = steps[state.step]
    needed = canary_replicas(wanted.replicas, step.weight_percent) if wanted.replicas else 0
    ready = _fresh_ready(canary, state.trying)
    if reason := _does_not_start(wanted, state, canary, ready, now):
        return _back(kept, state, reason)
    if state.since is None:
        if ready >= needed:
            state = replace(state, since=now, before_new=judged.new, before_old=judged.old)
        return _with_canary(wanted, kept, state, said)
    new, old = judged.new - state.before_new, judged.old - state.before_old
    over = now - state.since >= step.hold
    judged_enough = new.attempts >= gates.min_requests or fails_surely(gates, new)
    if judged_enough and (reason := failed_gate(gates, new, old, over=over)):
        return _back(kept, state, f"at {step.weight_percent} %: {reason}")
    if not over or new.attempts < gates.min_requests or ready < needed:
        return _with_canary(wanted, kept, state, said)
    if state.step + 1 < len(steps):
        following = steps[state.step + 1].weight_percent
        state = replace(state, step=state.step + 1, began=now, since=None)
        return _with_canary(
            wanted, kept, state, f"canary of {state.trying[:8]} goes on to {following} %"
        )
    state = replace(state, promoting=True, since=None)
    said = f"canary of {state.trying[:8]} has held all its steps: the rest rolls"
    return _with_canary(wanted, wanted, state, said)


def fails_surely(gates: Gates, new: Totals) -> bool:
    """Whether too many have failed already, should all the others that are to judge it succeed.

    A replica that fails is soon sent nothing more, and would never be judged otherwise.
    """
    share = 100.0 * new.failed / max(new.attempts, gates.min_requests)
    return new.failed >= _NO_ACCIDENT and share > gates.max_error_percent


def failed_gate(gates: Gates, new: Totals, old: Totals, *, over: bool) -> str:
    """Which gate the new arm fails, in words; "" for none. `over`: its time is up, judge all of them."""
    errors = new.error_percent or 0.0
    if errors > gates.max_error_percent:
        return (
            f"{errors:.1f} % of {new.attempts} requests failed, above {gates.max_error_percent:g} %"
        )
    mine, theirs = new.ttft_s(), old.ttft_s()
    if mine is not None and theirs and sum(old.ttft.values()) >= gates.min_requests:
        increase = 100.0 * (mine / theirs - 1.0)
        # A new replica's cache is cold at first: only what is clearly worse ends a step early.
        if increase > gates.max_ttft_increase_percent * (1.0 if over else _CLEARLY):
            return (
                f"the 95th percentile of time to first token is {mine:.3g} s against {theirs:.3g} s, "
                f"{increase:.0f} % more, above {gates.max_ttft_increase_percent:g} %"
            )
    mine, theirs = new.hit_ratio, old.hit_ratio
    if over and mine is not None and theirs is not None and theirs >= _SOME_HITS:
        share = 100.0 * mine / theirs
        if share < gates.min_cache_hit_ratio_percent:
            return (
                f"its cache hit rate is {mine:.0%} against {theirs:.0%}, "
                f"below {gates.min_cache_hit_ratio_percent:g} % of it"
            )
    return ""


def _does_not_start(
    wanted: Workload, state: Canary, canary: ObservedWorkload | None, ready: int, now: float
) -> str:
    if canary is None or ready or state.began is None:
        return ""
    failing = [
        r
        for r in canary.replicas
        if r.spec_digest == state.trying and r.phase is Phase.FAILED and r.restarts
    ]
    if failing:
        return f"its replicas do not start: {failing[0].detail or 'no detail'}"
    waited = now - state.began
    if waited > wanted.template.readiness.initial_delay + _GRACE_S:
        return f"none of its replicas was ready after {waited:.0f} s"
    return ""


def _back(kept: Workload, state: Canary, reason: str) -> Step:
    why = f"canary of {state.trying[:8]} went back {reason}"
    if not reason.startswith("at "):
        why = f"canary of {state.trying[:8]} went back: {reason}"
    rejected = Canary(state.stable, rejected=state.trying, why=why)
    return Step(rejected, kept, said=why)


def _with_canary(wanted: Workload, stable: Workload, state: Canary, said: str = "") -> Step:
    steps = wanted.rollout.steps
    weight = steps[min(state.step, len(steps) - 1)].weight_percent
    second = replace(
        wanted,
        name=canary_name(wanted.name),
        replicas=canary_replicas(wanted.replicas, weight) if wanted.replicas else 0,
        arm=wanted.deployment + ARM_SUFFIX,
        scaling=None,
    )
    return Step(state, stable, second, weight, said)


def _kept(wanted: Workload, stable: Stable, current: ObservedWorkload) -> Workload:
    """The stable workload with what it runs, at the number that is wanted now."""
    if stable.template is None:
        # What it runs is not known in full, so nothing of it is changed.
        return replace(wanted, spec_digest=stable.digest, replicas=current.replicas_wanted)
    return replace(wanted, spec_digest=stable.digest, template=stable.template)


def _rolled(wanted: Workload, current: ObservedWorkload) -> bool:
    active = [r for r in current.replicas if r.phase is not Phase.DRAINING]
    fresh = [r for r in active if r.spec_digest == wanted.spec_digest]
    return (
        len(fresh) == len(active) and _fresh_ready(current, wanted.spec_digest) >= wanted.replicas
    )


def _fresh_ready(workload: ObservedWorkload | None, digest: str) -> int:
    if workload is None or workload.deleting:
        return 0
    return sum(r.phase is Phase.READY and r.spec_digest == digest for r in workload.replicas)
