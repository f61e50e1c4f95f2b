"""From what was loaded to what is acted on: a bad edit keeps the last good state of its object.

A file that does not load keeps what it last held. An edit that breaks a reference is held back, before
anything that nobody edited. What is deleted while something still needs it stays until that is gone.
Not here: reading files (sources).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from reconciler.core.config import ConfigObject, Loaded, Location, ObjectKey, Problem
from reconciler.core.references import check_references
from schemas.cluster import Cluster, ExternalProvider
from schemas.deployment import Deployment
from schemas.function import Function
from schemas.tenant import Tenant

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
    shielded: Mapping[str, str] = field(default_factory=dict)
    """Deployments that the repo names but that are not in effect, and why: what runs of them stays."""
    deployments_before: int = 0
    """How many deployments were in effect before this reading; the prune policy's 100 %."""


def needs(obj: ConfigObject, known: Collection[ObjectKey] = ()) -> Iterator[ObjectKey]:
    """The objects that `obj` names; of `known`, also those that its globs match."""
    value = obj.value
    match value:
        case Deployment():
            yield ObjectKey("Function", value.spec.function)
            for tenant in value.spec.tenants:
                yield ObjectKey("Tenant", tenant)
            place = value.spec.placement
            for cluster in [place.cluster] if place.cluster else place.any_of:
                yield ObjectKey("Cluster", cluster)
        case Function():
            for fallback in value.spec.routing.fallbacks:
                yield ObjectKey("Function", fallback)
        case Cluster() if isinstance(value.spec.provider, ExternalProvider):
            for endpoint in value.spec.provider.endpoints:
                yield ObjectKey("Function", endpoint.function)
        case Tenant():
            for key in sorted(known):
                if key.kind == "Cluster" and any(
                    fnmatchcase(key.name, pattern) for pattern in value.spec.clusters
                ):
                    yield key
        case _:
            pass


def effective(loaded: Loaded, previous: Objects | None) -> Effective:
    """Merges a reading with the last good objects; `previous` is None where none are known.

    What results has no reference errors, unless `previous` had: then what nobody edited stays in
    effect if all that it names is there. Terminates because every round takes back an edit or a
    deletion for good, drops an object for good, or is the last.
    """
    known = previous or {}
    objects = dict(loaded.objects)
    problems = list(loaded.problems)
    held: set[ObjectKey] = set()
    lost = _unattributed(loaded, known)
    named_badly = _named_badly(loaded.problems)
    for key, obj in sorted(known.items()):
        if key in objects:
            continue
        if obj.location.path in loaded.failed_paths or key in named_badly:
            objects[key] = obj
        elif lost:
            # From now on that file is where it stands, until the file loads and tells otherwise.
            objects[key] = replace(obj, location=Location(lost[0]))
        else:
            continue
        held.add(key)
        if key not in named_badly:
            problems.append(_not_loaded(objects[key]))

    dropped: set[ObjectKey] = set()
    users: dict[ObjectKey, list[ObjectKey]] = {}
    while True:
        found = check_references(objects, named_badly)
        told = _named_badly(problems) if dropped or held else set()
        problems += [p for p in found if p.key not in told]
        bad = sorted(_named_badly(found) & objects.keys())
        if not bad:
            break
        if edited := [key for key in bad if _differs(objects[key], known.get(key))]:
            users = users or _users(objects)
            while edited:
                key = edited.pop()
                if not _differs(objects.get(key), known.get(key)):
                    continue
                if key in known:
                    objects[key] = known[key]
                    held.add(key)
                elif key in objects:
                    del objects[key]
                    dropped.add(key)
                    # What was edited to need it falls in the same round: chains are long.
                    for user in users.get(key, ()):
                        using = objects.get(user)
                        if using and key in needs(using) and _differs(using, known.get(user)):
                            problems.append(_needs_invalid(using, key))
                            edited.append(user)
        elif culprits := dict(_culprits(bad, objects, known, dropped)):
            # Nobody edited the bad ones: what they need was changed or deleted, and comes back.
            while culprits:
                key, needed_by = culprits.popitem()
                problems.append(_still_needed(known[key], needed_by, gone=key not in objects))
                objects[key] = known[key]
                held.add(key)
                culprits |= {
                    need: known[key]
                    for need in needs(known[key])
                    if need in known and need not in objects and need not in dropped
                }
        elif lacking := [
            key for key in bad if not all(need in objects for need in needs(objects[key]))
        ]:
            for key in lacking:
                del objects[key]
                held.discard(key)
                dropped.add(key)
        else:
            break  # `previous` had it so, and all that it names is there

    return Effective(
        revision=loaded.revision,
        digest=loaded.digest,
        objects=objects,
        problems=tuple(dict.fromkeys(problems)),
        held=frozenset(held),
        prune_blocked=(
            f"{', '.join(lost[:3])} does not load and what stands in it is not known"
            if lost
            else ""
        ),
        shielded=_shielded(loaded, objects),
        deployments_before=sum(key.kind == "Deployment" for key in known),
    )


def _differs(current: ConfigObject | None, old: ConfigObject | None) -> bool:
    return current is None or old is None or old.digest != current.digest


def _culprits(
    bad: Iterable[ObjectKey], objects: Objects, known: Objects, dropped: Collection[ObjectKey]
) -> Iterator[tuple[ObjectKey, ConfigObject]]:
    """What the bad objects need and somebody changed or deleted, each with who needs it.

    A changed Tenant breaks nobody, and a revoked key must not come back: only a deleted one does.
    """
    for key in bad:
        for need in needs(objects[key], known):
            if need not in known or need in dropped:
                continue
            current = objects.get(need)
            if current is None or (need.kind != "Tenant" and _differs(current, known[need])):
                yield need, objects[key]


def _users(objects: Objects) -> dict[ObjectKey, list[ObjectKey]]:
    """Object -> the objects that need it."""
    users: dict[ObjectKey, list[ObjectKey]] = {}
    for key, obj in sorted(objects.items()):
        for need in needs(obj):
            users.setdefault(need, []).append(key)
    return users


def _named_badly(problems: Iterable[Problem]) -> set[ObjectKey]:
    """Objects that an error is about."""
    return {p.key for p in problems if p.severity == "error" and p.key is not None}


def _unattributed(loaded: Loaded, known: Objects) -> list[str]:
    """Files that fail with nothing to tell what stands in them; what is gone may have moved there."""
    told = {p.location.path for p in loaded.problems if p.severity == "error" and p.key is not None}
    stood = {obj.location.path for key, obj in known.items() if key not in loaded.objects}
    return sorted(loaded.failed_paths - told - stood)


def _shielded(loaded: Loaded, objects: Objects) -> dict[str, str]:
    named = _named_badly(loaded.problems) | loaded.objects.keys()
    return {
        key.name: f"{key} stands in the repo but is invalid, so what runs of it is left alone"
        for key in sorted(named - objects.keys())
        if key.kind == "Deployment"
    }


def _not_loaded(obj: ConfigObject) -> Problem:
    path = obj.location.path
    message = f"{path} does not load; the last good {obj.key} stays in effect until it does"
    return Problem(Location(path), message, key=obj.key)


def _needs_invalid(user: ConfigObject, need: ObjectKey) -> Problem:
    message = f"{user.key} needs {need}, which is invalid itself; mend that first"
    return Problem(user.location, message, key=user.key)


def _still_needed(old: ConfigObject, user: ConfigObject, *, gone: bool) -> Problem:
    if gone:
        message = (
            f"{old.key} is gone from the repo, but {user.key} still needs it; it is kept until "
            f"{user.key} is changed or removed ({user.location})"
        )
    else:
        message = (
            f"the change of {old.key} is held back: {user.key} would be invalid with it "
            f"({user.location})"
        )
    return Problem(Location(old.location.path), message, key=old.key)
