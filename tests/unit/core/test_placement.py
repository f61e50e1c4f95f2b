"""placement: constraints first, then the cheapest, and what runs somewhere stays there."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.compile import compile_workloads, places_of
from reconciler.core.placement import GpuPrice, choose
from schemas.cluster import Cluster
from schemas.deployment import Placement
from schemas.function import FunctionSpec
from tests.unit.core.worlds import (
    config_object,
    deployment,
    function,
    in_effect,
    observation,
    running,
    tenant,
)

AWS = {"type": "cloud", "cloud": "aws", "region": "us-east-1"}
LAMBDA = {"type": "cloud", "cloud": "lambda"}
SLURM = {"type": "slurm", "cluster": "campus"}


def cluster(name: str, provider: dict[str, Any], *gpus: dict[str, Any], **spec: Any) -> Cluster:
    obj = config_object("Cluster", name, {"provider": provider, "gpus": list(gpus)} | spec)
    assert isinstance(obj.value, Cluster)
    return obj.value


def h100(price: float | None, *, spot: float | None = None, count: int = 64) -> dict[str, Any]:
    gpu: dict[str, Any] = {"type": "H100", "count": count}
    if price is not None:
        gpu["pricePerHour"] = price
    if spot is not None:
        gpu["spotPricePerHour"] = spot
    return gpu


CLUSTERS = {
    "aws": cluster("aws", AWS, h100(6.0, spot=2.0), region="us", residency=["us"]),
    "campus": cluster("campus", SLURM, h100(3.0, count=8), region="eu", residency=["eu", "de"]),
    "lambda": cluster("lambda", LAMBDA, h100(2.5), region="us"),
    "unpriced": cluster("unpriced", SLURM, h100(None), region="eu", residency=["eu"]),
}
GPUS = {"gpu": {"types": ["H100"], "count": 2}}


def spec_of(**resources: Any) -> FunctionSpec:
    value = function("f", resources=resources or GPUS).value
    return value.spec  # type: ignore[return-value]


def chosen(
    *anywhere: str, replicas: int = 2, current: str | None = None, taken: Any = None, **want: Any
):
    placement = Placement.model_validate({"anyOf": list(anywhere), "constraints": want})
    return choose(placement, spec_of(), replicas, CLUSTERS, current=current, taken=taken)


def place(*anywhere: str, **more: Any) -> str | None:
    offer = chosen(*anywhere, **more).offer
    return offer.cluster if offer else None


EVERYWHERE = ("unpriced", "aws", "campus", "lambda")


@pytest.mark.parametrize(
    ("want", "there"),
    [
        ({}, "lambda"),
        ({"regions": ["eu"]}, "campus"),
        ({"residency": ["eu", "de"]}, "campus"),
        ({"residency": ["us"]}, "aws"),
        ({"providers": ["aws", "azure"]}, "aws"),
        ({"providers": ["slurm"]}, "campus"),
        ({"spot": "allowed"}, "aws"),
        ({"spot": "only"}, "aws"),
        ({"maxPricePerHour": 9.0}, None),
        ({"maxPricePerHour": 10.0}, "lambda"),
        # With a fall back to on-demand the ceiling is of that; without one, of spot.
        ({"spot": "allowed", "maxPricePerHour": 11.0}, "lambda"),
        ({"spot": "only", "maxPricePerHour": 8.0}, "aws"),
        ({"regions": ["mars"]}, None),
    ],
)
def test_constraints_filter_and_then_the_cheapest_is_chosen(want, there):
    assert place(*EVERYWHERE, **want) == there


def test_every_refused_cluster_is_told_with_its_reason():
    choice = chosen(*EVERYWHERE, regions=["eu"], maxPricePerHour=1.0)
    assert choice.offer is None
    assert choice.refused == {
        "unpriced": "has no known price for H100, and there is a ceiling",
        "aws": "is in us, not in eu",
        "campus": "costs $12.00 an hour, above the ceiling of $1.00",
        "lambda": "is in us, not in eu",
    }


def test_a_named_cluster_must_meet_the_constraints_too():
    named = Placement.model_validate({"cluster": "aws", "constraints": {"residency": ["eu"]}})
    choice = choose(named, spec_of(), 1, CLUSTERS)
    assert choice.offer is None
    assert "does not carry the residency label eu" in choice.reason


def test_what_runs_somewhere_stays_though_another_is_cheaper():
    choice = chosen("campus", "lambda", current="campus")
    assert choice.offer is not None
    assert choice.offer.cluster == "campus"
    assert choice.reason == "it stays where it is; lambda would cost $2.00 an hour less"
    assert place("campus", "lambda", current="campus", regions=["us"]) == "lambda"


def test_where_there_is_no_room_left_the_next_cheapest_takes_it():
    full = {("campus", "h100"): 6}
    assert place("campus", "aws", replicas=1, taken=full) == "campus"
    assert place("campus", "aws", replicas=2, taken=full) == "aws"
    assert place("campus", "aws", replicas=2, taken=full, current="campus") == "campus"


def test_a_price_in_git_goes_before_the_catalogue():
    catalogue = {
        ("unpriced", "h100"): GpuPrice(0.5),
        ("lambda", "h100"): GpuPrice(0.1),
    }
    placement = Placement.model_validate({"anyOf": ["lambda", "unpriced"]})
    choice = choose(placement, spec_of(), 2, CLUSTERS, catalogue=catalogue)
    assert choice.offer is not None
    assert (choice.offer.cluster, choice.offer.price_per_hour) == ("unpriced", 2.0)


def test_what_takes_no_gpu_costs_nothing_and_goes_to_the_first():
    placement = Placement.model_validate({"anyOf": ["campus", "aws"]})
    choice = choose(placement, spec_of(cpu=4.0), 3, CLUSTERS)
    assert choice.offer is not None
    assert (choice.offer.cluster, choice.offer.price_per_hour) == ("campus", 0.0)


@given(
    listed=st.lists(st.sampled_from(EVERYWHERE), min_size=1, unique=True),
    replicas=st.integers(0, 4),
    spot=st.sampled_from(["never", "allowed", "only"]),
    ceiling=st.none() | st.floats(1, 50),
    current=st.none() | st.sampled_from(EVERYWHERE),
)
def test_a_choice_is_feasible_stays_chosen_and_nothing_feasible_is_cheaper(
    listed, replicas, spot, ceiling, current
):
    want = {"spot": spot} | ({} if ceiling is None else {"maxPricePerHour": ceiling})
    choice = chosen(*listed, replicas=replicas, current=current, **want)
    if choice.offer is None:
        assert choice.refused.keys() == set(listed)
        return
    here = choice.offer.cluster
    assert here in listed
    assert here not in choice.refused
    assert place(*listed, replicas=replicas, current=here, **want) == here
    if current is None:
        for other in set(listed) - choice.refused.keys():
            alone = chosen(other, replicas=replicas, **want).offer
            assert alone is not None
            if alone.price_each is not None:
                assert choice.offer.price_each is not None
                assert choice.offer.price_each <= alone.price_each


def repo(*more, limit: int | None = None, quota: int = 0):
    gpus = {"quota": quota} | ({} if limit is None else {"limit": limit})
    return in_effect(
        function("f", resources=GPUS, scaling={"minReplicas": 2}),
        config_object("Cluster", "campus", {"provider": SLURM, "gpus": [h100(3.0, count=8)]}),
        config_object("Cluster", "aws", {"provider": AWS, "gpus": [h100(6.0)]}),
        tenant("t", gpus=gpus),
        *more,
    )


ANYWHERE = {"anyOf": ["campus", "aws"]}


def test_deployments_share_what_a_cluster_lists():
    wanted = repo(*(deployment(name, placement=ANYWHERE) for name in ("a", "b", "c")))
    places = {w.deployment: w.cluster for w in compile_workloads(wanted).workloads.values()}
    assert places == {"a": "campus", "b": "campus", "c": "aws"}


def test_where_it_is_seen_to_run_it_stays():
    wanted = repo(deployment("a", placement=ANYWHERE))
    there = compile_workloads(wanted, places={"a": "aws"}).workloads["a--aws"]
    assert there.price_per_hour == 24.0
    places = places_of(wanted, [observation(running(there), backend="skypilot")])
    assert places == {"a": "aws"}
    assert compile_workloads(wanted, places=places).workloads.keys() == {"a--aws"}


def test_spot_instances_are_another_template_only_where_there_are_any():
    def digest(place: str, spot: str) -> str:
        where = {"cluster": place, "constraints": {"spot": spot}}
        made = compile_workloads(repo(deployment("a", placement=where)))
        return made.workloads[f"a--{place}"].spec_digest

    assert digest("aws", "allowed") != digest("aws", "never")
    assert digest("campus", "allowed") == digest("campus", "never")


def test_a_tenants_own_deployments_may_not_want_more_than_its_limit():
    mine = (deployment("a", at="campus", tenants=["t"]), deployment("b", at="aws", tenants=["t"]))
    fits = repo(*mine, limit=8)
    assert not [p for p in fits.problems if p.severity == "error"]
    over = repo(*mine, limit=7)
    problems = [p for p in over.problems if "may have 7 GPUs" in p.message]
    assert {p.key.name for p in problems if p.key} == {"a", "b"}
    assert "its deployments want 8 (a 4, b 4)" in problems[0].message
    shared = repo(deployment("a", at="campus"), deployment("b", at="aws"), limit=1)
    assert not [p for p in shared.problems if p.severity == "error"]
