"""Every status of SkyServe, and what it means here."""

from __future__ import annotations

import pytest

from reconciler.core.observed import Phase
from reconciler.core.skypilot.service import Marks, Service, ServiceReplica
from reconciler.core.skypilot.states import Stage, gave_up, observed_service, service_state

MINE = Marks("me", "chat", "two", replicas=2)
DIGESTS = {1: "one", 2: "two"}


def service(*replicas: ServiceReplica, status: str = "READY") -> Service:
    return Service("chat--gpus", status, 2, "abcdef0123", MINE, replicas)


def replica(
    status: str, number: int = 1, version: int = 2, url: str = "http://h:1/"
) -> ServiceReplica:
    return ServiceReplica(number, status, version, url)


@pytest.mark.parametrize(
    ("status", "stage", "deleting", "quarantined"),
    [
        ("CONTROLLER_INIT", Stage.BUSY, False, False),
        ("REPLICA_INIT", Stage.OPEN, False, False),
        ("READY", Stage.OPEN, False, False),
        ("NO_REPLICA", Stage.OPEN, False, False),
        ("FAILED", Stage.OPEN, False, False),
        ("SHUTTING_DOWN", Stage.LEAVING, True, False),
        ("FAILED_CLEANUP", Stage.BROKEN, False, True),
        ("CONTROLLER_FAILED", Stage.BROKEN, False, True),
        ("SOMETHING_NEW", Stage.BUSY, False, False),
    ],
)
def test_services(status: str, stage: Stage, deleting: bool, quarantined: bool) -> None:
    assert service_state(status, "chat--gpus").stage is stage
    seen = observed_service(service(status=status), DIGESTS, {})
    assert (seen.deleting, seen.quarantined) == (deleting, quarantined)
    assert (seen.name, seen.deployment, seen.spec_digest) == ("chat--gpus", "chat", "two")
    assert seen.replicas_wanted == 2
    assert bool(seen.detail) == (status != "READY"), "whatever is not plainly fine is said"
    assert "{" not in seen.detail
    if quarantined:
        assert "sky serve down --purge chat--gpus" in seen.detail


@pytest.mark.parametrize(
    ("status", "phase", "url"),
    [
        ("PENDING", Phase.PENDING, True),
        ("PROVISIONING", Phase.PENDING, True),
        ("STARTING", Phase.STARTING, True),
        ("READY", Phase.READY, True),
        ("NOT_READY", Phase.NOT_READY, True),
        ("SHUTTING_DOWN", Phase.DRAINING, True),
        ("PREEMPTED", Phase.PENDING, True),
        ("FAILED", Phase.FAILED, False),
        ("FAILED_INITIAL_DELAY", Phase.FAILED, False),
        ("FAILED_PROBING", Phase.FAILED, False),
        ("FAILED_PROVISION", Phase.FAILED, False),
        ("FAILED_CLEANUP", Phase.FAILED, True),
        ("UNKNOWN", Phase.NOT_READY, True),
        ("SOMETHING_NEW", Phase.NOT_READY, True),
    ],
)
def test_replicas(status: str, phase: Phase, url: bool) -> None:
    (seen,) = observed_service(service(replica(status)), DIGESTS, {}).replicas
    assert seen.phase is phase
    assert seen.url == ("http://h:1" if url else None)
    assert bool(seen.detail) == (status != "READY")
    assert seen.id == "chat--gpus-1-abcdef"


def test_a_preemption_is_no_failure_and_an_unknown_one_is_not_gone() -> None:
    seen = observed_service(service(replica("PREEMPTED"), replica("UNKNOWN", 2)), DIGESTS, {})
    assert len(seen.replicas) == 2
    assert seen.count(Phase.FAILED) == 0


def test_rows_of_the_dead_are_shown_while_somebody_is_missing() -> None:
    """SkyServe keeps them until the service is taken down."""
    dead = [replica("FAILED", n) for n in (1, 2, 3)]
    seen = observed_service(service(*dead, replica("READY", 4)), DIGESTS, {})
    assert [r.id.split("-")[3] for r in seen.replicas] == ["4", "3"], "the newest says why"
    seen = observed_service(service(*dead, replica("READY", 4), replica("READY", 5)), DIGESTS, {})
    assert [r.phase for r in seen.replicas] == [Phase.READY, Phase.READY]


def test_a_replica_that_may_still_cost_money_is_always_shown() -> None:
    ready = [replica("READY", 2), replica("READY", 3)]
    seen = observed_service(service(replica("FAILED_CLEANUP"), *ready), DIGESTS, {})
    assert "may still cost money" in seen.replicas[0].detail


def test_replicas_carry_the_spec_of_their_version() -> None:
    old, new, lost = replica("READY", 1, 1), replica("READY", 2, 2), replica("READY", 3, 7)
    seen = observed_service(service(old, new, lost), DIGESTS, {})
    assert [r.spec_digest for r in seen.replicas] == ["one", "two", "version-7"]


def test_when_skyserve_tries_no_more() -> None:
    failed, old = replica("FAILED_INITIAL_DELAY"), replica("READY", 9, version=1)
    assert gave_up(service(failed))
    assert gave_up(service(failed, old)), "the spec before still serves"
    assert not gave_up(service(failed, replica("PENDING", 2))), "it replaces it"
    assert not gave_up(service(replica("FAILED_PROVISION")))
    assert not gave_up(service(replica("FAILED", version=1)))
    assert not gave_up(service())


def test_what_skypilot_says_of_a_start_is_passed_on() -> None:
    waiting = ServiceReplica(1, "PROVISIONING", 2, None, "waiting for queue admission")
    (seen,) = observed_service(service(waiting), DIGESTS, {}).replicas
    assert seen.detail == "its machine is being provisioned: waiting for queue admission"
