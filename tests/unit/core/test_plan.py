"""plan: what every plan holds to, and the rules that keep deletions and outages apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.core.action import Create, Delete, Noop, Plan, Update
from reconciler.core.compile import compile_workloads
from reconciler.core.last_good import effective
from reconciler.core.observed import Observation, Phase, Unknown
from reconciler.core.plan import (
    Confirmation,
    Pending,
    PlanPolicy,
    parse_confirmation,
    plan,
    predict,
)
from reconciler.core.workload import Desired
from schemas.platform import Prune
from tests.unit.core.worlds import (
    by_key,
    deployment,
    desired_of,
    external,
    function,
    in_effect,
    local,
    observation,
    observed_of,
    reading,
    repos,
    running,
)

KNOWN = PlanPolicy(known=frozenset({"a", "b", "a--b", "e", "zombie"}))
BASE = (function("f"), local("c"), local("d"))


def kinds(made: Plan) -> list[tuple[str, str]]:
    return [(type(a).__name__, a.name) for a in made.actions if not isinstance(a, Noop)]


@given(data=st.data(), objects=repos(), orphans=st.sampled_from(["report", "delete"]))
def test_what_a_plan_leads_to_needs_no_plan(data, objects, orphans):
    desired = desired_of(*objects)
    observed = data.draw(observed_of(desired))
    policy = replace(KNOWN, prune=Prune(orphans=orphans))
    made = plan(desired, observed, policy, 0.0)
    after = predict(made, observed)
    assert plan(desired, after, policy, 0.0).empty
    assert predict(made, after) == after


@given(data=st.data(), objects=repos())
def test_a_calm_world_ends_as_desired(data, objects):
    desired = desired_of(*objects)
    policy = replace(KNOWN, prune=Prune(maxDeletions=100, orphans="delete"))
    if not desired.workloads:
        return
    observed = data.draw(observed_of(desired, calm=True))
    after = predict(plan(desired, observed, policy, 0.0), observed)
    # The backends then bring up what they were told to.
    ready = tuple(
        replace(
            o,
            workloads={
                name: running(desired.workloads[name])
                if name in desired.workloads and desired.workloads[name].backend == o.backend
                else w
                for name, w in o.workloads.items()
            },
        )
        for o in after
        if isinstance(o, Observation)
    )
    end = predict(plan(desired, ready, policy, 0.0), ready)
    left = {
        (o.backend, name): w
        for o in end
        if isinstance(o, Observation)
        for name, w in o.workloads.items()
        if not w.deleting and w.deployment not in desired.shielded
    }
    assert left.keys() == {(w.backend, w.name) for w in desired.workloads.values()}
    assert all(
        (w.spec_digest, w.replicas_wanted)
        == (desired.workloads[name].spec_digest, desired.workloads[name].replicas)
        for (_, name), w in left.items()
    )


@settings(max_examples=50)
@given(data=st.data(), objects=repos())
def test_order_of_input_is_irrelevant(data, objects):
    desired = desired_of(*objects)
    observed = data.draw(observed_of(desired))
    shuffled = desired_of(*data.draw(st.permutations(objects)))
    turned = tuple(
        replace(o, workloads=dict(reversed(o.workloads.items())))
        if isinstance(o, Observation)
        else o
        for o in reversed(observed)
    )
    assert shuffled == desired
    assert plan(shuffled, turned, KNOWN, 0.0) == plan(desired, observed, KNOWN, 0.0)


@settings(max_examples=50)
@given(data=st.data(), objects=repos())
def test_unknown_foreign_and_quarantined_are_left_alone(data, objects):
    desired = desired_of(*objects)
    observed = data.draw(observed_of(desired))
    made = plan(desired, observed, KNOWN, 0.0)
    unknown = {o.backend for o in observed if isinstance(o, Unknown)}
    foreign = {(o.backend, n) for o in observed if isinstance(o, Observation) for n in o.foreign}
    sick = {
        (o.backend, n)
        for o in observed
        if isinstance(o, Observation)
        for n, w in o.workloads.items()
        if w.quarantined
    }
    for action in made.effects:
        backend = action.backend if isinstance(action, Delete) else action.workload.backend
        assert backend not in unknown
        assert (backend, action.name) not in foreign | sick


@settings(max_examples=50)
@given(data=st.data(), objects=repos())
def test_every_wanted_workload_has_one_action_and_every_hold_a_reason(data, objects):
    desired = desired_of(*objects)
    made = plan(desired, data.draw(observed_of(desired)), KNOWN, 0.0)
    here = [a.name for a in made.actions if isinstance(a, Create | Update)]
    here += [a.name for a in made.actions if isinstance(a, Noop) and not a.backend]
    assert sorted(here) == sorted(desired.workloads)
    assert all(a.reason for a in made.actions)
    order = [Create, Update, Delete, Noop]
    ranks = [(order.index(type(a)), a.name) for a in made.actions]
    assert ranks == sorted(ranks)


def test_backoff_holds_only_its_own_workload():
    desired = desired_of(*BASE, deployment("a"), deployment("b"))
    policy = replace(KNOWN, pending={"a--c": Pending(10.0, "no such command")})
    before = plan(desired, [observation()], policy, 9.0)
    assert kinds(before) == [("Create", "b--c")]
    assert Noop("a--c", "a", "no such command", held=True) in before.actions
    assert kinds(plan(desired, [observation()], policy, 10.0)) == [
        ("Create", "a--c"),
        ("Create", "b--c"),
    ]


def test_a_held_deletion_blocks_no_other():
    extra = desired_of(*BASE, deployment("a"), deployment("b"), deployment("e"))
    seen = [observation(*map(running, extra.workloads.values()))]
    desired = desired_of(*BASE, deployment("e"))
    policy = replace(KNOWN, pending={"a--c": Pending(10.0, "busy")})
    assert kinds(plan(desired, seen, policy, 0.0)) == [("Delete", "b--c")]


def many(count: int) -> list:
    return [deployment(f"n{i:02}") for i in range(count)]


def prune(keep: int, of: int, **policy):
    """The plan that takes `of` running deployments down to the first `keep`."""
    before = by_key(*BASE, *many(of))
    seen = [observation(*map(running, desired_of(*before.values()).workloads.values()))]
    desired = compile_workloads(effective(reading(*BASE, *many(keep)), before))
    facts = {"known": frozenset(o.key.name for o in many(of)), "revision": "a" * 40, **policy}
    return plan(desired, seen, PlanPolicy(**facts), 0.0)


@pytest.mark.parametrize(
    ("keep", "of", "deleted"),
    [(7, 10, 3), (6, 10, 0), (24, 30, 6), (23, 30, 0), (0, 1, 1), (0, 2, 0), (0, 3, 0), (1, 3, 2)],
)
def test_at_most_three_or_a_fifth_at_once(keep, of, deleted):
    made = prune(keep, of)
    assert len(made.effects) == deleted
    assert bool(made.refusals) == (deleted == 0)
    assert len(made.staying) == (of - keep if deleted == 0 else 0)


def test_a_refusal_names_the_trailer_that_confirms_it():
    refused = prune(0, 5)
    assert "Detoserve-Confirm-Deletions: 5 aaaaaaaaaaaa" in refused.refusals[0]
    trailer = refused.refusals[0].split("'")[1]
    word = parse_confirmation(f"Delete everything\n\n{trailer}\nSigned-off-by: x\n")
    assert word == Confirmation(5, "a" * 12)
    child = {"confirmation": word, "parents": ("a" * 40,), "revision": "b" * 40}
    assert len(prune(0, 5, **child).effects) == 5
    assert prune(0, 6, **child).empty
    assert prune(0, 5, **{**child, "parents": ("c" * 40,)}).empty
    assert prune(0, 5, **{**child, "parents": ()}).empty


def test_what_was_refused_stays_refused_when_new_ones_have_been_created():
    before = by_key(*BASE, *many(5))
    seen = [observation(*map(running, desired_of(*before.values()).workloads.values()))]
    after = [deployment(f"new{i:02}") for i in range(40)]
    desired = compile_workloads(effective(reading(*BASE, *after), before))
    policy = PlanPolicy(known=frozenset(f"n{i:02}" for i in range(5)))
    made = plan(desired, seen, policy, 0.0)
    assert len(made.effects) == 40
    assert plan(desired, predict(made, seen), policy, 0.0).empty


def test_rewritten_history_deletes_nothing():
    made = prune(4, 5, rewritten=True)
    assert made.empty
    assert "rewritten" in made.refusals[0]


def test_a_file_that_hides_what_it_held_stops_pruning_on_a_cold_start():
    desired = compile_workloads(effective(reading(*BASE, failed=["new.yaml"]), None))
    seen = [observation(running(desired_of(*BASE, deployment("a")).workloads["a--c"]))]
    made = plan(desired, seen, PlanPolicy(known=frozenset({"a"})), 0.0)
    assert made.empty
    assert "new.yaml" in made.refusals[0]


@pytest.mark.parametrize("orphans", ["report", "delete"])
def test_orphans_are_reported_or_deleted(orphans):
    seen = [observation(running(desired_of(*BASE, deployment("a")).workloads["a--c"]))]
    policy = PlanPolicy(prune=Prune(orphans=orphans), known=None)
    made = plan(desired_of(*BASE, deployment("b")), seen, policy, 0.0)
    deletes = [a.name for a in made.effects if isinstance(a, Delete)]
    assert deletes == (["a--c"] if orphans == "delete" else [])
    assert ("a--c" in "".join(made.refusals)) == (orphans == "report")


def test_an_invalid_deployment_is_no_orphan():
    """It stands in the repo, though not in a form that can be acted on."""
    desired = compile_workloads(effective(reading(*BASE, deployment("a", "nowhere")), None))
    seen = [observation(running(desired_of(*BASE, deployment("a")).workloads["a--c"]))]
    policy = PlanPolicy(prune=Prune(orphans="delete"), known=frozenset({"a"}))
    made = plan(desired, seen, policy, 0.0)
    assert made.empty
    assert made.staying == {"a--c"}


def test_a_deployment_that_fits_nowhere_keeps_running_where_it_is():
    place = {"anyOf": ["c"], "constraints": {"regions": ["mars"]}}
    desired = desired_of(*BASE, deployment("a", placement=place))
    seen = [observation(running(desired_of(*BASE, deployment("a")).workloads["a--c"]))]
    made = plan(desired, seen, replace(KNOWN, known=frozenset({"a"})), 0.0)
    assert made.empty
    assert "constraints" in made.actions[0].reason


@pytest.mark.parametrize("to", ["d", "x"])
def test_a_move_deletes_the_old_place_once_the_new_one_can_take_over(to):
    clusters = (*BASE, external("x", ["f", "f"]))
    old = desired_of(*clusters, deployment("a", replicas=3)).workloads["a--c"]
    desired = desired_of(*clusters, deployment("a", at=to, replicas=2))
    new = desired.workloads[f"a--{to}"]

    def made(*phases: Phase) -> Plan:
        there = [running(new, *phases)] if phases else []
        if to == "d":
            return plan(desired, [observation(running(old), *there)], KNOWN, 0.0)
        elsewhere = observation(*there, backend="external")
        return plan(desired, [observation(running(old)), elsewhere], KNOWN, 0.0)

    assert kinds(made()) == [("Create", f"a--{to}")]
    waiting = made(Phase.READY, Phase.STARTING)
    assert waiting.empty
    assert "2 replicas ready; 1 are" in waiting.actions[0].reason
    assert waiting.staying == {"a--c"}
    done = made(Phase.READY, Phase.READY)
    assert kinds(done) == [("Delete", "a--c")]
    assert not done.staying


@pytest.mark.parametrize("suspend", [True, False])
def test_a_move_does_not_wait_for_what_nobody_would_miss(suspend):
    old = desired_of(*BASE, deployment("a")).workloads["a--c"]
    desired = desired_of(*BASE, deployment("a", at="d", suspend=suspend))
    down = running(old) if suspend else running(old, Phase.FAILED)
    assert ("Delete", "a--c") in kinds(plan(desired, [observation(down)], KNOWN, 0.0))


def test_a_move_to_where_nobody_answers_waits():
    clusters = (*BASE, external("x", ["f", "f"]))
    old = desired_of(*clusters, deployment("a")).workloads["a--c"]
    desired = desired_of(*clusters, deployment("a", at="x"))
    for world in ([Unknown("external", "down")], []):
        assert plan(desired, [observation(running(old)), *world], KNOWN, 0.0).empty


def test_a_move_goes_through_prune():
    old = desired_of(*BASE, *many(5))
    moved = in_effect(*BASE, *(deployment(f"n{i:02}", at="d") for i in range(5)))
    desired = compile_workloads(moved)
    everywhere = [*map(running, old.workloads.values()), *map(running, desired.workloads.values())]
    policy = PlanPolicy(known=frozenset(f"n{i:02}" for i in range(5)))
    made = plan(desired, [observation(*everywhere)], policy, 0.0)
    assert made.empty
    assert "Detoserve-Confirm-Deletions: 5" in made.refusals[0]
    assert plan(desired, [observation(*everywhere)], replace(policy, rewritten=True), 0.0).empty


def test_a_cluster_that_changes_its_provider_moves_what_it_held():
    """The workload keeps its name, on another backend."""
    old = desired_of(function("f"), local("c"), deployment("a")).workloads["a--c"]
    desired = desired_of(function("f"), external("c", ["f"]), deployment("a"))
    seen = [observation(running(old)), observation(backend="external")]
    made = plan(desired, seen, KNOWN, 0.0)
    assert kinds(made) == [("Create", "a--c")]
    assert made.staying == {"a--c"}
    there = observation(running(desired.workloads["a--c"]), backend="external")
    done = plan(desired, [seen[0], there], KNOWN, 0.0)
    assert done.effects == (Delete("a--c", "a", "local", "Deployment/a no longer places it here"),)


def test_an_update_says_what_changes():
    before = desired_of(*BASE, deployment("a")).workloads["a--c"]
    changed = function("f", runtime={"engine": "simulated", "args": ["-x"]})
    desired = desired_of(changed, *BASE[1:], deployment("a"))
    (action,) = plan(desired, [observation(running(before))], KNOWN, 0.0).effects
    assert isinstance(action, Update)
    assert (action.how, action.reason) == ("roll", "runtime.args changed")
    bare = running(before, template={})
    (action,) = plan(desired, [observation(bare)], KNOWN, 0.0).effects
    assert action.reason == "template changed"
    scaled = desired_of(*BASE, deployment("a", replicas=4))
    (action,) = plan(scaled, [observation(running(before))], KNOWN, 0.0).effects
    assert isinstance(action, Update)
    assert (action.how, action.reason) == ("scale", "replicas 1 -> 4")


def test_nothing_desired_and_nothing_running_is_nothing_to_do():
    assert plan(Desired(), [observation()], PlanPolicy(), 0.0) == Plan()
