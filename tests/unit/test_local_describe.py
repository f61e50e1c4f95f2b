"""What a workload is going through, as people read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from reconciler.backends.local.describe import describe
from reconciler.backends.local.rollout import Steps
from reconciler.backends.probe import FASTEST_S, pause_s
from reconciler.core.observed import ObservedReplica, Phase
from tests.engines import local_workload

NOTHING = Steps()


def replica(phase: Phase, spec: str = "plain", detail: str = "") -> ObservedReplica:
    return ObservedReplica("id", phase, spec, detail=detail)


def text(*replicas: ObservedReplica, steps: Steps = NOTHING, **options: Any) -> str:
    deleting = options.pop("deleting", False)
    workload = local_workload(Path("/dev/null"), **options)
    return describe(workload, replicas, steps, deleting=deleting)


def test_what_runs_as_wanted_needs_no_words() -> None:
    assert text(replica(Phase.READY)) == ""
    assert text(replica(Phase.READY), replica(Phase.DRAINING, "old")) == ""


def test_a_roll_says_how_far_it_is() -> None:
    members = [replica(Phase.READY), replica(Phase.READY, "old"), replica(Phase.READY, "old")]
    assert text(*members, replicas=3) == "rolling: 1 of 3 replicas run the new spec"


def test_a_spec_that_does_not_start_says_who_serves_and_why() -> None:
    members = [replica(Phase.FAILED, detail="exited with code 3"), replica(Phase.READY, "old")]
    assert text(*members) == (
        "rolling: 0 of 1 replicas run the new spec; it does not start, 1 replica of the old one "
        "left serving: exited with code 3"
    )


def test_want_of_room_is_said() -> None:
    assert text(steps=Steps(waiting=1), max_processes=2) == (
        "maxProcesses 2 is reached: 1 replica waiting"
    )
    assert "replaced one by one" in text(
        replica(Phase.READY, "old"), steps=Steps(waiting=1), max_processes=1
    )


def test_deleting() -> None:
    assert text(replica(Phase.DRAINING), deleting=True) == (
        "deleting: 1 replica to finish requests"
    )


@given(st.floats(0, 1e6), st.floats(0.05, 3600))
def test_probes_slow_down_with_the_time_it_takes(unready_for_s: float, interval_s: float) -> None:
    pause = pause_s(unready_for_s, interval_s)
    assert FASTEST_S <= pause <= max(interval_s, FASTEST_S)
    assert pause <= max(FASTEST_S, 0.05 * unready_for_s)
