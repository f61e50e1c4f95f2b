from __future__ import annotations

import msgspec
import pytest

from agent.simulated.faults import FOREVER, Fault, FaultPlan, parse_assignments


def test_counts_run_out_and_forever_does_not() -> None:
    plan = FaultPlan(fail_next=2)
    seen = []
    for _ in range(4):
        fault, plan = plan.strike()
        seen.append(fault)
    assert seen == [Fault.FAIL, Fault.FAIL, None, None]

    plan = FaultPlan(hang_next=FOREVER)
    for _ in range(100):
        fault, plan = plan.strike()
        assert fault is Fault.HANG


def test_changes_leave_the_rest() -> None:
    plan = FaultPlan(fail_next=3, status=500).merged({"hang_next": 1})
    assert (plan.fail_next, plan.status, plan.hang_next) == (3, 500, 1)


@pytest.mark.parametrize(
    "wrong", [{"fail_nxt": 1}, {"status": 200}, {"hang_next": -2}, {"slow_factor": "fast"}]
)
def test_wrong_changes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        FaultPlan().merged(wrong)


def test_assignments_are_read_as_numbers_and_words() -> None:
    plan = parse_assignments(["fail_next=2", "status=500", "slow_factor=2.5", "message=no GPU"])
    assert plan == FaultPlan(fail_next=2, status=500, slow_factor=2.5, message="no GPU")


@pytest.mark.parametrize("wrong", ["fail_next", "nothing=1", "fail_next=often", "status=42"])
def test_wrong_assignments_say_what_is_wrong(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"fail_next|status"):
        parse_assignments([wrong])
