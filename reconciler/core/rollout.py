"""What a changed template takes while it replaces the running one. Pure.

Not here: the order in which a backend starts and stops replicas.
"""

from __future__ import annotations

from math import ceil

from reconciler.core.workload import Workload


def canary_replicas(wanted: int, weight_percent: int) -> int:
    """Enough for its share of the traffic, and at least one."""
    return max(1, ceil(wanted * weight_percent / 100))


def surge_replicas(workload: Workload, running: int) -> int:
    """How many replicas more than wanted a roll may need at its widest; `running` are there now."""
    if not running or not workload.replicas:
        return 0
    match workload.rollout.strategy:
        case "rolling":
            return min(workload.rollout.max_surge, workload.replicas)
        case "blueGreen":
            return workload.replicas
        case "canary":
            widest = max(step.weight_percent for step in workload.rollout.steps)
            # The last step lasts until the stable replicas have rolled, which takes their surge too.
            canary = canary_replicas(workload.replicas, widest)
            return canary + min(workload.rollout.max_surge, workload.replicas)
