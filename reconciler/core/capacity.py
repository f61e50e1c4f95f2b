"""Whether clusters have the GPUs that deployments want and tenants are promised. Pure.

Measured against the inventory in Git, which is a hint: a cluster that lists no GPUs is not judged.
Not here: names that do not exist (references), or what is free at the moment (backends).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from reconciler.core.config import ConfigObject, Problem
from schemas.cluster import Cluster, ExternalProvider, LocalProvider
from schemas.deployment import Deployment, DeploymentSpec
from schemas.function import Function, FunctionSpec
from schemas.tenant import Tenant


def capacity_problems(
    functions: Mapping[str, tuple[ConfigObject, Function]],
    tenants: Mapping[str, tuple[ConfigObject, Tenant]],
    clusters: Mapping[str, tuple[ConfigObject, Cluster]],
    deployments: Mapping[str, tuple[ConfigObject, Deployment]],
) -> Iterator[Problem]:
    """Problems at deployments and tenants that no cluster they name could ever satisfy."""
    plain_clusters = {name: cluster for name, (_, cluster) in clusters.items()}
    for obj, deployment in deployments.values():
        if deployment.spec.function in functions and not deployment.spec.suspend:
            function = functions[deployment.spec.function][1]
            yield from _deployment(obj, deployment.spec, function.spec, plain_clusters)
    for name, (obj, tenant) in tenants.items():
        yield from _tenant(name, obj, tenant, plain_clusters)
        if tenant.spec.gpus.limit is not None:
            yield from _limit(name, tenant.spec.gpus.limit, functions, deployments)
    for name, (obj, cluster) in clusters.items():
        yield from _promises(name, obj, cluster, {n: t for n, (_, t) in tenants.items()})


def gpus_of_replica(spec: FunctionSpec) -> int:
    """How many GPUs one replica takes, prefill and decode workers included."""
    if stages := spec.runtime.disaggregation:
        return sum(stage.replicas * stage.gpus for stage in (stages.prefill, stages.decode))
    return spec.resources.gpu.count if spec.resources.gpu else 0


def _deployment(
    obj: ConfigObject,
    spec: DeploymentSpec,
    function: FunctionSpec,
    clusters: Mapping[str, Cluster],
) -> Iterator[Problem]:
    replicas = function.scaling.min_replicas if spec.replicas is None else spec.replicas
    wanted = replicas * gpus_of_replica(function)
    if not wanted:
        return
    types = function.resources.gpu.types if function.resources.gpu else []
    places = [spec.placement.cluster] if spec.placement.cluster else spec.placement.any_of
    shortfalls = []
    for place in places:
        if place not in clusters or not clusters[place].spec.gpus:
            return
        shortfall = _shortfall(place, clusters[place], types, wanted)
        if shortfall is None:
            return
        shortfalls.append(shortfall)
    accepted = f" ({' or '.join(types)})" if types else ""
    message = (
        f"{replicas} replicas want {wanted} GPUs{accepted}, but "
        f"{', and '.join(shortfalls)}; lower replicas, choose another cluster, or correct its gpus"
    )
    field = ("spec", "replicas") if spec.replicas is not None else ("spec", "placement")
    yield Problem(obj.at(*field), message, key=obj.key)


def _shortfall(name: str, cluster: Cluster, types: list[str], wanted: int) -> str | None:
    """What a cluster lacks for so many GPUs of any of the types; None where it lacks nothing."""
    accepted = {gpu_type.casefold() for gpu_type in types}
    usable = [gpu for gpu in cluster.spec.gpus if not accepted or gpu.type.casefold() in accepted]
    there = sum(gpu.count for gpu in usable)
    if there >= wanted:
        return None
    if usable:
        return f"cluster {name} lists {there}"
    return f"cluster {name} lists only {', '.join(gpu.type for gpu in cluster.spec.gpus)}"


def _tenant(
    name: str, obj: ConfigObject, tenant: Tenant, clusters: Mapping[str, Cluster]
) -> Iterator[Problem]:
    usable = {n: c for n, c in clusters.items() if _may_use(tenant, n)}
    if any(not c.spec.gpus and _has_unlisted_gpus(c) for c in usable.values()):
        return
    listed = {n: sum(g.count for g in c.spec.gpus) for n, c in usable.items() if c.spec.gpus}
    if listed and tenant.spec.gpus.quota > sum(listed.values()):
        message = (
            f"tenant {name} is promised {tenant.spec.gpus.quota} GPUs, but its clusters "
            f"({', '.join(listed)}) list {sum(listed.values())}; lower the quota or correct their gpus"
        )
        yield Problem(obj.at("spec", "gpus", "quota"), message, key=obj.key)


def gpus_of_tenants(
    functions: Mapping[str, Function], deployments: Mapping[str, Deployment]
) -> dict[str, dict[str, int]]:
    """Tenant -> deployment -> GPUs it takes at the least. What serves several tenants is nobody's own."""
    used: dict[str, dict[str, int]] = {}
    for name, deployment in sorted(deployments.items()):
        spec = deployment.spec
        if len(spec.tenants) != 1 or spec.function not in functions or spec.suspend:
            continue
        function = functions[spec.function].spec
        replicas = function.scaling.min_replicas if spec.replicas is None else spec.replicas
        if gpus := replicas * gpus_of_replica(function):
            used.setdefault(spec.tenants[0], {})[name] = gpus
    return used


def _limit(
    tenant: str,
    limit: int,
    functions: Mapping[str, tuple[ConfigObject, Function]],
    deployments: Mapping[str, tuple[ConfigObject, Deployment]],
) -> Iterator[Problem]:
    """A tenant's own deployments may not want more than its limit; each that wants some is named."""
    used = gpus_of_tenants(
        {n: f for n, (_, f) in functions.items()}, {n: d for n, (_, d) in deployments.items()}
    ).get(tenant, {})
    if sum(used.values()) <= limit:
        return
    shown = ", ".join(f"{name} {gpus}" for name, gpus in used.items())
    for name in used:
        obj, deployment = deployments[name]
        message = (
            f"tenant {tenant} may have {limit} GPUs, but its deployments want "
            f"{sum(used.values())} ({shown}); lower their replicas or raise the tenant's gpus.limit"
        )
        field = ("spec", "replicas") if deployment.spec.replicas is not None else ("spec",)
        yield Problem(obj.at(*field), message, key=obj.key)


def _promises(
    name: str, obj: ConfigObject, cluster: Cluster, tenants: Mapping[str, Tenant]
) -> Iterator[Problem]:
    """Quotas become queues in a cluster with KAI; together they may promise more than there is."""
    if not cluster.spec.kai.enabled or not cluster.spec.gpus:
        return
    there = sum(gpu.count for gpu in cluster.spec.gpus)
    promised = {n: t.spec.gpus.quota for n, t in tenants.items() if _may_use(t, name)}
    if sum(promised.values()) > there:
        shown = ", ".join(f"{n} {quota}" for n, quota in promised.items() if quota)
        message = (
            f"tenants are promised {sum(promised.values())} GPUs in cluster {name} ({shown}), "
            f"which lists {there}; lower their quotas or narrow their clusters"
        )
        yield Problem(obj.at("spec", "gpus"), message, "warning", obj.key)


def _may_use(tenant: Tenant, cluster: str) -> bool:
    return any(fnmatchcase(cluster, pattern) for pattern in tenant.spec.clusters)


def _has_unlisted_gpus(cluster: Cluster) -> bool:
    """An empty inventory of this cluster may mean that nobody wrote it down."""
    return not isinstance(cluster.spec.provider, LocalProvider | ExternalProvider)
