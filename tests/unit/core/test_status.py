"""documents: every state of the world has one honest status, and equal worlds have equal bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from reconciler.core import unacted
from reconciler.core.compile import compile_workloads
from reconciler.core.config import ConfigObject, Location, ObjectKey, Problem
from reconciler.core.last_good import effective
from reconciler.core.observed import Observation, Phase, Unknown
from reconciler.core.plan import PlanPolicy, plan
from reconciler.core.status import SUMMARY_PATH, Document, RoutingView, World, documents
from reconciler.core.unacted import NOT_YET, not_acted_on_yet
from schemas.kinds import MODELS
from schemas.wire.events import MonthToDate
from tests.unit.core.worlds import (
    by_key,
    config_object,
    deployment,
    desired_of,
    function,
    in_effect,
    local,
    observation,
    observed_of,
    reading,
    repos,
    running,
    tenant,
)

T0, T1, T2 = "2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z", "2026-01-01T00:02:00Z"
BASE = (function("f"), local("c"))
A = "status/deployment/a.yaml"


def world(
    *objects: ConfigObject,
    observed: tuple[Observation | Unknown, ...] = (),
    before: dict[ObjectKey, ConfigObject] | None = None,
    **facts: Any,
) -> World:
    now = in_effect(*objects) if before is None else effective(reading(*objects), before)
    desired = compile_workloads(now)
    made = plan(desired, observed, PlanPolicy(known=frozenset()), 0.0)
    return World(now, desired, observed, made, **({"routing": RoutingView()} | facts))


def conditions(document: Document) -> dict[str, tuple[str, str]]:
    return {c["type"]: (c["status"], c["reason"]) for c in document["status"]["conditions"]}


@st.composite
def worlds(draw: st.DrawFn) -> World:
    objects = draw(repos())
    desired = desired_of(*objects)
    names = sorted(desired.workloads)
    kept = draw(st.lists(st.sampled_from(objects), unique_by=lambda o: o.key))
    bad = [Problem(Location(o.location.path, 3, 1), "wrong", key=o.key) for o in kept[:2]]
    made = world(
        *objects,
        observed=draw(observed_of(desired)),
        routing=RoutingView(
            5,
            "r",
            draw(st.dictionaries(st.sampled_from(["r1", "r2"]), st.integers(4, 5))),
            {"a": 5, "b": 4},
        ),
        failures=dict.fromkeys(names[:1], "no such command") if draw(st.booleans()) else {},
    )
    problems = tuple(bad) if draw(st.booleans()) else ()
    held = frozenset(p.key for p in problems[:1] if p.key)
    return replace(made, effective=replace(made.effective, problems=problems, held=held))


@given(made=worlds())
def test_every_state_has_one_ready_and_no_contradiction(made):
    shown = documents(made, {}, T0)
    assert len(shown) == len(made.effective.objects) + 1
    for path, document in shown.items():
        if path == SUMMARY_PATH:
            continue
        kinds = [c["type"] for c in document["status"]["conditions"]]
        assert kinds.count("Ready") == 1
        assert len(kinds) == len(set(kinds))
        assert not {"Reconciling", "Stalled"} <= set(kinds)
        assert all(c["reason"] and c["message"] for c in document["status"]["conditions"])
        for c in document["status"]["conditions"]:
            assert c["status"] == "True" or c["type"] == "Ready"
        facts = document["status"]
        if kinds and document["kind"] == "Deployment" and "replicas" in facts:
            if conditions(document)["Ready"] == ("True", "Serving"):
                assert facts["replicas"]["updated"] >= facts["replicas"]["wanted"]
            if conditions(document)["Ready"][0] == "Unknown":
                assert facts["replicas"].keys() == {"wanted"}
                assert "endpoints" not in facts


@settings(max_examples=50)
@given(made=worlds())
def test_the_same_world_later_gives_equal_documents(made):
    first = documents(made, {}, T0)
    assert documents(made, first, T1) == first


@settings(max_examples=50)
@given(one=worlds(), other=worlds())
def test_a_transition_time_moves_with_its_status_alone(one, other):
    before = documents(one, {}, T0)
    after = documents(other, before, T1)
    for path, document in after.items():
        if path == SUMMARY_PATH:
            continue
        old = {
            (c["type"], c["status"])
            for c in before.get(path, {"status": {"conditions": []}})["status"]["conditions"]
        }
        for c in document["status"]["conditions"]:
            assert c["lastTransitionTime"] == (T0 if (c["type"], c["status"]) in old else T1)


@settings(max_examples=50)
@given(made=worlds(), data=st.data())
def test_order_is_irrelevant(made, data):
    objects = dict(data.draw(st.permutations(sorted(made.effective.objects.items()))))
    workloads = dict(reversed(made.desired.workloads.items()))
    turned = replace(
        made,
        effective=replace(made.effective, objects=objects),
        desired=replace(made.desired, workloads=workloads),
        observed=tuple(reversed(made.observed)),
    )
    assert documents(turned, {}, T0) == documents(made, {}, T0)


def test_generation_counts_spec_changes_and_survives_a_bad_edit():
    seen: dict[str, Document] = {}
    told = []
    known: dict[ObjectKey, ConfigObject] = {}
    for replicas, of in [(1, "f"), (1, "f"), (2, "f"), (2, "nope"), (3, "f")]:
        made = world(*BASE, deployment("a", of, replicas=replicas), before=known)
        known = dict(made.effective.objects)
        seen = documents(made, seen, T0)
        told.append(seen[A]["status"]["observedGeneration"])
    assert told == [1, 1, 2, 2, 3]


def test_generation_is_kept_while_the_object_is_not_in_effect():
    good = documents(world(*BASE, deployment("a", replicas=2)), {}, T0)
    gone = documents(world(*BASE, deployment("a", "nope"), before={}), good, T1)
    assert gone[A]["status"]["observedGeneration"] == 1
    assert conditions(gone[A])["Ready"] == ("False", "Invalid")
    back = documents(world(*BASE, deployment("a", replicas=3)), gone, T2)
    assert back[A]["status"]["observedGeneration"] == 2


def test_observed_revision_is_of_the_commit_that_changed_the_object():
    first = world(*BASE)
    seen = documents(first, {}, T0)
    later = replace(first, effective=replace(first.effective, revision="b" * 12))
    again = documents(later, seen, T1)
    path = "status/function/f.yaml"
    assert again[path] == seen[path]
    assert again[SUMMARY_PATH]["revision"] == "b" * 12


def test_ready_waits_for_the_routers():
    objects = (*BASE, deployment("a"))
    (w,) = desired_of(*objects).workloads.values()
    up = (observation(running(w)),)
    behind = RoutingView(5, "r", {"r1": 5, "r2": 4}, {"a": 5})
    late = documents(world(*objects, observed=up, routing=behind), {}, T0)[A]
    assert conditions(late)["Ready"] == ("False", "RoutersBehind")
    assert "waiting for router r2" in late["status"]["conditions"][0]["message"]
    live = replace(behind, routers={"r1": 5, "r2": 5})
    done = documents(world(*objects, observed=up, routing=live), {}, T0)[A]
    assert conditions(done) == {"Ready": ("True", "Serving")}
    assert done["status"]["conditions"][0]["message"] == "1 of 1 replicas ready; live on 2 routers"


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ((), {"Ready": ("False", "Progressing"), "Reconciling": ("True", "Progressing")}),
        (
            (Phase.READY, Phase.DRAINING),
            {"Ready": ("True", "Serving"), "Reconciling": ("True", "Progressing")},
        ),
        (
            (Phase.FAILED,),
            {
                "Ready": ("False", "Progressing"),
                "Reconciling": ("True", "Progressing"),
                "Degraded": ("True", "ReplicasFailing"),
            },
        ),
    ],
)
def test_conditions_follow_the_replicas(phases, expected):
    objects = (*BASE, deployment("a"))
    (w,) = desired_of(*objects).workloads.values()
    current = replace(running(w, *phases), replicas=running(w, *phases).replicas[: len(phases)])
    made = world(*objects, observed=(observation(current),))
    assert conditions(documents(made, {}, T0)[A]) == expected


def test_a_failure_shows_beside_an_invalid_edit():
    objects = (*BASE, deployment("a"))
    made = world(
        *BASE,
        deployment("a", "nope"),
        before=by_key(*objects),
        observed=(observation(),),
        failures={"a--c": "no such command: vllm"},
    )
    shown = documents(made, {}, T0)[A]
    stalled = next(c for c in shown["status"]["conditions"] if c["type"] == "Stalled")
    assert "the last good version stays in effect" in stalled["message"]
    assert "no such command: vllm" in stalled["message"]


def test_a_function_is_unknown_where_its_only_backend_is():
    made = world(*BASE, deployment("a"), observed=(Unknown("local", "down"),))
    shown = documents(made, {}, T0)["status/function/f.yaml"]
    assert conditions(shown)["Ready"] == ("Unknown", "BackendUnknown")


def test_the_old_place_of_a_move_does_not_stall_the_new_one():
    old = desired_of(*BASE, deployment("a")).workloads["a--c"]
    objects = (*BASE, local("d"), deployment("a", at="d"))
    shown = documents(world(*objects, observed=(observation(running(old)),)), {}, T0)[A]
    assert shown["status"]["cluster"] == "d"
    assert "Stalled" not in conditions(shown)


def test_summary_counts_and_names_what_is_wrong():
    made = world(*BASE, deployment("a", "nope"), before={}, source_problem="no answer")
    summary = documents(made, {}, T0)[SUMMARY_PATH]
    assert summary["objects"]["Deployment"] == {"total": 1, "ready": 0}
    assert summary["source"] == "no answer"
    assert 'no Function "nope"' in summary["problems"][0]


def _model_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _model_of(arg)]


@pytest.mark.parametrize(
    ("kind", "path"), [(kind, path) for kind, paths in NOT_YET.items() for path in paths]
)
def test_every_field_said_to_be_without_effect_exists(kind, path):
    models = _model_of(MODELS[kind].model_fields["spec"].annotation)
    for step in path.split("."):
        fields = [
            info
            for model in models
            for info in model.model_fields.values()
            if info.alias == step.removesuffix("[]")
        ]
        assert fields, f"{kind} has no {path}"
        models = _model_of(fields[0].annotation)


def test_exactly_the_fields_that_are_set_are_named(monkeypatch):
    idle = {
        "Function": ("scaling.maxReplicas", "limits", "price"),
        "Tenant": ("priority", "keys[].limits"),
        "Deployment": ("placement.constraints.spot", "rollout.steps"),
        "Cluster": ("gpus",),
    }
    for kind, paths in idle.items():
        monkeypatch.setitem(unacted._PATHS, kind, [tuple(path.split(".")) for path in paths])
    assert not_acted_on_yet(function("f").value) == []
    scaled = function("f", scaling={"minReplicas": 1, "maxReplicas": 3}, price={})
    assert not_acted_on_yet(scaled.value) == ["spec.scaling.maxReplicas", "spec.price"]
    key = {"id": "k", "sha256": "0" * 64, "limits": {"concurrent": 1}}
    limited = tenant("t", priority=1, keys=[key])
    assert not_acted_on_yet(limited.value) == ["spec.priority", "spec.keys[].limits"]
    gated = deployment(
        "a",
        placement={"anyOf": ["c"], "constraints": {"spot": "only"}},
        rollout={"strategy": "canary", "steps": [{"weightPercent": 10}]},
    )
    assert not_acted_on_yet(gated.value) == [
        "spec.placement.constraints.spot",
        "spec.rollout.steps",
    ]
    gpus = {"provider": {"type": "local"}, "gpus": [{"type": "H100", "count": 1}]}
    assert not_acted_on_yet(config_object("Cluster", "c", gpus).value) == ["spec.gpus"]


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({}, None),
        ({"monthlyUSD": 10}, None),
        ({"monthlyUSD": 9}, "SoftLimit"),
        ({"monthlyUSD": 7}, "UsedUp"),
        ({"monthlyUSD": 9, "softPercent": 90}, None),
        ({"monthlyTokens": 1000}, None),
        ({"monthlyTokens": 400}, "SoftLimit"),
        ({"monthlyUSD": 100, "monthlyTokens": 300}, "UsedUp"),
        ({"monthlyUSD": 0}, "UsedUp"),
    ],
)
def test_a_budget_that_runs_low_is_a_condition_of_its_tenant(budget, reason):
    used = MonthToDate(input_tokens=200, output_tokens=150, cost_nano_usd=7_300_000_000)
    made = world(tenant("t", budget=budget), month_to_date={"t": used, "u": MonthToDate()})
    found = conditions(documents(made, {}, T0)["status/tenant/t.yaml"])
    assert found.pop("Ready") == ("True", "Accepted")
    assert found == ({"BudgetLow": ("True", reason)} if reason else {})


def test_more_use_within_a_step_changes_no_status():
    def shown(nano_usd: int) -> Document:
        used = {"t": MonthToDate(cost_nano_usd=nano_usd)}
        made = world(tenant("t", budget={"monthlyUSD": 10}), month_to_date=used)
        return documents(made, {}, T0)["status/tenant/t.yaml"]

    assert shown(8_100_000_000) == shown(9_900_000_000) != shown(10_000_000_000)


def test_a_failure_that_passes_by_itself_is_no_stall():
    objects = (function("f"), local("c"), deployment("a"))

    def kinds(retrying: frozenset[str]) -> dict[str, str]:
        seen = (observation(),)
        made = world(*objects, observed=seen, failures={"a--c": "no answer"}, retrying=retrying)
        shown = documents(made, {}, T0)["status/deployment/a.yaml"]
        return {c["type"]: c["reason"] for c in shown["status"]["conditions"]}

    assert kinds(frozenset()) == {"Ready": "Progressing", "Stalled": "ActionFailed"}
    assert kinds(frozenset({"a--c"})) == {"Ready": "Progressing", "Reconciling": "Retrying"}
