"""Which cluster a deployment goes to, and what it costs there an hour. Pure.

Constraints filter first; of what is left the cheapest is chosen, the first listed where all else is
equal. A choice is sticky: what runs somewhere stays there while the constraints allow it, so that no
price makes replicas wander. Not here: names that do not exist (references), or what is free right now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from reconciler.core.capacity import gpus_of_replica
from schemas.cluster import CloudProvider, Cluster, KubernetesProvider
from schemas.deployment import Placement, PlacementConstraints
from schemas.function import FunctionSpec

_CLOUDS_WITHOUT_SPOT: Final = frozenset({"cudo", "do", "fluidstack", "lambda", "paperspace"})


@dataclass(frozen=True, slots=True)
class GpuPrice:
    """USD an hour for one GPU; None where nobody knows."""

    on_demand: float | None = None
    spot: float | None = None


Catalogue = Mapping[tuple[str, str], GpuPrice]
"""(cluster, GPU type in lower case) -> price, as SkyPilot's catalogue says. What Git says goes first."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One cluster for one deployment."""

    cluster: str
    replicas: int
    gpu_type: str = ""
    """The acceptable type it would most likely get; "" where it takes none."""
    gpus_each: int = 0
    price_each: float | None = 0.0
    """USD an hour for a replica, on what it most likely runs on; None where no price is known."""
    ceiling_each: float | None = 0.0
    """The same should no spot instance be found."""

    @property
    def gpus(self) -> int:
        return self.replicas * self.gpus_each

    @property
    def price_per_hour(self) -> float | None:
        return None if self.price_each is None else self.price_each * self.replicas


@dataclass(frozen=True, slots=True)
class Choice:
    """`offer` is None where no listed cluster will do; `refused` says why of each that will not."""

    offer: Offer | None
    reason: str
    refused: Mapping[str, str] = field(default_factory=dict)


def choose(
    placement: Placement,
    function: FunctionSpec,
    replicas: int,
    clusters: Mapping[str, Cluster],
    *,
    current: str | None = None,
    taken: Mapping[tuple[str, str], int] | None = None,
    catalogue: Catalogue | None = None,
) -> Choice:
    """Where a deployment goes.

    Args:
        placement: of the deployment; every cluster it names is in `clusters`.
        function: what it runs.
        replicas: how many it needs at least.
        clusters: by name.
        current: the cluster where it runs, or where it was put before.
        taken: (cluster, GPU type in lower case) -> GPUs that others have.
        catalogue: prices where Git has none.
    """
    listed = [placement.cluster] if placement.cluster else placement.any_of
    offers: list[Offer] = []
    refused: dict[str, str] = {}
    for name in listed:
        cluster = clusters[name]
        found = offer(cluster, function, replicas, placement.constraints.spot, catalogue or {})
        reason = _misses(cluster, placement.constraints, found)
        if not reason and not placement.cluster and name != current:
            # Whoever names one cluster has decided; the backend waits for room there.
            reason = _no_room(cluster, found, taken or {})
        if reason:
            refused[name] = reason
        else:
            offers.append(found)
    if not offers:
        text = "; ".join(f"{name} {why}" for name, why in refused.items())
        return Choice(None, f"no listed cluster meets the placement constraints: {text}", refused)
    cheapest = min(offers, key=lambda o: (o.price_each is None, o.price_each or 0.0))
    if placement.cluster:
        return Choice(cheapest, "named", refused)
    for found in offers:
        if found.cluster == current:
            saved = _saving(found, cheapest)
            return Choice(found, f"it stays where it is{saved}", refused)
    if len(offers) == 1:
        why = "the only one that will do" if refused else "the only one listed"
    elif cheapest.price_each is None:
        why = "the first listed, as no price is known"
    else:
        why = "the cheapest that will do"
    return Choice(cheapest, why, refused)


def offer(
    cluster: Cluster, function: FunctionSpec, replicas: int, spot: str, catalogue: Catalogue
) -> Offer:
    """What so many replicas would get and cost in a cluster."""
    name = cluster.metadata.name
    each = gpus_of_replica(function)
    if not each:
        return Offer(name, replicas)
    types = function.resources.gpu.types if function.resources.gpu else ()
    gpu_type = likely_type(types, cluster)
    price = price_of(cluster, gpu_type, catalogue)
    wants_spot = spot != "never" and has_spot(cluster)
    rate = price.spot if wants_spot and price.spot is not None else price.on_demand
    ceiling = rate if spot == "only" else price.on_demand
    return Offer(
        name,
        replicas,
        gpu_type,
        each,
        None if rate is None else round(rate * each, 6),
        None if ceiling is None else round(ceiling * each, 6),
    )


def likely_type(types: Sequence[str], cluster: Cluster) -> str:
    """The first acceptable type that the cluster lists; the first of all where it lists none."""
    listed = {gpu.type.casefold(): gpu.type for gpu in cluster.spec.gpus}
    for gpu_type in types:
        if gpu_type.casefold() in listed:
            return listed[gpu_type.casefold()]
    if not types:
        return next(iter(listed.values()), "any")
    return types[0]


def price_of(cluster: Cluster, gpu_type: str, catalogue: Catalogue) -> GpuPrice:
    """Of one GPU: field by field what Git says, else the catalogue."""
    known = catalogue.get((cluster.metadata.name, gpu_type.casefold()), GpuPrice())
    for gpu in cluster.spec.gpus:
        if gpu.type.casefold() == gpu_type.casefold():
            return GpuPrice(
                known.on_demand if gpu.price_per_hour is None else gpu.price_per_hour,
                known.spot if gpu.spot_price_per_hour is None else gpu.spot_price_per_hour,
            )
    return known


def has_spot(cluster: Cluster) -> bool:
    """Whether SkyPilot can ask for spot instances there."""
    match cluster.spec.provider:
        case CloudProvider(cloud=cloud):
            return cloud not in _CLOUDS_WITHOUT_SPOT
        case KubernetesProvider():
            # Nodes may be spot; SkyPilot selects them by the label that GKE and Karpenter give.
            return any(gpu.spot_price_per_hour is not None for gpu in cluster.spec.gpus)
        case _:
            return False


def provider_name(cluster: Cluster) -> str:
    """local, external, kubernetes, slurm, or the cloud's own name."""
    provider = cluster.spec.provider
    return provider.cloud if isinstance(provider, CloudProvider) else provider.type


def _misses(cluster: Cluster, want: PlacementConstraints, found: Offer) -> str:
    """Why a cluster does not meet the constraints; "" where it does."""
    spec = cluster.spec
    if want.regions and spec.region not in want.regions:
        where = f"is in {spec.region}" if spec.region else "names no region"
        return f"{where}, not in {' or '.join(want.regions)}"
    if missing := [label for label in want.residency if label not in spec.residency]:
        return f"does not carry the residency label {missing[0]}"
    if want.providers and provider_name(cluster) not in want.providers:
        return f"is {provider_name(cluster)}, not {' or '.join(want.providers)}"
    if want.spot == "only" and not has_spot(cluster):
        return "has no spot instances"
    if want.max_price_per_hour is not None:
        if found.ceiling_each is None:
            return f"has no known price for {found.gpu_type}, and there is a ceiling"
        # What sleeps is judged by what waking it would cost.
        cost = found.ceiling_each * max(1, found.replicas)
        if cost > want.max_price_per_hour:
            return (
                f"costs ${cost:,.2f} an hour, above the ceiling of ${want.max_price_per_hour:,.2f}"
            )
    return ""


def _no_room(cluster: Cluster, found: Offer, taken: Mapping[tuple[str, str], int]) -> str:
    if not found.gpus or not cluster.spec.gpus:
        return ""
    wanted = found.gpu_type.casefold()
    there = sum(gpu.count for gpu in cluster.spec.gpus if gpu.type.casefold() == wanted)
    free = there - taken.get((found.cluster, wanted), 0)
    if found.gpus <= free:
        return ""
    if not there:
        return f"lists no {found.gpu_type}"
    return f"has {max(0, free)} of {there} {found.gpu_type} left, not {found.gpus}"


def _saving(here: Offer, cheapest: Offer) -> str:
    if here.price_per_hour is None or cheapest.price_per_hour is None:
        return ""
    saved = here.price_per_hour - cheapest.price_per_hour
    return f"; {cheapest.cluster} would cost ${saved:,.2f} an hour less" if saved > 0 else ""
