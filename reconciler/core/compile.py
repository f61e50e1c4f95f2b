"""From objects to workloads: which template, where, how many. Pure; order of input is irrelevant.

Not here: what is wrong with the objects (references), what exists (observed), or routes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from reconciler.core.config import ConfigObject, ObjectKey
from reconciler.core.digest import canonical_digest
from reconciler.core.last_good import Effective
from reconciler.core.workload import BackendName, Desired, Template, Workload
from schemas.cluster import Cluster, ExternalEndpoint, ExternalProvider, LocalProvider
from schemas.deployment import Deployment, Placement
from schemas.function import Function, FunctionSpec
from schemas.platform import Platform, PlatformSpec

MAX_NAME: Final = 63


def workload_name(deployment: str, cluster: str) -> str:
    """Deterministic and unique: the one place a crash between create and record looks for it."""
    name = f"{deployment}--{cluster}"
    if len(name) <= MAX_NAME and name.count("--") == 1:
        return name
    # Too long, or not to be told apart where one of the names holds a double dash itself.
    mark = canonical_digest([deployment, cluster])[:12]
    return f"{re.sub('-+', '-', deployment)[: MAX_NAME - 13].rstrip('-')}-{mark}"


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


def choose_cluster(placement: Placement, clusters: Mapping[str, Cluster]) -> str | None:
    """The named cluster, or the first listed one that meets region and residency; None if none does.

    Price and spot are filters that placement by cost adds.
    """
    if placement.cluster:
        return placement.cluster
    want = placement.constraints
    for name in placement.any_of:
        spec = clusters[name].spec
        if want.regions and spec.region not in want.regions:
            continue
        if not set(want.residency) <= set(spec.residency):
            continue
        return name
    return None


def backend_of(cluster: Cluster) -> BackendName:
    match cluster.spec.provider:
        case LocalProvider():
            return "local"
        case ExternalProvider():
            return "external"
        case _:
            return "skypilot"


def compile_workloads(effective: Effective) -> Desired:
    """One workload for each deployment that has a place."""
    functions: dict[str, Function] = {}
    clusters: dict[str, Cluster] = {}
    deployments: list[Deployment] = []
    for obj in effective.objects.values():
        match obj.value:
            case Function() as function:
                functions[function.metadata.name] = function
            case Cluster() as cluster:
                clusters[cluster.metadata.name] = cluster
            case Deployment() as deployment:
                deployments.append(deployment)
            case _:
                pass

    templates: dict[tuple[str, str], tuple[Template, str]] = {}
    workloads: dict[str, Workload] = {}
    shielded = dict(effective.shielded)
    for deployment in sorted(deployments, key=lambda d: d.metadata.name):
        spec = deployment.spec
        function = functions[spec.function]
        place = choose_cluster(spec.placement, clusters)
        if place is None:
            name = deployment.metadata.name
            shielded[name] = (
                f"no listed cluster meets the placement constraints of Deployment/{name}"
            )
            continue
        cluster = clusters[place]
        made = templates.get((spec.function, place))
        if made is None:
            template = _template(function, cluster)
            made = templates[spec.function, place] = (template, template_digest(template))
        if isinstance(cluster.spec.provider, ExternalProvider):
            # There are as many as there are: nobody here starts or stops one.
            wanted = len(made[0].endpoints)
        elif spec.replicas is not None:
            wanted = spec.replicas
        else:
            wanted = function.spec.scaling.min_replicas
        name = workload_name(deployment.metadata.name, place)
        workloads[name] = Workload(
            name=name,
            deployment=deployment.metadata.name,
            function=spec.function,
            cluster=place,
            backend=backend_of(cluster),
            provider=cluster.spec.provider,
            template=made[0],
            spec_digest=made[1],
            replicas=0 if spec.suspend else wanted,
            rollout=spec.rollout,
            tenants=tuple(sorted(spec.tenants)),
            weight=spec.weight,
            shadow_percent=spec.shadow.percent if spec.shadow else 0.0,
        )
    return Desired(
        workloads=workloads,
        prune_blocked=effective.prune_blocked,
        shielded=shielded,
        deployments_before=effective.deployments_before,
    )


def _template(function: Function, cluster: Cluster) -> Template:
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
    )


def template_digest(template: Template) -> str:
    """What decides whether a change rolls. Names and tasks are the router's affair and are left out."""
    model = template.model
    return canonical_digest(
        [
            [model.uri, model.format, model.quantization, template.served_name],
            template.runtime,
            template.resources,
            template.readiness,
            list(template.endpoints),
        ]
    )[:16]
