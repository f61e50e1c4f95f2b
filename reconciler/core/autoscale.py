"""How many replicas a load asks for, and when to go there. Pure; the time is given.

A number moves only when the metric has asked for it all through a delay: up to the least that was asked
for meanwhile, down to the most. Requests/s, concurrency and KV use say how many replicas they take.
Queue length and time to first token only say whether there are enough; then a step down is
tried one replica at a time, and the rate per replica that missed the target is remembered, so
that the same load makes no second mistake. Not here: where the load is counted (signals), or starting
anything (backends).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Final

from reconciler.core.signals import Load
from schemas.function import Scaling

TOLERANCE: Final = 0.1
"""Of the target: a replica is not taken away before the rest would be so far below it."""
MOST_AT_ONCE: Final = 2.0
"""A queue or a slow answer asks for at most so many times what there is."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Where one workload stands. Times are of the caller's clock; None: not so now."""

    replicas: int
    above_since: float | None = None
    above_least: int = 0
    """The least that was asked for since then."""
    below_since: float | None = None
    below_most: int = 0
    """The most that was asked for since then."""
    overloaded_at: float | None = None
    """Requests/s a replica that missed the target; for metrics that only say enough or not."""
    recovering: bool = False
    """Since the last step up the target has not been met yet: what is missed now says nothing new."""
    reason: str = ""
    """Of the last change, for people."""


def decide(
    scaling: Scaling, scale: Scale, load: Load | None, *, ready: int, most: int | None, now: float
) -> Scale:
    """The next standing.

    Args:
        scaling: what Git says.
        scale: the standing so far.
        load: None while nobody can tell; then nothing moves, but for the limits.
        ready: replicas that serve.
        most: a further upper limit, as of a quota or a price ceiling.
        now: seconds.
    """
    low, high = bounds(scaling, most)
    within = min(max(scale.replicas, low), high)
    if within != scale.replicas:
        scale = Scale(
            within,
            overloaded_at=scale.overloaded_at,
            reason=f"{scale.replicas} -> {within}: the limits are {low} to {high}",
        )
    if load is None:
        return replace(scale, above_since=None, below_since=None)
    if scale.replicas == 0:
        return _asleep(scale, load, high)

    if _ratio(scaling, load, scale.replicas) <= 1.0:
        scale = replace(scale, recovering=False)
    asked = min(max(asked_for(scaling, scale, load, ready=ready), low), high)
    return _moved(scaling, scale, asked, load, now)


def bounds(scaling: Scaling, most: int | None = None) -> tuple[int, int]:
    """The least and the most replicas. A further limit never goes below the least."""
    low = scaling.min_replicas
    high = low if scaling.max_replicas is None else scaling.max_replicas
    if scaling.metric is None:
        # It sleeps and wakes, and that is all.
        high = max(1, low)
    return low, max(low, high if most is None else min(high, most))


def asked_for(scaling: Scaling, scale: Scale, load: Load, *, ready: int) -> int:
    """How many replicas the load takes, whatever the limits; 0 where nobody asks for any."""
    n = scale.replicas
    busy = load.in_flight + load.waiting
    match scaling.metric, scaling.target:
        case None, _:
            return 1 if busy or load.requests_per_s else 0
        case "qps", float():
            return _by_amount(scaling, load.requests_per_s, n, waiting=load.waiting)
        case "concurrency", float():
            return _by_amount(scaling, busy, n, waiting=load.waiting)
        case "kvUsage", float():
            if load.kv_usage is None:
                return n
            return _by_amount(scaling, load.kv_usage * ready, n, waiting=load.waiting)
        case _:
            return _by_ratio(scaling, scale, load, ready)


def _by_amount(scaling: Scaling, amount: float, n: int, *, waiting: int) -> int:
    """An amount that replicas share evenly; those on standby come on top."""
    target, standby = scaling.target or inf, scaling.standby_replicas
    up = max(ceil(round(amount / target, 9)), min(1, waiting))
    if up == 0:
        return 0
    if up + standby >= n:
        return up + standby
    # On the way down some room stays, or noise around the edge would bring the replica back.
    return min(n, ceil(round(amount / (target * (1.0 - TOLERANCE)), 9)) + standby)


def _by_ratio(scaling: Scaling, scale: Scale, load: Load, ready: int) -> int:
    """A metric that says whether there are enough, but not how many would be."""
    n = scale.replicas
    busy = load.in_flight + load.waiting
    ratio = _ratio(scaling, load, n)
    if ratio > 1.0:
        # Those that are still starting have not helped yet.
        return ceil(n * min(ratio, MOST_AT_ONCE)) if ready >= n else n
    if not busy and not load.requests_per_s:
        return 0
    bad = inf if scale.overloaded_at is None else scale.overloaded_at
    if n > 1 and load.requests_per_s / (n - 1) <= (1.0 - TOLERANCE) * bad:
        return n - 1
    return n


def _ratio(scaling: Scaling, load: Load, n: int) -> float:
    """The metric over its target, where it is one of those that go by ratio; else 0."""
    target = scaling.target or inf
    match scaling.metric:
        case "queueDepth":
            return (load.waiting + load.queued) / n / target
        case "ttft":
            # Nobody answered while requests wait is no good sign.
            seconds = load.ttft_p95_s if load.ttft_p95_s is not None else 0.0
            return max(seconds / target, 2.0 if load.waiting and load.ttft_p95_s is None else 0.0)
        case _:
            return 0.0


def _asleep(scale: Scale, load: Load, high: int) -> Scale:
    if high and (load.waiting or load.in_flight):
        return Scale(1, reason=f"0 -> 1: {load.waiting} requests wait")
    return replace(scale, above_since=None, below_since=None)


def _moved(scaling: Scaling, scale: Scale, asked: int, load: Load, now: float) -> Scale:
    n = scale.replicas
    if asked > n:
        again = scale.above_since is None
        since = now if scale.above_since is None else scale.above_since
        least = asked if again else min(scale.above_least, asked)
        if now - since < scaling.upscale_delay:
            return replace(scale, above_since=since, above_least=least, below_since=None)
        overloaded_at = scale.overloaded_at
        if _ratio(scaling, load, n) > 1.0 and not scale.recovering:
            each = load.requests_per_s / n
            overloaded_at = each if overloaded_at is None else min(overloaded_at, each)
        reason = f"{n} -> {least}: {_why(scaling, load)}"
        return Scale(least, overloaded_at=overloaded_at, recovering=True, reason=reason)
    if asked < n:
        again = scale.below_since is None
        since = now if scale.below_since is None else scale.below_since
        most = asked if again else max(scale.below_most, asked)
        if now - since < scaling.downscale_delay:
            return replace(scale, below_since=since, below_most=most, above_since=None)
        reason = f"{n} -> {most}: {_why(scaling, load)}"
        return Scale(most, overloaded_at=scale.overloaded_at, reason=reason)
    return replace(scale, above_since=None, below_since=None)


def _why(scaling: Scaling, load: Load) -> str:
    target = scaling.target
    match scaling.metric:
        case "qps":
            return f"{load.requests_per_s:.3g} requests/s at {target:g} a replica"
        case "concurrency":
            return f"{load.in_flight + load.waiting} requests at {target:g} a replica"
        case "kvUsage":
            share = "unknown" if load.kv_usage is None else f"{load.kv_usage:.0%}"
            return f"KV use {share} at {target:.0%} a replica"
        case "queueDepth":
            return f"{load.waiting + load.queued} waiting at {target:g} a replica"
        case "ttft":
            shown = "no answer" if load.ttft_p95_s is None else f"{load.ttft_p95_s:.3g} s"
            return f"time to first token {shown} at {target:g} s"
        case None:
            busy = load.in_flight + load.waiting
            return f"{busy} requests" if busy or load.requests_per_s else "nobody asks"
