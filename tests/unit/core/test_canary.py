"""canary: step by step while its gates hold, back when one does not, and never twice the same mistake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.core.canary import canary_name, failed_gate, is_canary
from reconciler.core.observed import Observation, ObservedReplica, Phase, Unknown
from reconciler.core.plan import PlanPolicy, plan, predict
from reconciler.core.signals import Signals, Totals
from reconciler.core.steer import Steered, Steering, resumed, steer
from reconciler.core.workload import MAX_NAME, Desired, workload_name
from schemas.deployment import Gates
from schemas.platform import Prune
from schemas.wire.signals import ArmSignals, RouterSignals, ttft_bucket
from tests.unit.core.worlds import deployment, desired_of, function, local, observation, running

STEPS = [{"weightPercent": 10, "hold": "60s"}, {"weightPercent": 50, "hold": "60s"}]
OLD = {"engine": "simulated"}
NEW = {"engine": "simulated", "args": ["--new"]}
WORSE = {"engine": "simulated", "args": ["--worse"]}


def wanted(runtime: dict[str, Any], *, replicas: int = 4, **gates: Any) -> Desired:
    rollout = {"strategy": "canary", "steps": STEPS, "gates": gates}
    return desired_of(
        function("f", runtime=runtime),
        local("c"),
        deployment("a", rollout=rollout, replicas=replicas),
    )


@dataclass
class Stage:
    """A backend that does at once what it is told, a router that counts, and a clock."""

    desired: Desired
    steering: Steering = field(default_factory=Steering)
    before: Desired = field(default_factory=Desired)
    seen: Observation | Unknown = field(default_factory=observation)
    signals: Signals = field(default_factory=Signals)
    now: float = 0.0
    counts: dict[str, list[Any]] = field(default_factory=dict)
    last: Steered | None = None
    events: list[str] = field(default_factory=list)
    ready: bool = True

    def step(self) -> Steered:
        """One pass: steer, plan, and the backend follows."""
        self.now += 10.0
        steered = self.last = steer(
            self.desired,
            [self.seen],
            self.steering,
            self.signals,
            before=self.before,
            revision="rev1",
            now=self.now,
            now_text="now",
        )
        self.steering, self.before = steered.steering, steered.desired
        self.events += [f"{e.reason}: {e.message}" for _, e in steered.news]
        made = plan(steered.desired, [self.seen], PlanPolicy(), self.now)
        (after,) = predict(made, [self.seen])
        if isinstance(after, Observation):
            self.seen = replace(after, workloads=dict(self._run(after)))
        return steered

    def _run(self, after: Observation) -> Iterator[tuple[str, Any]]:
        for name, told in after.workloads.items():
            phase = Phase.READY if self.ready or not is_canary(name, "a") else Phase.STARTING
            replicas = tuple(
                ObservedReplica(
                    f"{name}-{told.spec_digest}-{i}", phase, told.spec_digest, "http://x"
                )
                for i in range(told.replicas_wanted)
            )
            yield name, replace(told, replicas=replicas)

    def serve(self, arm: str, count: int, *, failed: int = 0, ttft_s: float = 0.1) -> None:
        """So many requests of an arm's current template."""
        name = "a--c--canary" if arm.endswith("canary") else "a--c"
        assert self.last is not None
        digest = self.last.desired.workloads[name].spec_digest
        have = self.counts.setdefault(f"{arm} {digest}", [0, 0, {}])
        have[0] += count
        have[1] += failed
        bucket = ttft_bucket(ttft_s)
        have[2][bucket] = have[2].get(bucket, 0) + count - failed
        said = ArmSignals("f", arm, "c", digest, have[0], have[1], dict(have[2]))
        self.signals.take(RouterSignals(router="r", seq=1, arms=(said,)), self.now)

    def shares(self) -> dict[str, int]:
        assert self.last is not None
        arms = self.last.desired.workloads.values()
        total = sum(w.weight for w in arms)
        return {w.routed_as: 100 * w.weight // total for w in arms}

    def running(self) -> dict[str, tuple[int, str]]:
        assert isinstance(self.seen, Observation)
        return {n: (w.replicas_wanted, w.spec_digest) for n, w in self.seen.workloads.items()}


def begun(**gates: Any) -> tuple[Stage, str, str]:
    """A new template has just been committed over a running one."""
    stage = Stage(wanted(OLD, **gates))
    stage.step()
    old = stage.running()["a--c"][1]
    stage.step()
    stage.desired = wanted(NEW, **gates)
    stage.step()
    return stage, old, stage.desired.workloads["a--c"].spec_digest


def test_a_first_deployment_and_a_change_of_number_are_no_canary():
    stage = Stage(wanted(OLD))
    assert stage.step().weights == {}
    stage.desired = wanted(OLD, replicas=6)
    assert stage.step().weights == {}
    assert stage.running() == {"a--c": (6, stage.desired.workloads["a--c"].spec_digest)}


def test_a_new_template_goes_step_by_step_and_then_everywhere():
    stage, old, new = begun()
    assert stage.running() == {"a--c": (4, old), "a--c--canary": (1, new)}
    assert stage.shares() == {"a": 90, "a/canary": 10}
    for _ in range(12):
        stage.step()
        stage.serve("a/canary", 10)
        stage.serve("a", 90)
        if stage.shares()["a"] == 50:
            break
    assert stage.now < 150
    stage.step()
    assert stage.running() == {"a--c": (4, old), "a--c--canary": (2, new)}
    for _ in range(14):
        stage.step()
        if "a--c--canary" in stage.running():
            stage.serve("a/canary", 10)
            stage.serve("a", 90)
    assert stage.running() == {"a--c": (4, new)}
    assert stage.shares() == {"a": 100}
    assert [e.split(":")[0] for e in stage.events] == ["Canary"] * 4
    assert stage.events[-1].endswith("is done: it serves everything")


def test_a_step_is_held_until_enough_requests_have_judged_it():
    stage, *_ = begun(minRequests=50)
    for _ in range(50):
        stage.step()
        stage.serve("a", 90)
    stage.serve("a/canary", 49)
    stage.step()
    assert stage.shares()["a/canary"] == 10
    stage.serve("a/canary", 1)
    stage.step()
    assert stage.shares()["a/canary"] == 50


def test_errors_bring_it_back_before_its_time_is_up_and_it_is_not_tried_again():
    stage, old, new = begun()
    stage.step()
    stage.serve("a", 900)
    stage.serve("a/canary", 30, failed=3)
    stage.step()
    assert stage.now < 60
    assert stage.shares() == {"a": 100}
    stage.step()
    assert stage.running() == {"a--c": (4, old)}
    canary = stage.steering.canaries["a--c"]
    assert canary.rejected == new
    assert canary.why == (
        f"canary of {new[:8]} went back at 10 %: 10.0 % of 30 requests failed, above 1 %"
    )
    assert canary.stable is not None
    assert (canary.stable.digest, canary.stable.revision) == (old, "rev1")
    for _ in range(20):
        stage.step()
    assert stage.running() == {"a--c": (4, old)}
    assert [e.split(":")[0] for e in stage.events] == ["Canary", "RolledBack"]


def test_what_fails_surely_is_not_waited_for():
    stage, *_ = begun(minRequests=1000, maxErrorPercent=1)
    stage.step()
    stage.serve("a/canary", 10, failed=10)
    stage.step()
    assert stage.shares()["a/canary"] == 10
    stage.serve("a/canary", 1, failed=1)
    stage.step()
    assert stage.shares() == {"a": 100}


def test_while_it_is_held_back_the_number_follows_and_a_revert_or_another_template_ends_it():
    stage, old, _ = begun()
    stage.step()
    stage.serve("a/canary", 30, failed=30)
    stage.step()
    stage.step()
    stage.desired = wanted(NEW, replicas=7)
    stage.step()
    assert stage.running() == {"a--c": (7, old)}
    assert stage.before.workloads["a--c"].template.runtime.args == []
    other = replace(stage)
    stage.desired = wanted(OLD, replicas=7)
    stage.step()
    assert stage.running() == {"a--c": (7, old)}
    assert stage.steering.canaries["a--c"].rejected == ""
    other.desired = wanted(WORSE)
    other.step()
    assert other.shares() == {"a": 90, "a/canary": 10}


def test_a_restart_keeps_what_was_decided_and_begins_the_step_anew():
    stage, old, new = begun()
    for _ in range(9):
        stage.step()
        stage.serve("a/canary", 10)
        stage.serve("a", 90)
    assert stage.shares()["a/canary"] == 50
    stage.steering, stage.before = resumed(stage.steering), Desired()
    stage.signals, stage.now = Signals(), 5.0
    stage.step()
    assert stage.shares()["a/canary"] == 50
    assert stage.running() == {"a--c": (4, old), "a--c--canary": (2, new)}


def test_a_lost_memory_begins_the_canary_anew_and_changes_nothing_that_is_stable():
    stage, old, new = begun()
    stage.steering, stage.before = Steering(), Desired()
    stage.desired = wanted(NEW, replicas=9)
    stage.step()
    assert stage.running() == {"a--c": (4, old), "a--c--canary": (1, new)}


def test_a_backend_that_cannot_be_asked_moves_nothing():
    stage, *_ = begun()
    stage.step()
    before, stage.seen = stage.before, Unknown("local", "away")
    for _ in range(20):
        stage.step()
    assert stage.before == before


def test_what_never_becomes_ready_goes_back():
    stage, old, new = begun()
    stage.ready = False
    stage.seen = observation(
        *(
            replace(w, replicas=tuple(replace(r, phase=Phase.STARTING) for r in w.replicas))
            if w.name.endswith("canary")
            else w
            for w in stage.seen.workloads.values()  # type: ignore[union-attr]
        )
    )
    for _ in range(200):
        stage.step()
    assert stage.running() == {"a--c": (4, old)}
    assert stage.steering.canaries["a--c"].rejected == new
    assert "none of its replicas was ready" in stage.steering.canaries["a--c"].why


def test_what_fails_to_start_again_and_again_goes_back_at_once():
    stage, old, _ = begun()
    stage.ready = False
    (canary,) = [w for w in stage.before.workloads.values() if w.arm]
    broken = running(canary, Phase.FAILED)
    replicas = tuple(replace(r, restarts=1, detail="no such model") for r in broken.replicas)
    seen = stage.seen
    assert isinstance(seen, Observation)
    stage.seen = replace(
        seen, workloads={**seen.workloads, canary.name: replace(broken, replicas=replicas)}
    )
    stage.step()
    assert stage.running() == {"a--c": (4, old)}
    assert stage.events[-1].endswith("its replicas do not start: no such model")


def test_another_strategy_ends_a_canary_by_rolling():
    stage, *_ = begun()
    stage.desired = desired_of(function("f", runtime=NEW), local("c"), deployment("a", replicas=4))
    stage.step()
    stage.step()
    assert stage.running() == {"a--c": (4, stage.desired.workloads["a--c"].spec_digest)}


def test_no_commit_must_confirm_that_a_canary_goes():
    stage, *_ = begun()
    stage.step()
    stage.serve("a/canary", 30, failed=30)
    steered = stage.step()
    seen = stage.seen
    assert isinstance(seen, Observation)
    strict = PlanPolicy(
        prune=Prune.model_validate({"maxDeletions": 0, "maxDeletionsPercent": 0.0}),
        known=frozenset(),
    )
    ready = {**seen.workloads, "a--c": running(steered.desired.workloads["a--c"])}
    canary = begun()[0].seen.workloads["a--c--canary"]  # type: ignore[union-attr]
    seen = replace(seen, workloads={**ready, "a--c--canary": canary})
    made = plan(steered.desired, [seen], strict, 0.0)
    assert [(type(a).__name__, a.name) for a in made.effects] == [("Delete", "a--c--canary")]
    assert made.refusals == ()


GATES = Gates()


def totals(count: int, ttft_s: float, *, failed: int = 0, hits: float | None = None) -> Totals:
    tokens = (1000, int(1000 * hits)) if hits is not None else (0, 0)
    return Totals(count, failed, {ttft_bucket(ttft_s): count - failed}, *tokens)


@pytest.mark.parametrize(
    ("new", "old", "over", "said"),
    [
        (totals(100, 0.1), totals(100, 0.1), True, ""),
        (totals(100, 0.1, failed=1), totals(100, 0.1), True, ""),
        (totals(100, 0.1, failed=2), totals(100, 0.1), False, "2.0 % of 100 requests failed"),
        (totals(100, 0.15), totals(100, 0.1), True, "time to first token"),
        (totals(100, 0.13), totals(100, 0.1), False, ""),
        (totals(100, 0.2), totals(100, 0.1), False, "time to first token"),
        (totals(100, 9.0), totals(3, 0.1), True, ""),
        (totals(100, 0.1, hits=0.3), totals(100, 0.1, hits=0.6), True, "cache hit rate is 30%"),
        (totals(100, 0.1, hits=0.3), totals(100, 0.1, hits=0.6), False, ""),
        (totals(100, 0.1, hits=0.5), totals(100, 0.1, hits=0.6), True, ""),
        (totals(100, 0.1, hits=0.0), totals(100, 0.1, hits=0.01), True, ""),
    ],
)
def test_gates(new, old, over, said):
    found = failed_gate(GATES, new, old, over=over)
    assert said in found
    assert bool(said) == bool(found)


names = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)


@given(names, names)
def test_the_second_workloads_name_is_valid_and_nobody_elses(one, other):
    name = workload_name(one, other)
    second = canary_name(name)
    assert len(second) <= MAX_NAME
    assert second.strip("-") == second
    assert second != name
    assert is_canary(second, one)
    assert not is_canary(name, one)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([OLD, NEW, WORSE]),
            st.integers(1, 5),
            st.integers(0, 40),
            st.booleans(),
            st.booleans(),
        ),
        max_size=25,
    )
)
def test_whatever_happens_old_or_new_serves_in_full_and_it_comes_to_rest(history):
    stage = Stage(wanted(OLD))
    stage.step()
    for runtime, replicas, requests, bad, restart in history:
        stage.desired = wanted(runtime, replicas=replicas)
        if restart:
            stage.steering, stage.before = resumed(stage.steering), Desired()
        stage.step()
        workloads = stage.before.workloads
        assert workloads.keys() <= {"a--c", "a--c--canary"}
        assert stage.running()["a--c"][0] in (replicas, *range(1, 6))
        if "a--c--canary" in workloads and requests:
            stage.serve("a/canary", requests, failed=requests if bad else 0)
    for _ in range(60):
        stage.step()
        if "a--c--canary" in stage.before.workloads:
            stage.serve("a/canary", 20)
    settled = stage.running()
    assert settled.keys() == {"a--c"}
    assert settled["a--c"][0] == stage.desired.workloads["a--c"].replicas
    rejected = stage.steering.canaries["a--c"].rejected
    assert (settled["a--c"][1] == stage.desired.workloads["a--c"].spec_digest) != bool(rejected)
