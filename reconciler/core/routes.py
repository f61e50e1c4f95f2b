"""From objects and what was observed to the content of the routing table. Pure.

An arm whose backend cannot be asked keeps the replicas of the table before: unknown is not absent.
Not here: generations, signatures and Redis (publish).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reconciler.core.compile import platform_of, served_name
from reconciler.core.config import ConfigObject, ObjectKey
from reconciler.core.observed import Observation, ObservedReplica, ObservedWorkload, Phase, Unknown
from reconciler.core.workload import Desired, Workload
from schemas import cluster, function, tenant
from schemas.platform import PlatformSpec
from schemas.wire import routing


def compile_routes(
    objects: Mapping[ObjectKey, ConfigObject],
    desired: Desired,
    observed: Sequence[Observation | Unknown],
    before: routing.RoutingTable | None,
    *,
    revision: str,
) -> routing.RoutingTable:
    """The table's content; generation, lease and time are the publisher's to fill in."""
    platform = platform_of(objects)
    functions: list[function.Function] = []
    tenants: list[tenant.Tenant] = []
    clusters: list[cluster.Cluster] = []
    for _, obj in sorted(objects.items()):
        match obj.value:
            case function.Function() as value:
                functions.append(value)
            case tenant.Tenant() as value:
                tenants.append(value)
            case cluster.Cluster() as value:
                clusters.append(value)
            case _:
                pass

    arms = _arms(desired, observed, before)
    return routing.RoutingTable(
        generation=0,
        revision=revision,
        published_at=0.0,
        max_table_age_s=platform.auth.max_table_age,
        functions=tuple(_function(f, platform, arms.get(f.metadata.name, ())) for f in functions),
        tenants=tuple(_tenant(t) for t in tenants),
        clusters=tuple(_cluster(c) for c in clusters),
    )


def _arms(
    desired: Desired,
    observed: Sequence[Observation | Unknown],
    before: routing.RoutingTable | None,
) -> dict[str, tuple[routing.Arm, ...]]:
    seen = {o.backend: o for o in observed if isinstance(o, Observation)}
    unknown = {o.backend for o in observed if isinstance(o, Unknown)}
    last = {
        (arm.deployment, arm.cluster): arm.replicas
        for f in (before.functions if before else ())
        for arm in f.arms
    }
    arms: dict[str, list[routing.Arm]] = {}
    for workload in desired.workloads.values():
        if workload.backend in unknown:
            replicas = last.get((workload.deployment, workload.cluster), ())
        elif workload.backend in seen:
            replicas = _replicas(seen[workload.backend].workloads.get(workload.name))
        else:
            replicas = ()
        arms.setdefault(workload.function, []).append(_arm(workload, replicas))
    return {
        name: tuple(sorted(found, key=lambda a: (a.deployment, a.cluster)))
        for name, found in arms.items()
    }


def _arm(workload: Workload, replicas: tuple[routing.Replica, ...]) -> routing.Arm:
    return routing.Arm(
        deployment=workload.deployment,
        cluster=workload.cluster,
        tenants=workload.tenants,
        weight=workload.weight,
        replicas=replicas,
    )


def _replicas(current: ObservedWorkload | None) -> tuple[routing.Replica, ...]:
    """READY ones, and DRAINING ones so that routers say what they still carry."""
    if current is None:
        return ()
    return tuple(
        _replica(r)
        for r in sorted(current.replicas, key=lambda r: r.id)
        if r.url and r.phase in (Phase.READY, Phase.DRAINING)
    )


def _replica(replica: ObservedReplica) -> routing.Replica:
    return routing.Replica(
        id=replica.id,
        url=replica.url or "",
        state="draining" if replica.phase is Phase.DRAINING else "ready",
        spec_digest=replica.spec_digest,
    )


def _function(
    value: function.Function, platform: PlatformSpec, arms: tuple[routing.Arm, ...]
) -> routing.Function:
    spec, name = value.spec, value.metadata.name
    return routing.Function(
        name=name,
        served_name=served_name(name, spec),
        aliases=tuple(spec.model.aliases),
        tasks=tuple(spec.model.tasks),
        policy=_policy(spec, platform),
        fallbacks=tuple(spec.routing.fallbacks),
        price=routing.Price(
            input=spec.price.input_per_million,
            output=spec.price.output_per_million,
            cached_input=spec.price.cached_input_per_million,
        ),
        max_model_len=spec.runtime.max_model_len,
        arms=arms,
    )


def _policy(spec: function.FunctionSpec, platform: PlatformSpec) -> routing.Policy:
    mine, base = spec.routing, platform.routing
    weights = mine.weights or base.weights
    affinity = mine.session_affinity or base.session_affinity
    timeouts = mine.timeouts or base.timeouts
    retries = mine.retries or base.retries
    return routing.Policy(
        name=mine.policy or base.policy,
        weights=routing.Weights(
            kv_cache=weights.kv_cache,
            session=weights.session,
            load=weights.load,
            latency=weights.latency,
        ),
        session_affinity=affinity.enabled,
        session_ttl_s=affinity.ttl,
        connect_timeout_s=timeouts.connect,
        first_byte_timeout_s=timeouts.first_byte,
        between_chunks_timeout_s=timeouts.between_chunks,
        retry_attempts=retries.attempts,
        retry_budget_percent=retries.budget_percent,
    )


def _limits(limits: tenant.Limits) -> routing.Limits:
    return routing.Limits(
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        concurrent=limits.concurrent,
    )


def _tenant(value: tenant.Tenant) -> routing.Tenant:
    spec = value.spec
    return routing.Tenant(
        name=value.metadata.name,
        keys=tuple(
            routing.Key(
                id=key.id,
                sha256=bytes.fromhex(key.sha256),
                not_before=key.not_before.timestamp() if key.not_before else None,
                expires=key.expires.timestamp() if key.expires else None,
                scopes=tuple(key.scopes),
                limits=_limits(key.limits),
            )
            for key in sorted(spec.keys, key=lambda key: key.id)
        ),
        models=tuple(spec.models),
        clusters=tuple(spec.clusters),
        limits=_limits(spec.limits),
        budget=routing.Budget(
            monthly_usd=spec.budget.monthly_usd,
            monthly_tokens=spec.budget.monthly_tokens,
            soft_percent=spec.budget.soft_percent,
        ),
        priority=spec.priority,
        suspended=spec.suspend,
    )


def _cluster(value: cluster.Cluster) -> routing.Cluster:
    spec = value.spec
    return routing.Cluster(
        name=value.metadata.name,
        region=spec.region or "",
        rtt_s=spec.rtt,
        residency=tuple(spec.residency),
        endpoint_cidrs=tuple(spec.endpoint_cidrs),
        agent_key_sha256=spec.agent_key_sha256 or "",
    )


def changed_deployments(
    before: routing.RoutingTable | None, after: routing.RoutingTable
) -> frozenset[str]:
    """Deployments whose arm differs between two tables, those that went included."""

    def by_deployment(table: routing.RoutingTable | None) -> dict[str, list[object]]:
        found: dict[str, list[object]] = {}
        for f in table.functions if table else ():
            for arm in f.arms:
                found.setdefault(arm.deployment, []).append((f.served_name, f.policy, arm))
        return found

    old, new = by_deployment(before), by_deployment(after)
    return frozenset(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def released(
    observed: Sequence[Observation | Unknown],
    generation: int,
    routers: Mapping[str, tuple[int, Mapping[str, int]]],
) -> frozenset[str]:
    """Draining replicas that no live router sends to or still carries a request on.

    `routers`: id -> (generation served, in flight by replica). `generation` is of the table in which
    they are all draining.
    """
    draining = {
        replica.id
        for o in observed
        if isinstance(o, Observation)
        for w in o.workloads.values()
        for replica in w.replicas
        if replica.phase is Phase.DRAINING
    }
    if any(served < generation for served, _ in routers.values()):
        return frozenset()
    busy = {replica for _, flight in routers.values() for replica, n in flight.items() if n > 0}
    return frozenset(draining - busy)
