"""From what was loaded to what is acted on: a bad edit keeps the last good state of its object.

A file that does not load keeps what it last held. An edit that breaks a reference is held back. What
is deleted while something still needs it stays until that is gone. Not here: reading files (sources).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from reconciler.core.config import ConfigObject, Loaded, Location, ObjectKey, Problem
from reconciler.core.references import check_references
from schemas.deployment import Deployment
from schemas.function import Function

Objects = Mapping[ObjectKey, ConfigObject]


@dataclass(frozen=True, slots=True)
class Effective:
    """What is acted on. `held` objects are older than the repo, or gone from it but still needed."""

    revision: str
    digest: str
    objects: Objects
    problems: tuple[Problem, ...]
    held: frozenset[ObjectKey]
    prune_blocked: str = ""


def needs(obj: ConfigObject) -> Iterator[ObjectKey]:
    """The objects that `obj` cannot do without."""
    value = obj.value
    if isinstance(value, Deployment):
        yield ObjectKey("Function", value.spec.function)
        for tenant in value.spec.tenants:
            yield ObjectKey("Tenant", tenant)
        place = value.spec.placement
        for cluster in [place.cluster] if place.cluster else place.any_of:
            yield ObjectKey("Cluster", cluster)
    elif isinstance(value, Function):
        for fallback in value.spec.routing.fallbacks:
            yield ObjectKey("Function", fallback)


def effective(loaded: Loaded, previous: Objects | None) -> Effective:
    """Merges a reading with the last good objects; `previous` is None where none are known.

    Terminates because every round either stops, or takes a key out of the repo's version for good.
    """
    known = previous or {}
    objects = dict(loaded.objects)
    held: set[ObjectKey] = set()
    for key, obj in known.items():
        if key not in objects and obj.location.path in loaded.failed_paths:
            objects[key] = obj
            held.add(key)

    problems = list(loaded.problems)
    settled: set[ObjectKey] = set()
    first = True
    while True:
        found = check_references(objects)
        if first:
            problems += found
            first = False
        bad = {p.key for p in found if p.severity == "error" and p.key in objects} - settled
        if not bad:
            break
        for key in sorted(k for k in bad if k is not None):
            old = known.get(key)
            current = objects[key]
            missing = [need for need in needs(current) if need not in objects]
            if old is not None and old.digest != current.digest:
                objects[key] = old
                held.add(key)
            elif old is not None and missing and all(need in known for need in missing):
                for need in missing:
                    objects[need] = known[need]
                    held.add(need)
                    problems.append(_still_needed(known[need], current))
            elif old is not None:
                settled.add(key)
                held.add(key)
            else:
                del objects[key]

    blocked = ""
    if previous is None and loaded.failed_paths:
        paths = ", ".join(sorted(loaded.failed_paths)[:3])
        blocked = f"{paths} does not load and what it held before is not known"
    return Effective(
        revision=loaded.revision,
        digest=loaded.digest,
        objects=objects,
        problems=tuple(dict.fromkeys(problems)),
        held=frozenset(held),
        prune_blocked=blocked,
    )


def _still_needed(gone: ConfigObject, user: ConfigObject) -> Problem:
    return Problem(
        location=Location(gone.location.path),
        message=f"{gone.key} is gone from the repo, but {user.key} still needs it; it is kept until "
        f"{user.key} is changed or removed ({user.location})",
        key=gone.key,
    )
