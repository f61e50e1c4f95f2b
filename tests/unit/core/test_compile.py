"""compile: names that never clash, digests that move only with what rolls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.core.workload import MAX_NAME, workload_name
from schemas.base import NAME_PATTERN
from tests.unit.core.worlds import deployment, desired_of, external, function, local

names = st.one_of(
    st.from_regex(NAME_PATTERN, fullmatch=True),
    st.text("ab-", min_size=1, max_size=8).filter(lambda s: s.strip("-") == s),
    st.sampled_from(["a" * 63, "a" * 62 + "b", "a" * 54 + "-b"]),
)


@given(one=st.tuples(names, names), other=st.tuples(names, names))
def test_names_are_valid_stable_and_told_apart(one, other):
    name = workload_name(*one)
    assert len(name) <= MAX_NAME
    assert name.strip("-") == name
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name == workload_name(*one)
    assert (name == workload_name(*other)) == (one == other)


def test_a_double_dash_in_a_name_makes_no_two_workloads_one():
    assert workload_name("a--b", "c") != workload_name("a", "b--c")
    assert workload_name("chat", "local") == "chat--local"


def digest(**spec: Any) -> str:
    clusters = (local("c"), external("x", ["f"]))
    return (
        desired_of(function("f", **spec), *clusters, deployment("a")).workloads["a--c"].spec_digest
    )


MODEL = {"uri": "sim://m"}
RUNTIME = {"engine": "simulated"}


@pytest.mark.parametrize(
    "spec",
    [
        {"price": {"inputPerMillion": 3.0}},
        {"model": MODEL | {"aliases": ["x"]}},
        {"model": MODEL | {"tasks": ["chat"]}},
        {"routing": {"policy": "least-load", "timeouts": {"connect": "1s"}}},
        {"scaling": {"minReplicas": 7}},
        {"limits": {"concurrent": 5}},
        {"readiness": {"path": "/health"}},
        {"runtime": RUNTIME | {"args": []}},
        {"model": MODEL | {"servedName": "f"}},
    ],
)
def test_what_is_the_routers_affair_or_a_default_does_not_roll(spec):
    assert digest(**spec) == digest()


@pytest.mark.parametrize(
    "spec",
    [
        {"model": {"uri": "sim://other"}},
        {"model": MODEL | {"quantization": "fp8"}},
        {"model": MODEL | {"servedName": "other"}},
        {"runtime": {"engine": "vllm"}, "model": {"uri": "hf://a/b"}},
        {"runtime": RUNTIME | {"image": "a/b:1"}},
        {"runtime": RUNTIME | {"version": "1"}},
        {"runtime": RUNTIME | {"command": ["x"]}},
        {"runtime": RUNTIME | {"args": ["-x"]}},
        {"runtime": RUNTIME | {"env": {"A": "1"}}},
        {"runtime": RUNTIME | {"secrets": {"A": {"fromEnv": "B"}}}},
        {"runtime": RUNTIME | {"prefixCaching": False}},
        {"runtime": RUNTIME | {"maxModelLen": 4096}},
        {"resources": {"cpu": 2.0}},
        {"resources": {"memory": "1Gi"}},
        {"readiness": {"path": "/ready"}},
        {"readiness": {"timeout": "1s"}},
    ],
)
def test_what_replicas_run_rolls(spec):
    assert digest(**spec) != digest()


def test_the_order_of_env_is_no_change_and_that_of_args_is():
    one, two = {"A": "1", "B": "2"}, {"B": "2", "A": "1"}
    assert digest(runtime=RUNTIME | {"env": one}) == digest(runtime=RUNTIME | {"env": two})
    assert digest(runtime=RUNTIME | {"args": ["-a", "-b"]}) != digest(
        runtime=RUNTIME | {"args": ["-b", "-a"]}
    )


def test_deployment_decides_how_many_and_for_whom():
    scaled = function("f", scaling={"minReplicas": 2})
    for spec, wanted in [({}, 2), ({"replicas": 5}, 5), ({"replicas": 5, "suspend": True}, 0)]:
        made = desired_of(scaled, local("c"), deployment("a", **spec)).workloads["a--c"]
        assert (made.replicas, made.backend, made.weight) == (wanted, "local", 100)


def test_external_endpoints_are_those_of_the_function():
    place = external("x", ["f", "g"])
    made = desired_of(function("f"), function("g"), place, deployment("a", "g", "x"))
    assert [e.url for e in made.workloads["a--x"].template.endpoints] == ["http://10.0.0.2:80"]


def test_the_first_listed_cluster_that_meets_the_constraints_is_chosen():
    clusters = (local("c", region="eu"), local("d", region="us", residency=["gov"]))

    def place(**constraints: Any) -> list[str]:
        spec = {"anyOf": ["c", "d"], "constraints": constraints}
        made = desired_of(function("f"), *clusters, deployment("a", placement=spec))
        return [w.cluster for w in made.workloads.values()]

    assert place() == ["c"]
    assert place(regions=["us"]) == ["d"]
    assert place(residency=["gov"]) == ["d"]
    assert place(regions=["eu"], residency=["gov"]) == []


def test_external_workloads_have_as_many_replicas_as_endpoints():
    objects = (function("f", scaling={"minReplicas": 5}), external("x", ["f"]))
    (workload,) = desired_of(*objects, deployment("d", "f", "x")).workloads.values()
    assert workload.replicas == len(workload.template.endpoints)
    (stopped,) = desired_of(*objects, deployment("d", "f", "x", suspend=True)).workloads.values()
    assert stopped.replicas == 0
