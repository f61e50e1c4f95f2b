"""compile_routes: what routers may send to, and what a refused or unknown thing leaves routed."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.core.compile import compile_workloads
from reconciler.core.config import ConfigObject
from reconciler.core.observed import Observation, ObservedReplica, Phase, Unknown
from reconciler.core.plan import PlanPolicy, plan
from reconciler.core.routes import changed_deployments, compile_routes, released
from schemas.wire import routing
from tests.unit.core.worlds import (
    config_object,
    deployment,
    desired_of,
    external,
    function,
    in_effect,
    local,
    observation,
    observed_of,
    platform,
    repos,
    running,
    tenant,
)

BASE = (function("f"), local("c"), local("d"))
Seen = list[Observation | Unknown]


def table(
    objects: tuple[ConfigObject, ...],
    observed: Seen,
    before: routing.RoutingTable | None = None,
    known: frozenset[str] | None = frozenset({"a", "b"}),
) -> routing.RoutingTable:
    now = in_effect(*objects)
    desired = compile_workloads(now)
    made = plan(desired, observed, PlanPolicy(known=known), 0.0)
    return compile_routes(
        now.objects, desired, observed, before, revision="r", staying=made.staying
    )


def arms(made: routing.RoutingTable) -> dict[tuple[str, str, str], list[str]]:
    return {
        (f.name, arm.deployment, arm.cluster): [f"{r.id} {r.state}" for r in arm.replicas]
        for f in made.functions
        for arm in f.arms
    }


def shown(*objects: ConfigObject, **of: Any) -> Observation:
    return observation(*(running(w, **of) for w in desired_of(*objects).workloads.values()))


@settings(max_examples=50)
@given(data=st.data(), objects=repos())
def test_only_ready_and_draining_replicas_with_a_url_are_routed(data, objects):
    desired = desired_of(*objects)
    observed = data.draw(observed_of(desired))
    made = compile_routes(in_effect(*objects).objects, desired, observed, None, revision="r")
    states = {Phase.READY: "ready", Phase.DRAINING: "draining"}
    allowed = {
        (w.deployment, r.id, r.url, states[r.phase])
        for o in observed
        if isinstance(o, Observation)
        for w in o.workloads.values()
        for r in w.replicas
        if r.url and r.phase in states
    }
    routed = [
        (arm.deployment, r.id, r.url, r.state)
        for f in made.functions
        for arm in f.arms
        for r in arm.replicas
    ]
    assert set(routed) <= allowed
    assert len(routed) == len(set(routed))
    wanted = {(w.function, w.deployment, w.cluster) for w in desired.workloads.values()}
    assert set(arms(made)) == wanted


@settings(max_examples=50)
@given(data=st.data(), objects=repos())
def test_order_is_irrelevant_and_the_same_world_gives_the_same_table(data, objects):
    observed = data.draw(observed_of(desired_of(*objects)))
    first = table(objects, observed)
    turned = tuple(data.draw(st.permutations(objects)))
    assert table(turned, list(reversed(observed))) == first
    assert table(objects, observed, first) == table(
        objects, observed, table(objects, observed, first)
    )
    assert changed_deployments(first, first) == frozenset()


@settings(max_examples=50)
@given(data=st.data(), objects=repos())
def test_an_unknown_backend_keeps_the_replicas_of_the_table_before(data, objects):
    observed = data.draw(observed_of(desired_of(*objects), calm=True))
    before = table(objects, observed)
    assert arms(table(objects, [Unknown(o.backend, "down") for o in observed], before)) == arms(
        before
    )


def test_a_replica_without_url_is_not_routed():
    (w,) = desired_of(*BASE, deployment("a")).workloads.values()
    bare = running(w, replicas=(ObservedReplica("r", Phase.READY, w.spec_digest, None),))
    assert arms(table((*BASE, deployment("a")), [observation(bare)])) == {("f", "a", "c"): []}


def test_a_move_keeps_the_old_place_until_the_new_one_serves():
    old = (*BASE, deployment("a"))
    new = (*BASE, deployment("a", at="d", weight=7))
    before = table(old, [shown(*old)])
    moving = table(new, [shown(*old)], before)
    assert arms(moving) == {("f", "a", "c"): ["a--c-0 ready"], ("f", "a", "d"): []}
    assert {arm.weight for arm in moving.functions[0].arms} == {7}
    both = observation(*shown(*old).workloads.values(), *shown(*new).workloads.values())
    assert arms(table(new, [both], moving)) == {("f", "a", "d"): ["a--d-0 ready"]}


def test_a_cluster_that_is_removed_with_the_move_is_still_described():
    old = (*BASE[:2], deployment("a"))
    new = (BASE[0], BASE[2], deployment("a", at="d"))
    before = table(old, [shown(*old)])
    assert [c.name for c in table(new, [shown(*old)], before).clusters] == ["c", "d"]


def test_a_new_provider_of_a_cluster_keeps_the_old_replicas_meanwhile():
    old = (function("f"), local("c"), deployment("a"))
    new = (function("f"), external("c", ["f"]), deployment("a"))
    before = table(old, [shown(*old)])
    seen: Seen = [shown(*old), observation(backend="external")]
    assert arms(table(new, seen, before)) == {("f", "a", "c"): ["a--c-0 ready"]}


def test_what_is_deleted_is_routed_no_more_and_what_is_refused_goes_on():
    names = [f"n{i}" for i in range(5)]
    old = (*BASE, *(deployment(n) for n in names))
    known = frozenset(names)
    before = table(old, [shown(*old)])
    few = table(old[:-2], [shown(*old)], before, known)
    assert {d for _, d, _ in arms(few)} == {"n0", "n1", "n2"}
    none = table((local("c"),), [shown(*old)], before, known)
    assert arms(none) == arms(before)
    assert [f.name for f in none.functions] == ["f"]


def test_a_name_that_is_taken_goes_to_who_has_it_now():
    old = (*BASE, deployment("a"), deployment("b"))
    before = table(old, [shown(*old)])
    taker = function("g", model={"uri": "sim://m", "aliases": ["f"]})
    made = table((taker, local("c")), [shown(*old)], before)
    assert [f.name for f in made.functions] == ["g"]


def test_a_deployment_of_another_function_is_not_routed_to_its_old_replicas():
    pair = (*BASE, function("g"))
    old, new = (*pair, deployment("a")), (*pair, deployment("a", "g"))
    before = table(old, [shown(*old)])
    rolling = table(new, [shown(*old)], before)
    assert arms(rolling) == {("f", "a", "c"): ["a--c-0 ready"], ("g", "a", "c"): []}
    assert arms(table(new, [shown(*old)], rolling)) == arms(rolling)
    assert arms(table(new, [shown(*new)], rolling)) == {("g", "a", "c"): ["a--c-0 ready"]}


def test_what_a_function_does_not_say_comes_from_platform_field_by_field():
    spec = {
        "policy": "least-load",
        "timeouts": {"connect": "9s", "firstByte": "8s"},
        "weights": {"load": 5.0, "latency": 2.0},
    }
    mine = function("f", routing={"timeouts": {"connect": "1s"}, "maxConcurrent": 4})
    objects = (platform(routing=spec), mine, local("c"), deployment("a"))
    made = table(objects, [shown(*objects)]).functions[0]
    assert made.policy.name == "least-load"
    assert (made.policy.connect_timeout_s, made.policy.first_byte_timeout_s) == (1.0, 8.0)
    assert (made.policy.weights.load, made.policy.weights.kv_cache) == (5.0, 0.35)
    assert [r.max_concurrent for r in made.arms[0].replicas] == [4]


def test_a_policy_names_the_commit_that_set_it():
    objects = (*BASE, deployment("a"))

    def made(objects, before, revision):
        return compile_routes(
            in_effect(*objects).objects,
            desired_of(*objects),
            [shown(*objects)],
            before,
            revision=revision,
        )

    first = made(objects, None, "one")
    assert first.functions[0].policy_since == "one"
    more = made((*objects, deployment("b")), first, "two")
    assert more.functions[0].policy_since == "one"
    changed = (function("f", routing={"policy": "linear"}), *objects[1:])
    assert made(changed, more, "three").functions[0].policy_since == "three"


def test_a_shadow_is_told_from_an_arm_that_serves():
    objects = (*BASE, deployment("a"), deployment("b", shadow={"percent": 12.5}))
    made = table(objects, [shown(*objects)])
    assert {a.deployment: a.shadow_percent for a in made.functions[0].arms} == {
        "a": None,
        "b": 12.5,
    }
    serving = (*BASE, deployment("a"), deployment("b"))
    assert changed_deployments(table(serving, [shown(*serving)]), made) == {"b"}


def test_keys_and_limits_of_tenants_reach_the_table():
    keys = [
        {"id": "z", "sha256": "0" * 64, "expires": "2027-01-31T00:00:00Z"},
        {"id": "b", "sha256": "1" * 64, "scopes": ["usage"]},
    ]
    person = tenant("t", keys=keys, limits={"concurrent": 3}, suspend=True, weight=2.5)
    shared = function("f", limits={"tokensPerMinute": 9}, routing={"queue": {"maxWait": "2s"}})
    whole = table((person, shared), [])
    (made,) = whole.tenants
    assert whole.functions[0].limits.tokens_per_minute == 9
    policy = whole.functions[0].policy
    assert (policy.queue_max_wait_s, policy.queue_max_requests) == (2.0, 1000)
    assert made.weight == 2.5
    assert [key.id for key in made.keys] == ["b", "z"]
    assert made.keys[1].sha256 == bytes(32)
    assert made.keys[1].expires == 1801353600.0
    assert (made.limits.concurrent, made.suspended, made.clusters) == (3, True, ("*",))


def test_changed_deployments_are_those_whose_arm_differs():
    old = (*BASE, deployment("a"), deployment("b"))
    before = table(old, [shown(*old)])
    new = (*BASE, deployment("a", weight=5))
    assert changed_deployments(before, table(new, [shown(*new)], before)) == {"a", "b"}
    assert changed_deployments(None, before) == {"a", "b"}
    faster = (config_object("Platform", "p", {"routing": {"policy": "least-load"}}), *old)
    assert changed_deployments(before, table(faster, [shown(*old)])) == {"a", "b"}


@given(
    phases=st.lists(st.sampled_from(Phase), max_size=4),
    routers=st.dictionaries(
        st.sampled_from(["r1", "r2"]),
        st.tuples(
            st.integers(4, 6),
            st.dictionaries(st.sampled_from(["a--c-0", "a--c-1"]), st.integers(0, 2)),
        ),
    ),
)
def test_nothing_is_released_that_a_router_may_still_use(phases, routers):
    (w,) = desired_of(*BASE, deployment("a")).workloads.values()
    free = released([observation(running(w, *phases))], 5, routers)
    for i, phase in enumerate(phases):
        used = any(s < 5 or f.get(f"a--c-{i}", 0) > 0 for s, f in routers.values())
        assert (f"a--c-{i}" in free) == (phase is Phase.DRAINING and not used)


def test_nothing_is_released_of_a_backend_that_cannot_be_asked():
    assert released([Unknown("local", "down")], 5, {}) == frozenset()


def test_external_endpoints_stay_routed_until_they_were_probed_again():
    objects = (function("f"), external("c", ["f"]), deployment("a"))
    (workload,) = desired_of(*objects).workloads.values()
    before = table(objects, [observation(running(workload), backend="external")])
    kept = tuple(
        replace(arm, replicas=(routing.Replica(id="e", url=workload.template.endpoints[0].url),))
        for f in before.functions
        for arm in f.arms
    )
    before = replace(before, functions=(replace(before.functions[0], arms=kept),))
    assert arms(table(objects, [observation(backend="external")], before)) == {
        ("f", "a", "c"): ["e ready"]
    }
    elsewhere = replace(
        before.functions[0],
        arms=(replace(kept[0], replicas=(routing.Replica(id="x", url="http://gone"),)),),
    )
    gone = replace(before, functions=(elsewhere,))
    assert arms(table(objects, [observation(backend="external")], gone)) == {("f", "a", "c"): []}
