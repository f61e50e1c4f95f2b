"""Which prices are worth asking SkyPilot's catalogue for, and what its answer says. Pure.

Asked for is what a deployment may take in a cloud and Git has no price for. Not here: asking.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from reconciler.core.config import ConfigObject, ObjectKey
from reconciler.core.placement import Catalogue, GpuPrice, price_of
from schemas.cluster import CloudProvider, Cluster
from schemas.deployment import Deployment
from schemas.function import Function


class Question(NamedTuple):
    """A GPU type in a cluster that is a cloud's; `region` is "" where any will do."""

    cluster: str
    cloud: str
    region: str
    gpu_type: str


class Row(NamedTuple):
    """One instance type of the catalogue. USD an hour for the whole instance; None where not sold so."""

    cloud: str
    gpu_type: str
    gpus: float
    price: float | None
    spot_price: float | None
    region: str


def price_questions(objects: Mapping[ObjectKey, ConfigObject]) -> frozenset[Question]:
    """What the repo leaves to the catalogue."""
    functions: dict[str, Function] = {}
    clusters: dict[str, Cluster] = {}
    deployments: list[Deployment] = []
    for obj in objects.values():
        match obj.value:
            case Function() as function:
                functions[function.metadata.name] = function
            case Cluster() as cluster:
                clusters[cluster.metadata.name] = cluster
            case Deployment() as deployment:
                deployments.append(deployment)
            case _:
                pass
    asked = set()
    for deployment in deployments:
        spec = deployment.spec
        known = functions.get(spec.function)
        gpu = known.spec.resources.gpu if known else None
        places = [spec.placement.cluster] if spec.placement.cluster else spec.placement.any_of
        for name in places:
            place = clusters.get(name)
            if place is None or gpu is None:
                continue
            provider = place.spec.provider
            if not isinstance(provider, CloudProvider):
                continue
            wants_spot = spec.placement.constraints.spot != "never"
            for gpu_type in gpu.types:
                price = price_of(place, gpu_type, {})
                if price.on_demand is None or (wants_spot and price.spot is None):
                    asked.add(Question(name, provider.cloud, provider.region or "", gpu_type))
    return frozenset(asked)


def catalogue_of(questions: Collection[Question], rows: Iterable[Row]) -> Catalogue:
    """The cheapest GPU of each type that was asked for, where it was asked for."""
    found: dict[tuple[str, str], GpuPrice] = {}
    by_type: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_type.setdefault((row.cloud.casefold(), row.gpu_type.casefold()), []).append(row)
    for question in questions:
        sold = [
            row
            for row in by_type.get((question.cloud.casefold(), question.gpu_type.casefold()), ())
            if row.gpus > 0 and question.region in ("", row.region)
        ]
        price = GpuPrice(
            min((r.price / r.gpus for r in sold if r.price is not None), default=None),
            min((r.spot_price / r.gpus for r in sold if r.spot_price is not None), default=None),
        )
        if price != GpuPrice():
            found[question.cluster, question.gpu_type.casefold()] = price
    return found
