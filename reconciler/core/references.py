"""What is wrong between objects: names that do not exist, two with one name, more than there is.

Pure, and the order of the objects is irrelevant. Where two objects are at odds both are named, as
neither is more right. Not here: one object's own fields (schemas), or what to do about it (last_good).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from typing import Final, TypeVar

from reconciler.core.capacity import capacity_problems
from reconciler.core.config import ConfigObject, ObjectKey, Problem
from reconciler.core.suggest import suggestion
from schemas.cluster import Cluster, ExternalProvider
from schemas.deployment import Deployment
from schemas.function import Function
from schemas.kinds import Kind
from schemas.platform import Platform
from schemas.tenant import Tenant

_GLOB: Final = frozenset("*?[")
T = TypeVar("T", Function, Tenant, Cluster, Deployment, Platform)


@dataclass(frozen=True, slots=True)
class _Repo:
    """The objects of each kind by name, in order of name."""

    functions: Mapping[str, tuple[ConfigObject, Function]]
    tenants: Mapping[str, tuple[ConfigObject, Tenant]]
    clusters: Mapping[str, tuple[ConfigObject, Cluster]]
    deployments: Mapping[str, tuple[ConfigObject, Deployment]]
    platforms: Mapping[str, tuple[ConfigObject, Platform]]
    invalid: Collection[ObjectKey]
    """Objects that are written, but not validly."""

    def names(self, kind: Kind) -> Mapping[str, object]:
        named: dict[Kind, Mapping[str, object]] = {
            "Function": self.functions,
            "Tenant": self.tenants,
            "Cluster": self.clusters,
            "Deployment": self.deployments,
            "Platform": self.platforms,
        }
        return named[kind]


def check_references(
    objects: Mapping[ObjectKey, ConfigObject], invalid: Collection[ObjectKey] = ()
) -> tuple[Problem, ...]:
    """Every problem between objects, in order of place; each names the object it is about.

    `invalid` are objects that stand in the repo but do not load: who names one of them is told so.
    """
    repo = _Repo(
        functions=_of(Function, objects),
        tenants=_of(Tenant, objects),
        clusters=_of(Cluster, objects),
        deployments=_of(Deployment, objects),
        platforms=_of(Platform, objects),
        invalid=invalid,
    )
    found = [
        *_deployments(repo),
        *_tenants(repo),
        *_endpoints(repo),
        *_fallbacks(repo),
        *_model_names(repo),
        *_keys(repo),
        *_platforms(repo),
        *capacity_problems(repo.functions, repo.tenants, repo.clusters, repo.deployments),
    ]
    return tuple(sorted(found, key=lambda p: (p.location, p.message)))


def _of(
    model: type[T], objects: Mapping[ObjectKey, ConfigObject]
) -> dict[str, tuple[ConfigObject, T]]:
    found = {
        key.name: (obj, obj.value) for key, obj in objects.items() if isinstance(obj.value, model)
    }
    return dict(sorted(found.items()))


def _unknown(
    repo: _Repo, obj: ConfigObject, kind: Kind, name: str, *path: str | int
) -> Iterator[Problem]:
    if name not in repo.names(kind):
        if ObjectKey(kind, name) in repo.invalid:
            message = f"{kind}/{name} does not load; mend it first"
        else:
            message = f'there is no {kind} "{name}"; {suggestion(name, repo.names(kind))}'
        yield Problem(obj.at(*path), message, key=obj.key)


def _deployments(repo: _Repo) -> Iterator[Problem]:
    for obj, deployment in repo.deployments.values():
        spec = deployment.spec
        yield from _unknown(repo, obj, "Function", spec.function, "spec", "function")
        for i, tenant in enumerate(spec.tenants):
            yield from _unknown(repo, obj, "Tenant", tenant, "spec", "tenants", i)
            yield from _may_use(repo, obj, spec.function, tenant, i)
        if spec.placement.cluster:
            place = ("spec", "placement", "cluster")
            yield from _unknown(repo, obj, "Cluster", spec.placement.cluster, *place)
            yield from _serves(repo, obj, spec.function, spec.placement.cluster, *place)
        for i, cluster in enumerate(spec.placement.any_of):
            place_i = ("spec", "placement", "anyOf", i)
            yield from _unknown(repo, obj, "Cluster", cluster, *place_i)
            yield from _serves(repo, obj, spec.function, cluster, *place_i)


def _may_use(
    repo: _Repo, obj: ConfigObject, function: str, tenant: str, i: int
) -> Iterator[Problem]:
    if tenant not in repo.tenants or function not in repo.functions:
        return
    models = repo.tenants[tenant][1].spec.models
    if not _matches(models, function):
        message = (
            f"tenant {tenant} may not use function {function}, so this serves it nothing; "
            f"add it to the tenant's models, or take the tenant out"
        )
        yield Problem(obj.at("spec", "tenants", i), message, "warning", obj.key)


def _serves(
    repo: _Repo, obj: ConfigObject, function: str, cluster: str, *path: str | int
) -> Iterator[Problem]:
    """An external cluster serves only what its endpoints say."""
    if cluster not in repo.clusters or function not in repo.functions:
        return
    provider = repo.clusters[cluster][1].spec.provider
    if not isinstance(provider, ExternalProvider):
        return
    served = sorted({endpoint.function for endpoint in provider.endpoints})
    if function not in served:
        message = (
            f"external cluster {cluster} has no endpoint for function {function}; "
            f"it serves {', '.join(served)}"
        )
        yield Problem(obj.at(*path), message, key=obj.key)


def _endpoints(repo: _Repo) -> Iterator[Problem]:
    for obj, cluster in repo.clusters.values():
        provider = cluster.spec.provider
        if isinstance(provider, ExternalProvider):
            for i, endpoint in enumerate(provider.endpoints):
                path = ("spec", "provider", "endpoints", i, "function")
                yield from _unknown(repo, obj, "Function", endpoint.function, *path)


def _tenants(repo: _Repo) -> Iterator[Problem]:
    for obj, tenant in repo.tenants.values():
        for i, pattern in enumerate(tenant.spec.models):
            if not any(_matches([pattern], name) for name in repo.functions):
                message = f'"{pattern}" matches no Function; {suggestion(pattern, repo.functions)}'
                yield Problem(obj.at("spec", "models", i), message, "warning", obj.key)
        if "clusters" not in tenant.spec.model_fields_set:
            continue
        for i, pattern in enumerate(tenant.spec.clusters):
            if not _GLOB.intersection(pattern):
                yield from _unknown(repo, obj, "Cluster", pattern, "spec", "clusters", i)
            elif not any(_matches([pattern], name) for name in repo.clusters):
                message = f'"{pattern}" matches no Cluster; {suggestion(pattern, repo.clusters)}'
                yield Problem(obj.at("spec", "clusters", i), message, "warning", obj.key)


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _fallbacks(repo: _Repo) -> Iterator[Problem]:
    graph: dict[str, list[str]] = {}
    for name, (obj, function) in repo.functions.items():
        fallbacks = function.spec.routing.fallbacks
        for i, fallback in enumerate(fallbacks):
            yield from _unknown(repo, obj, "Function", fallback, "spec", "routing", "fallbacks", i)
        graph[name] = [fallback for fallback in fallbacks if fallback in repo.functions]
    while cycle := _cycle(graph):
        shown = " -> ".join([*cycle, cycle[0]])
        for name, after in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            obj, function = repo.functions[name]
            i = function.spec.routing.fallbacks.index(after)
            message = f"fallbacks go round in a circle: {shown}; take one of them out"
            yield Problem(obj.at("spec", "routing", "fallbacks", i), message, key=obj.key)
            graph[name].remove(after)


def _cycle(graph: Mapping[str, Sequence[str]]) -> list[str]:
    """One cycle in the direction of its edges, starting with its least name; [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        around = list(reversed(error.args[1][1:]))
        start = around.index(min(around))
        return around[start:] + around[:start]
    return []


def _model_names(repo: _Repo) -> Iterator[Problem]:
    """What clients call a model must mean one function."""
    owners: defaultdict[str, list[tuple[ConfigObject, tuple[str | int, ...]]]] = defaultdict(list)
    for name, (obj, function) in repo.functions.items():
        model = function.spec.model
        own = ("spec", "model", "servedName") if model.served_name else ("metadata", "name")
        owners[model.served_name or name].append((obj, own))
        for i, alias in enumerate(model.aliases):
            owners[alias].append((obj, ("spec", "model", "aliases", i)))
    yield from _shared(owners, "model name", "choose another for one of them")


def _keys(repo: _Repo) -> Iterator[Problem]:
    ids: defaultdict[str, list[tuple[ConfigObject, tuple[str | int, ...]]]] = defaultdict(list)
    hashes: defaultdict[str, list[tuple[ConfigObject, tuple[str | int, ...]]]] = defaultdict(list)
    for obj, tenant in repo.tenants.values():
        for i, key in enumerate(tenant.spec.keys):
            ids[key.id].append((obj, ("spec", "keys", i, "id")))
            hashes[key.sha256].append((obj, ("spec", "keys", i, "sha256")))
    yield from _shared(ids, "key id", "create a new key for one of them")
    yield from _shared(hashes, "sha256", "one key cannot be two tenants'; create a new one")


def _shared(
    owners: Mapping[str, Sequence[tuple[ConfigObject, tuple[str | int, ...]]]],
    what: str,
    remedy: str,
) -> Iterator[Problem]:
    """A problem at each place where one name stands that stands elsewhere too."""
    for name, places in sorted(owners.items()):
        for obj, path in places:
            others = [(o, p) for o, p in places if (o.key, p) != (obj.key, path)]
            if others:
                other, other_path = others[0]
                shown = name if len(name) < 64 else f"{name[:12]}…"
                message = (
                    f'{what} "{shown}" is also that of {other.key} '
                    f"({other.at(*other_path)}); {remedy}"
                )
                yield Problem(obj.at(*path), message, key=obj.key)


def _platforms(repo: _Repo) -> Iterator[Problem]:
    if len(repo.platforms) > 1:
        for name, (obj, _) in repo.platforms.items():
            other = next(o for n, (o, _) in repo.platforms.items() if n != name)
            message = f"a repo has one Platform; there is also {other.key} ({other.location})"
            yield Problem(obj.at("metadata", "name"), message, key=obj.key)
