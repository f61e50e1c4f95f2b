"""Which replicas are kept out, from what requests and probes say of them.

One state machine a replica, pure: time is passed in, nothing is measured here. A replica is ejected
after failures in a row, or at once when nothing listens there any more; for longer each time. When
its time is over it is half open: one request at a time tries it, and one success closes the
breaker. An engine's Retry-After keeps it out for as long as it says. At most a share of a function's
replicas is kept out on suspicion: beyond that more harm comes from ejecting than from trying
(panic). Those that are certainly dead stay out, unless all are. Not here: probing (probes), or the
pick.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from router.core.snapshot import Candidate

BreakerState = Literal["closed", "open", "half-open"]
Failure = Literal["refused", "failed", "timeout", "probe"]
"""refused: no connection, or told that it shuts down. probe: its health check says no."""

FAILURES_IN_A_ROW: Final = 3
FIRST_EJECTION_S: Final = 1.0
MAX_EJECTION_S: Final = 60.0
MAX_RETRY_AFTER_S: Final = 30.0
"""Longest that an engine can keep itself out with one answer."""
PANIC_SHARE: Final = 0.5
"""Of a function's replicas; when more are out, none is."""


@dataclass(slots=True)
class Breaker:
    """What is known of one replica. A replica without one has never failed."""

    failures: int = 0
    """In a row."""
    ejections: int = 0
    """In a row: each is twice as long as the one before."""
    until: float = 0.0
    """Out until then, in the seconds of whoever passes the time."""
    trying: bool = False
    """Half open, and its one trial is under way."""
    busy_until: float = 0.0
    """The engine itself asked not to be called before."""
    dead: bool = False
    """Nothing listens there, it is shutting down, or its own health check says no."""

    def state(self, now: float) -> BreakerState:
        if not self.ejections:
            return "closed"
        return "open" if now < self.until else "half-open"

    def admits(self, now: float) -> bool:
        """Whether a request may be sent there."""
        if now < self.busy_until:
            return False
        state = self.state(now)
        return state == "closed" or (state == "half-open" and not self.trying)

    def failed(self, now: float, failure: Failure) -> None:
        """A request or probe failed in a way that is the replica's fault."""
        half_open = self.state(now) == "half-open"
        self.trying = False
        self.failures += 1
        self.dead = failure in ("refused", "probe")
        if half_open or self.dead or self.failures >= FAILURES_IN_A_ROW:
            if self.state(now) == "open":
                return  # others that were under way when it was ejected
            self.until = now + min(MAX_EJECTION_S, FIRST_EJECTION_S * 2**self.ejections)
            self.ejections = min(self.ejections + 1, 10)
            self.failures = 0

    def succeeded(self) -> None:
        """It answered: whatever came before counts no more."""
        self.failures = self.ejections = 0
        self.until = self.busy_until = 0.0
        self.trying = self.dead = False

    def probed(self) -> None:
        """Its health check says yes: enough for one that was dead, not for one that fails requests.

        A paused vLLM, or one that shuts down, answers its health check as if nothing were.
        """
        if self.dead:
            self.succeeded()

    def asked_for_rest(self, now: float, seconds: float) -> None:
        """It answered that it is full, and when to come again."""
        self.trying = False
        self.busy_until = max(self.busy_until, now + min(seconds, MAX_RETRY_AFTER_S))

    @property
    def is_new(self) -> bool:
        """Nothing is remembered: it may be forgotten."""
        return not (self.failures or self.ejections or self.busy_until or self.trying)


def kept_out(
    candidates: Iterable[Candidate], breakers: Mapping[str, Breaker], now: float
) -> frozenset[str]:
    """Ids of candidates that should not be tried; none of them in panic."""
    if not breakers:
        return frozenset()
    every = [c.id for c in candidates]
    out = [r for r in every if (b := breakers.get(r)) is not None and not b.admits(now)]
    if len(out) > len(every) * PANIC_SHARE:
        out = [r for r in out if breakers[r].dead]
        if len(out) == len(every):
            return frozenset()
    return frozenset(out)
