"""What status says of a job: one that ran to its end is ready, one that failed waits for a human."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from reconciler.core.observed import Observation, ObservedReplica, Phase
from reconciler.core.plan import PlanPolicy, plan
from reconciler.core.routes import compile_routes
from reconciler.core.status import RoutingView, World, documents
from reconciler.publish.status_yaml import render_document
from tests.unit.core.worlds import (
    config_object,
    deployment,
    desired_of,
    function,
    in_effect,
    local,
    observation,
    running,
)

RUNTIME = {"engine": "custom", "command": ["python", "tune.py"]}


def objects(*, suspend: bool = False):
    return (
        function("tune", runtime=RUNTIME, job={"kind": "evaluation", "retries": 1}),
        local("c"),
        deployment("a", of="tune", suspend=suspend),
    )


def told(*runs: ObservedReplica, suspend: bool = False) -> dict[str, Any]:
    wanted = desired_of(*objects(suspend=suspend))
    workload = wanted.workloads["a--c"]
    seen: tuple[Observation, ...] = (observation(),)
    if runs:
        mine = tuple(replace(run, spec_digest=workload.spec_digest) for run in runs)
        seen = (observation(replace(running(workload), replicas=mine)),)
    made = plan(wanted, seen, PlanPolicy(known=frozenset()), 0.0)
    world = World(in_effect(*objects(suspend=suspend)), wanted, seen, made, RoutingView())
    shown = documents(world, {}, "2026-01-01T00:00:00Z")["status/deployment/a.yaml"]
    render_document(shown)
    return dict(shown["status"])


def run(phase: Phase, detail: str = "", restarts: int = 0) -> ObservedReplica:
    return ObservedReplica("a--c-1", phase, "", detail=detail, restarts=restarts)


@pytest.mark.parametrize(
    ("runs", "state", "conditions"),
    [
        ((), "pending", {"Ready": "Running", "Reconciling": "Running"}),
        ((run(Phase.RUNNING),), "running", {"Ready": "Running", "Reconciling": "Running"}),
        ((run(Phase.SUCCEEDED),), "succeeded", {"Ready": "Succeeded"}),
        ((run(Phase.FAILED, "code 3"),), "failed", {"Ready": "Failed", "Stalled": "JobFailed"}),
        ((run(Phase.PENDING, "again"),), "pending", {"Ready": "Running", "Reconciling": "Running"}),
    ],
)
def test_each_state_of_a_run(runs, state, conditions):
    status = told(*runs)
    assert status["job"]["state"] == state
    assert status["job"]["kind"] == "evaluation"
    assert {c["type"]: c["reason"] for c in status["conditions"]} == conditions


def test_a_suspended_job_is_as_wanted():
    status = told(suspend=True)
    assert [c["reason"] for c in status["conditions"]] == ["Suspended"]


def test_a_job_is_no_function_to_routers_and_has_one_run_whatever_scaling_says():
    wanted = desired_of(*objects())
    assert wanted.workloads["a--c"].replicas == 1
    assert wanted.workloads["a--c"].scaling is None
    table = compile_routes(in_effect(*objects()).objects, wanted, (), None, revision="r")
    assert table.functions == ()


def test_through_skypilot_a_job_is_its_managed_jobs_affair():
    made = desired_of(
        function("tune", runtime=RUNTIME, job={"kind": "batch"}),
        config_object("Cluster", "c", {"provider": {"type": "slurm", "cluster": "x"}}),
        deployment("a", of="tune"),
    )
    assert made.workloads["a--c"].backend == "skypilot-jobs"


def test_another_run_is_another_job_and_more_patience_is_not():
    def digest(**job: Any) -> str:
        spec = function("tune", runtime=RUNTIME, job={"kind": "batch"} | job)
        return (
            desired_of(spec, local("c"), deployment("a", of="tune")).workloads["a--c"].spec_digest
        )

    assert digest(run="2") != digest()
    assert digest(retries=5, timeout="1h") == digest()
