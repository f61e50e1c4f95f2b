"""Small config repos and observations for the core's tests: few names, so that they collide often."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hypothesis import strategies as st

from reconciler.core.compile import compile_workloads
from reconciler.core.config import ConfigObject, Loaded, Location, ObjectKey, Problem
from reconciler.core.digest import canonical_digest
from reconciler.core.last_good import Effective, effective
from reconciler.core.observed import (
    Observation,
    ObservedReplica,
    ObservedWorkload,
    Phase,
    Unknown,
)
from reconciler.core.plan import template_data
from reconciler.core.workload import Desired, Workload
from schemas.base import API_VERSION
from schemas.kinds import MODELS, Kind

Objects = dict[ObjectKey, ConfigObject]


def config_object(
    kind: Kind, name: str, spec: Mapping[str, Any], *, path: str = "", line: int = 1
) -> ConfigObject:
    document = {
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": {"name": name},
        "spec": dict(spec),
    }
    value = MODELS[kind].model_validate(document)
    where = Location(path or f"{kind.lower()}s/{name}.yaml", line, 1)
    return ConfigObject(ObjectKey(kind, name), value, where, canonical_digest(document))


def function(name: str, *, path: str = "", **spec: Any) -> ConfigObject:
    base: dict[str, Any] = {"model": {"uri": "sim://m"}, "runtime": {"engine": "simulated"}}
    return config_object("Function", name, base | spec, path=path)


def local(name: str, *, path: str = "", **spec: Any) -> ConfigObject:
    base: dict[str, Any] = {"provider": {"type": "local"}}
    return config_object("Cluster", name, base | spec, path=path)


def external(name: str, functions: Iterable[str]) -> ConfigObject:
    endpoints = [
        {"url": f"http://10.0.0.{i}:80", "function": f} for i, f in enumerate(functions, 1)
    ]
    return config_object(
        "Cluster", name, {"provider": {"type": "external", "endpoints": endpoints}}
    )


def tenant(name: str, *, path: str = "", **spec: Any) -> ConfigObject:
    return config_object("Tenant", name, {"models": ["*"]} | spec, path=path)


def deployment(
    name: str, of: str = "f", at: str = "c", *, path: str = "", **spec: Any
) -> ConfigObject:
    base: dict[str, Any] = {"function": of, "placement": {"cluster": at}}
    if "tenants" not in spec:
        base["shared"] = True
    return config_object("Deployment", name, base | spec, path=path)


def platform(**spec: Any) -> ConfigObject:
    return config_object("Platform", "platform", spec)


def by_key(*objects: ConfigObject) -> Objects:
    return {obj.key: obj for obj in objects}


def reading(
    *objects: ConfigObject, failed: Iterable[str] = (), problems: Iterable[Problem] = ()
) -> Loaded:
    found = by_key(*objects)
    digest = canonical_digest(sorted(o.digest for o in objects))
    return Loaded("9f3c1ab00000", digest, found, tuple(problems), frozenset(failed))


def in_effect(*objects: ConfigObject) -> Effective:
    """A valid repo that was in effect before."""
    return effective(reading(*objects), by_key(*objects))


def desired_of(*objects: ConfigObject) -> Desired:
    return compile_workloads(in_effect(*objects))


def running(
    workload: Workload, *phases: Phase, digest: str = "", **changes: Any
) -> ObservedWorkload:
    """What a backend shows of a workload; all wanted replicas READY unless phases are given."""
    shown = phases or (Phase.READY,) * workload.replicas
    facts: dict[str, Any] = {
        "name": workload.name,
        "deployment": workload.deployment,
        "spec_digest": digest or workload.spec_digest,
        "replicas_wanted": workload.replicas,
        "replicas": tuple(
            ObservedReplica(
                f"{workload.name}-{i}",
                phase,
                digest or workload.spec_digest,
                f"http://127.0.0.1:{4000 + i}",
            )
            for i, phase in enumerate(shown)
        ),
        "template": template_data(workload.template),
    }
    return ObservedWorkload(**facts | changes)


def observation(
    *workloads: ObservedWorkload, backend: str = "local", foreign: Iterable[str] = ()
) -> Observation:
    return Observation(backend, {w.name: w for w in workloads}, frozenset(foreign))


FUNCTIONS = ("f", "g", "h")
CLUSTERS = ("c", "d", "x")
TENANTS = ("t", "u")
DEPLOYMENTS = ("a", "b", "a--b", "e")


@st.composite
def repos(draw: st.DrawFn) -> tuple[ConfigObject, ...]:
    """A valid repo: three functions, two local clusters, one external, two tenants, some deployments."""
    objects = [
        *(function(name, runtime=draw(runtimes())) for name in FUNCTIONS),
        local("c", region="eu"),
        local("d", region="us"),
        external("x", FUNCTIONS),
        *(tenant(name) for name in TENANTS),
    ]
    for name in draw(st.lists(st.sampled_from(DEPLOYMENTS), unique=True)):
        audience: dict[str, Any] = draw(
            st.sampled_from([{"shared": True}, {"tenants": ["t"]}, {"tenants": ["t", "u"]}])
        )
        place = draw(
            st.sampled_from(
                [
                    {"cluster": "c"},
                    {"cluster": "d"},
                    {"cluster": "x"},
                    {"anyOf": ["c", "d"], "constraints": {"regions": ["us"]}},
                    {"anyOf": ["c", "d"], "constraints": {"regions": ["mars"]}},
                ]
            )
        )
        spec = audience | {
            "placement": place,
            "replicas": draw(st.sampled_from([None, 0, 1, 3])),
            "suspend": draw(st.booleans()),
        }
        objects.append(deployment(name, draw(st.sampled_from(FUNCTIONS)), **spec))
    return tuple(objects)


def runtimes() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"engine": st.just("simulated"), "args": st.sampled_from([[], ["-a"], ["-a", "-b"]])}
    )


@st.composite
def observed_of(
    draw: st.DrawFn, desired: Desired, *, calm: bool = False
) -> tuple[Observation | Unknown, ...]:
    """Backends in any state that a history of plans, crashes and strangers could leave.

    `calm`: nothing that a plan must leave alone (unknown, foreign, quarantined).
    """
    names = {w.name: w for w in desired.workloads.values()}
    pool = sorted({*names, "a--c", "a--d", "b--c", "e--d", "zombie--c"})
    found: list[Observation | Unknown] = []
    for backend in ("local", "external"):
        if not calm and draw(st.integers(0, 5)) == 0:
            found.append(Unknown(backend, "no answer"))
            continue
        workloads = {}
        for name in draw(st.lists(st.sampled_from(pool), unique=True)):
            wanted = names.get(name)
            phases = draw(st.lists(st.sampled_from(Phase), max_size=3))
            current = wanted.spec_digest if wanted else "old"
            digests = draw(
                st.lists(
                    st.sampled_from([current, "old"]), min_size=len(phases), max_size=len(phases)
                )
            )
            workloads[name] = ObservedWorkload(
                name=name,
                deployment=wanted.deployment if wanted else name.rpartition("--")[0],
                spec_digest=draw(st.sampled_from([current, "old"])),
                replicas_wanted=draw(st.sampled_from([0, 1, 3])),
                replicas=tuple(
                    ObservedReplica(f"{backend}-{name}-{i}", phase, digest, f"http://h:{i}")
                    for i, (phase, digest) in enumerate(zip(phases, digests, strict=True))
                ),
                deleting=draw(st.integers(0, 4)) == 0,
                template=template_data(wanted.template) if wanted and draw(st.booleans()) else {},
                quarantined=not calm and draw(st.integers(0, 6)) == 0,
                detail="why",
            )
        foreign = frozenset()
        if not calm:
            foreign = frozenset(draw(st.sets(st.sampled_from(pool), max_size=1)) - set(workloads))
        found.append(Observation(backend, workloads, foreign))
    return tuple(found)
