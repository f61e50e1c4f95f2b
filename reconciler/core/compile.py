"""From objects to workloads: which template, where, how many. Pure; order of input is irrelevant.

Not here: what is wrong with the objects (references), what exists (observed), or routes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Final

from reconciler.core.config import ConfigObject, ObjectKey
from reconciler.core.digest import canonical_digest
from reconciler.core.last_good import Effective
from reconciler.core.observed import Observation, Unknown
from reconciler.core.placement import Catalogue, choose, has_spot
from reconciler.core.workload import (
    BackendName,
    Desired,
    Placed,
    Scheduling,
    Template,
    Workload,
    workload_name,
)
from schemas.cluster import (
    Cluster,
    ExternalEndpoint,
    ExternalProvider,
    KubernetesProvider,
    LocalProvider,
)
from schemas.deployment import Deployment
from schemas.function import Function, FunctionSpec, Scaling
from schemas.platform import Platform, PlatformSpec
from schemas.tenant import Tenant

SHARED_QUEUE: Final = "shared"
"""KAI queue of what runs for everybody, or for several tenants."""


def platform_of(objects: Mapping[ObjectKey, ConfigObject]) -> PlatformSpec:
    """The repo's one Platform, or the defaults."""
    for key in sorted(key for key in objects if key.kind == "Platform"):
        value = objects[key].value
        if isinstance(value, Platform):
            return value.spec
    return PlatformSpec()


def served_name(name: str, spec: FunctionSpec) -> str:
    """What engines call the function's model."""
    return spec.model.served_name or name


def backend_of(cluster: Cluster) -> BackendName:
    match cluster.spec.provider:
        case LocalProvider():
            return "local"
        case ExternalProvider():
            return "external"
        case _:
            return "skypilot"


def compile_workloads(
    effective: Effective,
    *,
    places: Mapping[str, str] | None = None,
    catalogue: Catalogue | None = None,
    unpriced: Collection[str] = (),
) -> Desired:
    """One workload for each deployment that has a place.

    Args:
        effective: what is acted on.
        places: deployment -> the cluster where it runs; it stays there while that will do.
        catalogue: prices where Git has none.
        unpriced: clusters whose prices have been asked for and are not known yet: who could go
            there, and runs nowhere, waits for them, for what is chosen now stays chosen.
    """
    functions: dict[str, Function] = {}
    clusters: dict[str, Cluster] = {}
    deployments: list[Deployment] = []
    tenants: dict[str, Tenant] = {}
    for obj in effective.objects.values():
        match obj.value:
            case Function() as function:
                functions[function.metadata.name] = function
            case Cluster() as cluster:
                clusters[cluster.metadata.name] = cluster
            case Deployment() as deployment:
                deployments.append(deployment)
            case Tenant() as tenant:
                tenants[tenant.metadata.name] = tenant
            case _:
                pass

    templates: dict[tuple[str, str, Scheduling], tuple[Template, str]] = {}
    workloads: dict[str, Workload] = {}
    shielded = dict(effective.shielded)
    here = places or {}
    taken: Counter[tuple[str, str]] = Counter()
    # Who has a place is counted before who looks for one.
    for deployment in sorted(deployments, key=lambda d: (not _is_placed(d, here), d.metadata.name)):
        spec = deployment.spec
        function = functions[spec.function]
        least = function.spec.scaling.min_replicas if spec.replicas is None else spec.replicas
        if function.spec.job is not None:
            least = 1
        if not _is_placed(deployment, here) and not set(unpriced).isdisjoint(spec.placement.any_of):
            shielded[deployment.metadata.name] = (
                "waiting for SkyPilot's prices to choose a cluster by"
            )
            continue
        choice = choose(
            spec.placement,
            function.spec,
            0 if spec.suspend else least,
            clusters,
            current=here.get(deployment.metadata.name),
            taken=taken,
            catalogue=catalogue,
        )
        offer = choice.offer
        if offer is None:
            shielded[deployment.metadata.name] = choice.reason
            continue
        place = offer.cluster
        taken[place, offer.gpu_type.casefold()] += offer.gpus
        cluster = clusters[place]
        scheduling = _scheduling(deployment, cluster, tenants)
        made = templates.get((spec.function, place, scheduling))
        if made is None:
            template = _template(function, cluster, scheduling)
            made = (template, template_digest(template))
            templates[spec.function, place, scheduling] = made
        if isinstance(cluster.spec.provider, ExternalProvider):
            # There are as many as there are: nobody here starts or stops one.
            wanted = len(made[0].endpoints)
        else:
            wanted = least
        name = workload_name(deployment.metadata.name, place)
        workloads[name] = Workload(
            name=name,
            deployment=deployment.metadata.name,
            function=spec.function,
            cluster=place,
            backend=_backend(function, cluster),
            provider=cluster.spec.provider,
            template=made[0],
            spec_digest=made[1],
            replicas=0 if spec.suspend else wanted,
            rollout=spec.rollout,
            tenants=tuple(sorted(spec.tenants)),
            weight=spec.weight,
            shadow_percent=spec.shadow.percent if spec.shadow else None,
            scaling=None if spec.suspend else _scaling(function.spec, deployment, cluster),
            placement=Placed(
                why=choice.reason,
                gpu_type=offer.gpu_type,
                gpus_each=offer.gpus_each,
                price_each=offer.price_each,
                ceiling_each=offer.ceiling_each,
                max_price_per_hour=spec.placement.constraints.max_price_per_hour,
            ),
        )
    return Desired(
        workloads=dict(sorted(workloads.items())),
        prune_blocked=effective.prune_blocked,
        shielded=shielded,
        gpu_limits={
            n: t.spec.gpus.limit for n, t in tenants.items() if t.spec.gpus.limit is not None
        },
        deployments_before=effective.deployments_before,
    )


def _backend(function: Function, cluster: Cluster) -> BackendName:
    where = backend_of(cluster)
    return "skypilot-jobs" if where == "skypilot" and function.spec.job is not None else where


def _is_placed(deployment: Deployment, places: Mapping[str, str]) -> bool:
    return deployment.spec.placement.cluster is not None or deployment.metadata.name in places


def _scaling(function: FunctionSpec, deployment: Deployment, cluster: Cluster) -> Scaling | None:
    """What decides the number of replicas besides Git; None where Git alone does."""
    scaling = function.scaling
    if function.job is not None:
        return None
    if deployment.spec.replicas is not None or isinstance(cluster.spec.provider, ExternalProvider):
        return None
    sleeps = scaling.min_replicas == 0 and scaling.max_replicas is not None
    return scaling if scaling.metric is not None or sleeps else None


def _scheduling(
    deployment: Deployment, cluster: Cluster, tenants: Mapping[str, Tenant]
) -> Scheduling:
    if backend_of(cluster) != "skypilot":
        return Scheduling()
    spec, provider, kai = deployment.spec, cluster.spec.provider, cluster.spec.kai
    # What runs for one tenant alone runs in its own queue, namespace and workspace.
    alone = tenants.get(spec.tenants[0]) if len(spec.tenants) == 1 else None
    namespace = queue = None
    if isinstance(provider, KubernetesProvider):
        namespace = (alone.spec.namespace if alone else None) or provider.namespace
        if kai.enabled:
            queue = alone.metadata.name if alone else SHARED_QUEUE
    return Scheduling(
        spot=spec.placement.constraints.spot if has_spot(cluster) else "never",
        workspace=alone.spec.workspace if alone else None,
        namespace=namespace,
        queue=queue,
        topology=kai.topology,
    )


def _template(function: Function, cluster: Cluster, scheduling: Scheduling) -> Template:
    spec = function.spec
    endpoints: tuple[ExternalEndpoint, ...] = ()
    if isinstance(cluster.spec.provider, ExternalProvider):
        endpoints = tuple(
            e for e in cluster.spec.provider.endpoints if e.function == function.metadata.name
        )
    return Template(
        model=spec.model,
        served_name=served_name(function.metadata.name, spec),
        runtime=spec.runtime,
        resources=spec.resources,
        readiness=spec.readiness,
        endpoints=endpoints,
        scheduling=scheduling,
        job=spec.job,
    )


def places_of(effective: Effective, observed: Sequence[Observation | Unknown]) -> dict[str, str]:
    """Deployment -> the first cluster of those it may choose from where it runs already."""
    names = {
        name
        for seen in observed
        if isinstance(seen, Observation)
        for name, workload in seen.workloads.items()
        if not workload.deleting
    }
    places: dict[str, str] = {}
    for obj in effective.objects.values():
        if isinstance(obj.value, Deployment):
            for cluster in obj.value.spec.placement.any_of:
                if workload_name(obj.key.name, cluster) in names:
                    places.setdefault(obj.key.name, cluster)
    return places


def template_digest(template: Template) -> str:
    """What decides whether a change rolls. Names and tasks are the router's affair and are left out."""
    model = template.model
    parts: list[object] = [
        [model.uri, model.format, model.quantization, template.served_name],
        template.runtime,
        template.resources,
        template.readiness,
        list(template.endpoints),
    ]
    if template.scheduling != Scheduling():
        parts.append(asdict(template.scheduling))
    if template.job is not None:
        # How often and how long it is tried is no reason to run it again.
        parts.append(["job", template.job.run])
    return canonical_digest(parts)[:16]
