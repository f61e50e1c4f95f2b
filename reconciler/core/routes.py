"""From objects and what was observed to the content of the routing table. Pure.

An arm whose backend cannot be asked keeps the replicas of the table before: unknown is not absent.
What is not deleted stays routed, also where nothing is wanted any more: a refused deletion that took
the traffic away would be an outage all the same.
Not here: generations, signatures and Redis (publish).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from reconciler.core.canary import ARM_SUFFIX, canary_name
from reconciler.core.compile import backend_of, platform_of, served_name
from reconciler.core.config import ConfigObject, ObjectKey
from reconciler.core.observed import Observation, ObservedReplica, ObservedWorkload, Phase, Unknown
from reconciler.core.workload import Desired, Workload, workload_name
from schemas import cluster, function, tenant
from schemas.limits import Limits
from schemas.platform import PlatformSpec
from schemas.routing_policy import resolve
from schemas.wire import routing


def compile_routes(
    objects: Mapping[ObjectKey, ConfigObject],
    desired: Desired,
    observed: Sequence[Observation | Unknown],
    before: routing.RoutingTable | None,
    *,
    revision: str,
    staying: Collection[str] = (),
) -> routing.RoutingTable:
    """The table's content; generation, lease and time are the publisher's to fill in.

    `staying`: workloads that run where nothing is wanted and are not deleted (`Plan.staying`).
    """
    platform = platform_of(objects)
    functions: list[function.Function] = []
    tenants: list[tenant.Tenant] = []
    clusters: list[cluster.Cluster] = []
    for _, obj in sorted(objects.items()):
        match obj.value:
            case function.Function() as value if value.spec.job is None:
                functions.append(value)
            case tenant.Tenant() as value:
                tenants.append(value)
            case cluster.Cluster() as value:
                clusters.append(value)
            case _:
                pass

    arms = _arms(desired, observed, before, {f.metadata.name for f in functions})
    backends = {c.metadata.name: backend_of(c) for c in clusters}
    _add_staying(arms, desired, observed, before, staying, backends)
    known = {f.name: f for f in before.functions} if before else {}
    sleepy = {w.function for w in desired.workloads.values() if _may_sleep(w)}
    made = [
        _dated(
            _function(f, platform, arms.of(f.metadata.name), sleeps=f.metadata.name in sleepy),
            known,
            revision,
        )
        for f in functions
    ]
    gone = _still_running(before, made, arms)
    placed = {place[1] for found in arms.found.values() for place in found}
    here = [_cluster(c) for c in clusters]
    left = [
        c
        for c in (before.clusters if before else ())
        if c.name in placed and c.name not in backends
    ]
    return routing.RoutingTable(
        generation=0,
        revision=revision,
        published_at=0.0,
        max_table_age_s=platform.auth.max_table_age,
        functions=tuple(sorted([*made, *gone], key=lambda f: f.name)),
        tenants=tuple(_tenant(t) for t in tenants),
        clusters=tuple(sorted([*here, *left], key=lambda c: c.name)),
    )


Place = tuple[str, str]
"""(deployment, cluster)"""


@dataclass(frozen=True, slots=True)
class _Arms:
    """Arms by function and place."""

    found: dict[str, dict[Place, routing.Arm]]

    def add(self, function_name: str, arm: routing.Arm) -> None:
        """Joins the replicas of an arm that is there already."""
        mine = self.found.setdefault(function_name, {})
        place = (arm.deployment, arm.cluster)
        if there := mine.get(place):
            replicas = {r.id: r for r in (*arm.replicas, *there.replicas)}
            arm = replace(there, replicas=tuple(r for _, r in sorted(replicas.items())))
        mine[place] = arm

    def of(self, function_name: str) -> tuple[routing.Arm, ...]:
        return tuple(arm for _, arm in sorted(self.found.get(function_name, {}).items()))


def _arms(
    desired: Desired,
    observed: Sequence[Observation | Unknown],
    before: routing.RoutingTable | None,
    names: Collection[str],
) -> _Arms:
    """The arms of everything wanted."""
    seen = {o.backend: o for o in observed if isinstance(o, Observation)}
    unknown = {o.backend for o in observed if isinstance(o, Unknown)}
    last: dict[Place, list[tuple[str, routing.Arm]]] = {}
    home: dict[str, str] = {}
    for f in before.functions if before else ():
        for arm in f.arms:
            last.setdefault((arm.deployment, arm.cluster), []).append((f.name, arm))
            home.update((r.id, f.name) for r in arm.replicas)

    arms = _Arms({})
    for workload in desired.workloads.values():
        replicas: dict[str, list[routing.Replica]] = {workload.function: []}
        if workload.backend in unknown:
            for name, arm in last.get((workload.routed_as, workload.cluster), ()):
                replicas.setdefault(name, []).extend(arm.replicas)
        elif workload.backend == "external" and not _is_told(workload, seen.get("external")):
            # Not probed yet, as after a restart: engines of others go on while nobody looks.
            urls = {endpoint.url for endpoint in workload.template.endpoints}
            for name, arm in last.get((workload.routed_as, workload.cluster), ()):
                kept = [r for r in arm.replicas if r.url in urls and workload.replicas]
                replicas.setdefault(name, []).extend(kept)
        elif workload.backend in seen:
            for replica in _replicas(seen[workload.backend].workloads.get(workload.name)):
                fresh = replica.spec_digest == workload.spec_digest
                # One of the spec before may serve another function's model, and answers only to it.
                name = workload.function if fresh else home.get(replica.id, workload.function)
                replicas.setdefault(name, []).append(replica)
        for name, found in replicas.items():
            if name in names:
                arms.add(name, _arm(workload, tuple(found)))
    return arms


def _workload_of(routed_as: str, cluster: str) -> str:
    """The name of the workload behind an arm."""
    name = workload_name(routed_as.removesuffix(ARM_SUFFIX), cluster)
    return canary_name(name) if routed_as.endswith(ARM_SUFFIX) else name


def _is_told(workload: Workload, observation: Observation | None) -> bool:
    return observation is not None and workload.name in observation.workloads


def _add_staying(
    arms: _Arms,
    desired: Desired,
    observed: Sequence[Observation | Unknown],
    before: routing.RoutingTable | None,
    staying: Collection[str],
    backends: Mapping[str, str],
) -> None:
    """Arms of the table before that nothing wants, but that still run or may do so."""
    wanted = {(w.routed_as, w.cluster): w.backend for w in desired.workloads.values()}
    by_deployment = {w.deployment: w for w in desired.workloads.values() if not w.arm}
    unknown = {o.backend for o in observed if isinstance(o, Unknown)}
    for f in before.functions if before else ():
        for arm in f.arms:
            place = (arm.deployment, arm.cluster)
            name = _workload_of(*place)
            new = by_deployment.get(arm.deployment.removesuffix(ARM_SUFFIX))
            if new is not None:
                arm = replace(  # noqa: PLW2901 - its newest audience
                    arm,
                    tenants=new.tenants,
                    # What is no canary any more gets nothing new.
                    weight=0 if arm.deployment.endswith(ARM_SUFFIX) else new.weight,
                    shadow_percent=new.shadow_percent,
                )
            if name in staying:
                for o in observed:
                    if isinstance(o, Observation) and o.backend != wanted.get(place):
                        there = o.workloads.get(name)
                        if there is not None:
                            arms.add(f.name, replace(arm, replicas=_replicas(there)))
            elif place not in wanted and backends.get(arm.cluster) in unknown:
                arms.add(f.name, arm)


def _still_running(
    before: routing.RoutingTable | None, made: Sequence[routing.Function], arms: _Arms
) -> list[routing.Function]:
    """Functions that are gone from the repo while arms of theirs stay; not where a name is taken."""
    names = {f.name for f in made}
    taken = {name for f in made for name in (f.served_name, *f.aliases)} | names
    return [
        replace(f, fallbacks=tuple(n for n in f.fallbacks if n in names), arms=arms.of(f.name))
        for f in (before.functions if before else ())
        if arms.of(f.name) and taken.isdisjoint((f.name, f.served_name, *f.aliases))
    ]


def _arm(workload: Workload, replicas: tuple[routing.Replica, ...]) -> routing.Arm:
    return routing.Arm(
        deployment=workload.routed_as,
        cluster=workload.cluster,
        tenants=workload.tenants,
        weight=workload.weight,
        shadow_percent=workload.shadow_percent,
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


def _may_sleep(workload: Workload) -> bool:
    return workload.scaling is not None and workload.scaling.min_replicas == 0


def _function(
    value: function.Function,
    platform: PlatformSpec,
    arms: tuple[routing.Arm, ...],
    *,
    sleeps: bool,
) -> routing.Function:
    spec, name = value.spec, value.metadata.name
    if limit := spec.routing.max_concurrent:
        arms = tuple(
            replace(arm, replicas=tuple(replace(r, max_concurrent=limit) for r in arm.replicas))
            for arm in arms
        )
    return routing.Function(
        name=name,
        served_name=served_name(name, spec),
        aliases=tuple(spec.model.aliases),
        tasks=tuple(spec.model.tasks),
        engine=spec.runtime.engine,
        policy=_policy(spec, platform),
        fallbacks=tuple(spec.routing.fallbacks),
        price=routing.Price(
            input=spec.price.input_per_million,
            output=spec.price.output_per_million,
            cached_input=spec.price.cached_input_per_million,
        ),
        max_model_len=spec.runtime.max_model_len,
        limits=_limits(spec.limits),
        wake_wait_s=spec.scaling.wake_timeout if sleeps else 0.0,
        arms=arms,
    )


def _dated(
    made: routing.Function, known: Mapping[str, routing.Function], revision: str
) -> routing.Function:
    """With the commit that set its policy: this one, unless it was like this in the table before."""
    old = known.get(made.name)
    since = old.policy_since if old is not None and old.policy == made.policy else ""
    return replace(made, policy_since=since or revision)


def _policy(spec: function.FunctionSpec, platform: PlatformSpec) -> routing.Policy:
    base = resolve(spec.routing, platform.routing)
    weights, timeouts = base.weights, base.timeouts
    return routing.Policy(
        name=base.policy,
        weights=routing.Weights(
            kv_cache=weights.kv_cache,
            session=weights.session,
            load=weights.load,
            latency=weights.latency,
        ),
        session_affinity=base.session_affinity.enabled,
        session_ttl_s=base.session_affinity.ttl,
        connect_timeout_s=timeouts.connect,
        first_byte_timeout_s=timeouts.first_byte,
        between_chunks_timeout_s=timeouts.between_chunks,
        retry_attempts=base.retries.attempts,
        retry_budget_percent=base.retries.budget_percent,
        queue_max_wait_s=base.queue.max_wait,
        queue_max_requests=base.queue.max_requests,
    )


def _limits(limits: Limits) -> routing.Limits:
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
        residency=tuple(sorted(spec.residency)),
        limits=_limits(spec.limits),
        budget=routing.Budget(
            monthly_usd=spec.budget.monthly_usd,
            monthly_tokens=spec.budget.monthly_tokens,
            soft_percent=spec.budget.soft_percent,
        ),
        priority=spec.priority,
        weight=spec.weight,
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
                name = arm.deployment.removesuffix(ARM_SUFFIX)
                found.setdefault(name, []).append((f.served_name, f.policy, arm))
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
