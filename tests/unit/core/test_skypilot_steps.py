"""The one next request, and that following it leads where it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.core.skypilot.service import Marks, Service, ServiceReplica
from reconciler.core.skypilot.states import SERVICE_STATES
from reconciler.core.skypilot.steps import (
    Down,
    Refused,
    Removal,
    Settled,
    Step,
    Up,
    Update,
    Wait,
    next_step,
)
from reconciler.core.workload import Workload
from tests.engines import sky_workload

WANTED = sky_workload(spec="new", replicas=2)
GOING = Removal("chat--gpus", "chat", until=100.0)


def service(
    status: str = "READY",
    *,
    owner: str = "me",
    spec: str = "new",
    count: int = 2,
    ready: tuple[int, ...] = (1, 2),
) -> Service:
    replicas = tuple(ServiceReplica(n, "READY", 1, f"http://h:{n}") for n in ready)
    marks = Marks(owner, "chat", spec, count)
    return Service("chat--gpus", status, 1, "abcdef", marks, replicas)


def step(told: Workload | Removal, there: Service | None, now: float = 0.0) -> Step:
    return next_step(told, there, "me", now)


def test_up_follows_from_absence_alone() -> None:
    assert step(WANTED, None) == Up()
    for status in [*SERVICE_STATES, "SOMETHING_NEW"]:
        for there in (service(status), service(status, spec="old"), service(status, owner="you")):
            assert step(WANTED, there) != Up()


@pytest.mark.parametrize("told", [WANTED, GOING])
def test_another_ones_is_refused(told: Workload | Removal) -> None:
    assert isinstance(step(told, service(owner="you")), Refused)
    assert isinstance(step(told, service(owner="")), Refused)


@pytest.mark.parametrize("told", [WANTED, GOING])
@pytest.mark.parametrize("status", ["FAILED_CLEANUP", "CONTROLLER_FAILED"])
def test_what_is_broken_waits_for_a_human(told: Workload | Removal, status: str) -> None:
    assert isinstance(step(told, service(status, spec="old"), 1e9), Refused)


def test_updates_say_how() -> None:
    assert step(WANTED, service()) == Settled()
    assert step(WANTED, service(spec="old")) == Update("rolling")
    assert step(WANTED, service(count=1)) == Update("rolling", rolls=False)
    blue = sky_workload(spec="new", replicas=2, rollout={"strategy": "blueGreen"})
    assert step(blue, service(spec="old")) == Update("blue_green")
    assert step(blue, service(count=1)) == Update("rolling", rolls=False), (
        "a number alone replaces nothing"
    )


def test_a_controller_that_starts_or_goes_is_asked_nothing() -> None:
    for status in ("CONTROLLER_INIT", "SHUTTING_DOWN", "SOMETHING_NEW"):
        assert isinstance(step(WANTED, service(status, spec="old")), Wait)
    assert isinstance(step(WANTED, replace(service(), marks=None)), Wait)


def test_a_removal_waits_for_requests_and_no_longer_than_its_time() -> None:
    assert step(GOING, service()) == Wait("2 replicas to finish requests")
    ids = frozenset({"chat--gpus-1-abcdef", "chat--gpus-2-abcdef"})
    assert step(replace(GOING, released=ids), service()) == Down()
    assert step(GOING, service(), now=100.0) == Down()
    assert step(GOING, service(ready=())) == Down()
    assert isinstance(step(GOING, service("SHUTTING_DOWN"), now=100.0), Wait)
    assert step(GOING, None) == Settled()


@settings(deadline=None)
@given(
    spec=st.sampled_from(["old", "new"]),
    count=st.integers(0, 3),
    status=st.sampled_from(["READY", "REPLICA_INIT", "NO_REPLICA", "FAILED"]),
    there=st.booleans(),
    going=st.booleans(),
)
def test_following_the_steps_settles(
    spec: str, count: int, status: str, there: bool, going: bool
) -> None:
    """As SkyPilot would do what it is asked, at most two requests lead to what was told."""
    told: Workload | Removal = GOING if going else WANTED
    now: Service | None = service(status, spec=spec, count=count) if there else None
    for _ in range(2):
        match step(told, now, now=1e9):
            case Settled():
                break
            case Up() | Update():
                now = service()
            case Down():
                now = None
            case other:
                pytest.fail(f"stuck at {other}")
    assert step(told, now, now=1e9) == Settled()
