"""What a workload is going through, in one line for people. Pure; says the same until it changes.

Not here: what one replica is going through (replica).
"""

from __future__ import annotations

from collections.abc import Sequence

from reconciler.backends.local.rollout import Steps
from reconciler.core.observed import ObservedReplica, Phase
from reconciler.core.workload import Workload
from schemas.cluster import LocalProvider


def describe(
    workload: Workload, replicas: Sequence[ObservedReplica], steps: Steps, *, deleting: bool
) -> str:
    """Empty when it runs as wanted and nothing needs saying."""
    if deleting:
        return f"deleting: {_count(len(replicas))} to finish requests"
    active = [r for r in replicas if r.phase is not Phase.DRAINING]
    newest = [r for r in active if r.spec_digest == workload.spec_digest]
    ready = sum(r.phase is Phase.READY for r in newest)
    failed = [r.detail for r in newest if r.phase is Phase.FAILED]
    parts = []
    if len(active) > len(newest):
        parts.append(f"rolling: {ready} of {workload.replicas} replicas run the new spec")
        if failed and not ready:
            serving = sum(r.phase is Phase.READY for r in active)
            parts.append(
                f"it does not start, {_count(serving)} of the old one left serving: {failed[0]}"
            )
    if steps.waiting and isinstance(workload.provider, LocalProvider):
        limit = workload.provider.max_processes
        if len(active) > len(newest):
            parts.append(f"maxProcesses {limit} leaves no room for a surge: replaced one by one")
        else:
            parts.append(f"maxProcesses {limit} is reached: {_count(steps.waiting)} waiting")
    return "; ".join(parts)


def _count(replicas: int) -> str:
    return "1 replica" if replicas == 1 else f"{replicas} replicas"
