"""When a failed attempt may be made again elsewhere: only before the first byte, under a budget.

Pure: time is passed in. Not here: doing it (proxy).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

RETRYABLE_STATUS: Final = frozenset({429, 502, 503})
SHUTTING_DOWN: Final = b"cannot schedule new futures after shutdown"
"""In the body of the 500 with which a vLLM that drains answers new requests."""


def is_retryable(status: int, body: bytes = b"") -> bool:
    """Whether another replica might answer better. `body` matters for 500 only."""
    return status in RETRYABLE_STATUS or (status == 500 and SHUTTING_DOWN in body)


@dataclass(slots=True)
class RetryBudget:
    """Retries may add a share of the requests of the last seconds, and a few regardless.

    Two half windows approximate a sliding one; nothing is allocated per request.
    """

    window_s: float = 10.0
    reserve: int = 10
    """Retries a window that are always allowed, so that a quiet function can retry at all."""
    _start: float = 0.0
    _requests: int = 0
    _retries: int = 0
    _previous_requests: int = 0
    _previous_retries: int = 0

    def _turn(self, now: float) -> None:
        half = self.window_s / 2
        if now - self._start < half:
            return
        recent = now - self._start < 2 * half
        self._previous_requests = self._requests if recent else 0
        self._previous_retries = self._retries if recent else 0
        self._requests = self._retries = 0
        self._start = now

    def request(self, now: float) -> None:
        """Counts a request that a client sent."""
        if now - self._start >= self.window_s / 2:
            self._turn(now)
        self._requests += 1

    def spend(self, now: float, percent: float) -> bool:
        """Counts and allows one more retry, unless the budget is used up."""
        self._turn(now)
        requests = self._requests + self._previous_requests
        retries = self._retries + self._previous_retries
        if retries >= self.reserve + requests * percent / 100:
            return False
        self._retries += 1
        return True
