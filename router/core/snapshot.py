"""The routing table as requests look things up in it: immutable, indexed, swapped whole.

Not here: where a table comes from (table), health and load, which change by the second (health,
pick), and what a key may do (auth).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from schemas.wire.routing import Arm, Function, Key, Replica, RoutingTable, Tenant

_API_PATH: Final = re.compile(r"(?:/[\w.~-]+)*/?", re.ASCII)
_DEFAULT_WEIGHT: Final = Arm(deployment="", cluster="").weight
_UNFIT_FOR_A_HEADER: Final = re.compile(r"[^\w.:/@+-]", re.ASCII)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One replica as the data plane needs it; everything that can be computed once is."""

    id: str
    function: str
    deployment: str
    cluster: str
    weight: int
    draining: bool
    max_concurrent: int
    tls: bool
    host: str
    port: int
    base_path: str
    """Of the engine's URL, without a slash at the end."""
    api_path: str
    """What it has in place of `/v1`."""
    host_header: str
    route_header: bytes
    """`x-detoserve-route: <id>;g=<generation>;d=`, to which a decision id is added."""
    dedicated: bool
    """Its arm is for one tenant alone."""
    cidrs: tuple[str, ...]
    """Networks the endpoint may be in; empty: any but link-local and metadata addresses."""
    address: tuple[bool, str, int]
    """TLS, host and port: what a pooled connection is bound to."""


class Principal(NamedTuple):
    """A tenant, by one of its keys."""

    tenant: Tenant
    key: Key


class Target(NamedTuple):
    """What may answer a tenant's request: a function, and the replicas of it that serve this tenant."""

    function: Function
    candidates: tuple[Candidate, ...]


class UnusableReplica(ValueError):
    """A replica whose URL no request can be sent to."""


def _candidate(
    replica: Replica, arm: Arm, function: Function, generation: int, cidrs: tuple[str, ...]
) -> Candidate:
    url = urlsplit(replica.url)
    try:
        port = url.port
    except ValueError:
        port = -1
    if (
        url.scheme not in ("http", "https")
        or not url.hostname
        or port == -1
        or url.username
        or url.query
        or url.fragment
        or not replica.url.isascii()
        or any(c <= " " for c in replica.url)
    ):
        raise UnusableReplica(
            f"replica {replica.id!r}: its URL must be http(s)://host[:port][/base/path]"
        )
    if not _API_PATH.fullmatch(replica.api_path):
        raise UnusableReplica(f"replica {replica.id!r}: api_path must be like /v1, or empty")
    tls = url.scheme == "https"
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    shown = _UNFIT_FOR_A_HEADER.sub("_", replica.id)
    return Candidate(
        id=replica.id,
        function=function.name,
        deployment=arm.deployment,
        cluster=arm.cluster,
        weight=arm.weight,
        draining=replica.state != "ready",
        max_concurrent=replica.max_concurrent,
        tls=tls,
        host=url.hostname,
        port=port or (443 if tls else 80),
        base_path=url.path.rstrip("/"),
        api_path=replica.api_path.rstrip("/"),
        host_header=f"{host}:{port}" if port else host,
        route_header=f"x-detoserve-route: {shown};g={generation};d=".encode(),
        dedicated=len(arm.tenants) == 1,
        cidrs=cidrs,
        address=(tls, url.hostname, port or (443 if tls else 80)),
    )


def _may_use(tenant: Tenant, function: Function) -> bool:
    return any(fnmatchcase(function.name, pattern) for pattern in tenant.models)


def kept_from(arm: Arm, tenant: Tenant, residency: Collection[str]) -> str:
    """Why a tenant's requests do not go to an arm; empty: they may.

    `residency`: labels of the arm's cluster. A cluster that the table does not know has none.
    """
    if arm.tenants and tenant.name not in arm.tenants:
        return "of other tenants"
    if not any(fnmatchcase(arm.cluster, pattern) for pattern in tenant.clusters):
        return f"cluster {arm.cluster} is not the tenant's"
    missing = [label for label in tenant.residency if label not in residency]
    if missing:
        return f"cluster {arm.cluster} is not {missing[0]}"
    return ""


@dataclass(frozen=True, slots=True)
class Shadow:
    """A deployment that is sent copies, and the replicas of it that take them."""

    deployment: str
    percent: float
    """Of the function's sessions."""
    replicas: tuple[Candidate, ...]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One generation, ready for look-ups. Build it with `snapshot`."""

    table: RoutingTable
    generation: int
    revision: str
    names: dict[str, tuple[Function, ...]]
    """Function name, served name or alias -> functions, the best match first."""
    functions: dict[str, Function]
    keys_by_id: dict[str, tuple[Principal, ...]]
    keys_by_sha256: dict[bytes, Principal]
    replicas: dict[str, Candidate]
    """Every replica by id, draining ones too."""
    bounded: frozenset[str]
    """Functions of which some replica takes only so many requests."""
    divided: frozenset[str]
    """Functions whose sessions are divided between deployments by weight."""
    shadowed: frozenset[str]
    """Functions that have a shadow."""
    by_conversation: frozenset[str]
    """Functions of which every request must be known to belong to some conversation."""
    unusable: tuple[str, ...]
    """What is wrong with replicas that were left out, for people."""
    targets: dict[tuple[str, str, str | None], tuple[Target, ...]] = field(
        default_factory=dict, kw_only=True
    )
    """By tenant, path and model, as somebody has worked it out from this table."""
    _arms: dict[str, tuple[tuple[Arm, tuple[Candidate, ...]], ...]]
    _residency: dict[str, tuple[str, ...]]
    _candidates: dict[tuple[str, str], tuple[Candidate, ...]] = field(default_factory=dict)
    _shadows: dict[tuple[str, str], tuple[Shadow, ...]] = field(default_factory=dict)
    _of_arms: dict[tuple[str, str, str], tuple[Candidate, ...]] = field(default_factory=dict)
    _resolved: dict[tuple[str, str], Function | None] = field(default_factory=dict)

    def may_use(self, tenant: Tenant, function: Function) -> bool:
        """Whether the tenant's list of models names this function."""
        return _may_use(tenant, function)

    def resolve(self, tenant: Tenant, model: str) -> Function | None:
        """The function a tenant means by a model name; None also for one that is not its own."""
        for function in self.names.get(model, ()):
            key = (function.name, tenant.name)
            if key not in self._resolved:
                self._resolved[key] = function if _may_use(tenant, function) else None
            if self._resolved[key] is not None:
                return function
        return None

    def models(self, tenant: Tenant) -> Iterator[Function]:
        """What a tenant may use, by name."""
        return (f for f in self.table.functions if _may_use(tenant, f))

    def kept_from(self, arm: Arm, tenant: Tenant) -> str:
        """As the function of this name, by what the table says of the arm's cluster."""
        return kept_from(arm, tenant, self._residency.get(arm.cluster, ()))

    def candidates(self, function: Function, tenant: Tenant) -> tuple[Candidate, ...]:
        """Replicas that may serve this tenant at all; draining ones are not among them."""
        key = (function.name, tenant.name)
        found = self._candidates.get(key)
        if found is None:
            found = self._candidates[key] = tuple(
                candidate
                for arm, replicas in self._arms.get(function.name, ())
                if not arm.shadow_percent and not self.kept_from(arm, tenant)
                for candidate in replicas
                if not candidate.draining
            )
        return found

    def of_arm(self, function: Function, tenant: Tenant, deployment: str) -> tuple[Candidate, ...]:
        """Those of the candidates that are of one deployment; the same object every time."""
        key = (function.name, tenant.name, deployment)
        found = self._of_arms.get(key)
        if found is None:
            found = self._of_arms[key] = tuple(
                c for c in self.candidates(function, tenant) if c.deployment == deployment
            )
        return found

    def named(self, function: Function, tenant: Tenant, replica: str) -> Candidate | None:
        """A replica of the function by its id, shadows too, if it takes this tenant's requests."""
        for arm, replicas in self.arms(function):
            if not self.kept_from(arm, tenant):
                for candidate in replicas:
                    if candidate.id == replica and not candidate.draining:
                        return candidate
        return None

    def shadows(self, function: Function, tenant: Tenant) -> tuple[Shadow, ...]:
        """Deployments that get copies of this tenant's requests, and answer nobody."""
        key = (function.name, tenant.name)
        found = self._shadows.get(key)
        if found is None:
            made = (
                Shadow(arm.deployment, arm.shadow_percent, tuple(r for r in all_ if not r.draining))
                for arm, all_ in self._arms.get(function.name, ())
                if arm.shadow_percent and not self.kept_from(arm, tenant)
            )
            found = self._shadows[key] = tuple(shadow for shadow in made if shadow.replicas)
        return found

    def arms(self, function: Function) -> tuple[tuple[Arm, tuple[Candidate, ...]], ...]:
        """Everything that the table has of a function, whoever may use it."""
        return self._arms.get(function.name, ())


def _is_divided(function: Function) -> bool:
    """Whether weights say who gets what: they are not all at their default."""
    return any(arm.weight != _DEFAULT_WEIGHT for arm in function.arms if not arm.shadow_percent)


def snapshot(table: RoutingTable) -> Snapshot:
    """Indexes a table. What cannot be used is left out and named in `unusable`."""
    names: dict[str, list[Function]] = {}
    for names_of in (
        lambda f: (f.name,),
        lambda f: (f.served_name,),
        lambda f: f.aliases,
    ):
        for function in table.functions:
            for name in names_of(function):
                known = names.setdefault(name, [])
                if function not in known:
                    known.append(function)

    by_id: dict[str, list[Principal]] = {}
    by_sha256: dict[bytes, Principal] = {}
    for tenant in table.tenants:
        for key in tenant.keys:
            entry = Principal(tenant, key)
            by_id.setdefault(key.id, []).append(entry)
            by_sha256.setdefault(key.sha256, entry)

    cidrs = {cluster.name: cluster.endpoint_cidrs for cluster in table.clusters}
    replicas: dict[str, Candidate] = {}
    unusable: list[str] = []
    arms: dict[str, tuple[tuple[Arm, tuple[Candidate, ...]], ...]] = {}
    for function in table.functions:
        of_function = []
        for arm in function.arms:
            of_arm = []
            for replica in arm.replicas:
                try:
                    candidate = _candidate(
                        replica, arm, function, table.generation, cidrs.get(arm.cluster, ())
                    )
                except (UnusableReplica, ValueError) as error:
                    unusable.append(str(error))
                    continue
                replicas[candidate.id] = candidate
                of_arm.append(candidate)
            of_function.append((arm, tuple(of_arm)))
        arms[function.name] = tuple(of_function)

    divided = frozenset(f.name for f in table.functions if _is_divided(f))
    shadowed = frozenset(
        f.name for f in table.functions if any(arm.shadow_percent for arm in f.arms)
    )
    return Snapshot(
        table=table,
        generation=table.generation,
        revision=table.revision,
        names={name: tuple(functions) for name, functions in names.items()},
        functions={function.name: function for function in table.functions},
        keys_by_id={key_id: tuple(entries) for key_id, entries in by_id.items()},
        keys_by_sha256=by_sha256,
        replicas=replicas,
        bounded=frozenset(c.function for c in replicas.values() if c.max_concurrent),
        divided=divided,
        shadowed=shadowed,
        by_conversation=divided | shadowed,
        unusable=tuple(unusable),
        _arms=arms,
        _residency={cluster.name: cluster.residency for cluster in table.clusters},
    )
