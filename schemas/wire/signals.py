"""What routers see of every deployment's load and health: what replicas are counted and canaries judged by.

Counters run from a router's start and only grow, so that whoever misses a message is right again with
the next; a reader takes differences. Times to first token are counted in buckets of 10 %.
Never here: prompts, tenants or keys.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

import msgspec

from schemas.wire.events import Event

_SHORTEST_S: Final = 0.001
_RATIO: Final = 1.1
BUCKETS: Final = 136
"""The last one holds all from about seven minutes on."""


class ArmSignals(msgspec.Struct, frozen=True, array_like=True):
    """One template of one deployment in one cluster, as one router sees it."""

    function: str
    deployment: str
    cluster: str
    spec_digest: str
    attempts: int = 0
    """Requests sent to one of its replicas that have ended, well or not; retries count again."""
    failed: int = 0
    """Of those: the replica did not answer, answered 5xx, or broke off."""
    ttft: dict[int, int] = msgspec.field(default_factory=dict)
    """Bucket -> answers whose first byte came within it. Buckets without any are left out."""
    input_tokens: int = 0
    cached_tokens: int = 0
    """Of the input tokens, as engines say."""
    in_flight: int = 0
    """Now."""
    queued: int = 0
    """Now: of those in flight from anybody, the ones that wait inside engines, as engines say."""
    kv_usage: float | None = None
    """Now: mean over the replicas that say, 0 to 1; None where none does."""


class FunctionSignals(msgspec.Struct, frozen=True, array_like=True):
    """One function, as one router sees it."""

    function: str
    arrived: int = 0
    """Requests for it that have ended, whether or not a replica was there."""
    waiting: int = 0
    """Now: held because no replica is there or has room."""


class RouterSignals(Event, frozen=True, kw_only=True):
    """One message of the channel `signals`, every second, and at once when requests begin to wait."""

    router: str
    """One router process, from its start to its end."""
    seq: int
    """Grows by one with each message."""
    arms: tuple[ArmSignals, ...] = ()
    """Whole counters of those that changed since the message before; all of them in a `full` one."""
    functions: tuple[FunctionSignals, ...] = ()
    full: bool = False


def ttft_bucket(seconds: float) -> int:
    """The bucket of a time to first token: 0 up to 1 ms, then each reaches 10 % further."""
    return bisect_left(_BOUNDS_S, seconds, 0, BUCKETS - 1)


def ttft_bound_s(bucket: int) -> float:
    """The longest time that a bucket holds."""
    return _SHORTEST_S * _RATIO**bucket


_BOUNDS_S: Final = [ttft_bound_s(bucket) for bucket in range(BUCKETS)]
