"""Misbehaviour on demand: which of the next requests fail, hang, or die in the middle.

Not here: carrying it out (openai_api, server). Faults strike the inference endpoints only, except
`health_status`, which is /health's answer, and `exit`, which ends the process.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec

FOREVER = -1

Count = Annotated[int, msgspec.Meta(ge=FOREVER)]


class Fault(enum.Enum):
    """What is to happen to one request."""

    HANG = "hang"
    FAIL = "fail"
    DIE_MID_STREAM = "die_mid_stream"
    STALL_MID_STREAM = "stall_mid_stream"


class FaultPlan(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Counts say how many of the next requests are struck; -1 is all of them, until reset.

    `hang_next`: accepted, never answered. `fail_next`: answered with `status` (and `message`, and
    Retry-After when `retry_after_s` is given). `die_mid_stream_next`: `after_chunks` chunks, then
    the connection is reset. `stall_mid_stream_next`: the same, but then silence. `slow_factor`
    multiplies the time of every step. `health_status`: what /health answers instead of 200.
    `exit`: the process ends at once with that code, answering nobody.
    """

    hang_next: Count = 0
    fail_next: Count = 0
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] = 503
    message: str = "simulated fault"
    retry_after_s: Annotated[int, msgspec.Meta(ge=0)] | None = None
    die_mid_stream_next: Count = 0
    stall_mid_stream_next: Count = 0
    after_chunks: Annotated[int, msgspec.Meta(ge=0)] = 3
    slow_factor: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    health_status: Annotated[int, msgspec.Meta(ge=200, le=599)] | None = None
    exit: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None

    def merged(self, changes: dict[str, Any]) -> FaultPlan:
        """The plan with some fields replaced.

        Raises:
            msgspec.ValidationError: for an unknown field or a value out of range.
        """
        return msgspec.convert(msgspec.structs.asdict(self) | changes, FaultPlan)

    def strike(self) -> tuple[Fault | None, FaultPlan]:
        """What happens to the next request, and the plan that is left after it."""
        for fault in Fault:
            name = f"{fault.value}_next"
            count: int = getattr(self, name)
            if count == FOREVER:
                return fault, self
            if count:
                return fault, msgspec.structs.replace(self, **{name: count - 1})
        return None, self


def parse_assignments(assignments: list[str]) -> FaultPlan:
    """A plan from `fail_next=2`-like words, as flags give them.

    Raises:
        ValueError: naming the word that is wrong and what would be right.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator or name not in FaultPlan.__struct_fields__:
            raise ValueError(
                f"{assignment!r} is no fault; write NAME=VALUE with one of"
                f" {', '.join(FaultPlan.__struct_fields__)}"
            )
        changes[name] = value
    try:
        return msgspec.convert(changes, FaultPlan, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"faults {' '.join(assignments)}: {error}") from error
