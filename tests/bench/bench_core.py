"""What the pure core costs over 10, 1,000 and 10,000 deployments: `python tests/bench/bench_core.py`.

Seconds are CPU time of the best of three; MiB is the peak of what one run allocates.
"""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from reconciler.core.compile import compile_workloads
from reconciler.core.last_good import effective
from reconciler.core.plan import PlanPolicy, plan
from reconciler.core.routes import compile_routes
from reconciler.core.status import RoutingView, World, documents
from schemas.wire.routing import RoutingTable
from tests.unit.core.worlds import (
    by_key,
    deployment,
    function,
    local,
    observation,
    reading,
    running,
    tenant,
)


def measure(work: Callable[[], Any]) -> tuple[Any, float, float]:
    best = float("inf")
    result = None
    for _ in range(3):
        gc.collect()
        start = time.process_time()
        result = work()
        best = min(best, time.process_time() - start)
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, best, peak / 2**20


def row(name: str, n: int, work: Callable[[], Any]) -> tuple[Any, float]:
    result, seconds, mib = measure(work)
    print(f"| {name} | {n:,} | {seconds:.3f} | {mib:.1f} |", flush=True)
    return result, seconds


def bench(n: int) -> None:
    functions = [function(f"f{i}", scaling={"minReplicas": 2}) for i in range(max(1, n // 10))]
    clusters = [local(f"c{i}", region="eu") for i in range(5)]
    tenants = [tenant(f"t{i}") for i in range(max(1, n // 100))]
    deployments = [
        deployment(
            f"d{i:05}", f"f{i % len(functions)}", f"c{i % 5}", tenants=[f"t{i % len(tenants)}"]
        )
        for i in range(n)
    ]
    objects = [*functions, *clusters, *tenants, *deployments]
    loaded, known = reading(*objects), by_key(*objects)
    policy = PlanPolicy(known=frozenset(d.key.name for d in deployments))

    merged, s_effective = row("effective", n, lambda: effective(loaded, known))
    broken = reading(*(o for o in objects if o.key.name != "f0"))
    row("effective, one held", n, lambda: effective(broken, known))
    desired, s_compile = row("compile", n, lambda: compile_workloads(merged))
    seen = [observation(*map(running, desired.workloads.values()))]
    old = [observation(*(running(w, digest="old") for w in desired.workloads.values()))]
    made, s_noop = row("plan, nothing to do", n, lambda: plan(desired, seen, policy, 0.0))
    _, s_create = row("plan, all to create", n, lambda: plan(desired, [observation()], policy, 0.0))
    _, s_roll = row("plan, all to roll", n, lambda: plan(desired, old, policy, 0.0))
    worst = s_effective + s_compile + max(s_noop, s_create, s_roll)
    print(f"| effective, compile, plan at worst | {n:,} | {worst:.3f} | |")

    def routes(before: RoutingTable | None) -> RoutingTable:
        return compile_routes(merged.objects, desired, seen, before, revision="r")

    table, _ = row("routes", n, lambda: routes(None))
    row("routes, from before", n, lambda: routes(table))
    world = World(merged, desired, seen, made, RoutingView(1, "r", {"r1": 1, "r2": 1}))
    before, _ = row("status documents", n, lambda: documents(world, {}, "2026-01-01T00:00:00Z"))
    row("status, unchanged", n, lambda: documents(world, before, "2026-01-02T00:00:00Z"))


if __name__ == "__main__":
    print("| pure core | deployments | CPU s | MiB |\n|---|--:|--:|--:|")
    for size in (10, 1_000, 10_000):
        bench(size)
