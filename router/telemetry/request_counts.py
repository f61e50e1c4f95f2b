"""Counters and histograms of finished requests, kept as plain numbers.

A request costs a few dictionary look-ups. Not here: what they are called outside (metrics).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from router.records import RequestRecord

_SECONDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160,
)  # fmt: skip
_FINE: Final = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1,
)  # fmt: skip
_MAX_SERIES: Final = 10_000


class Histogram:
    """Counts by bucket; bounds are in seconds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def cumulative(self) -> list[tuple[str, float]]:
        total = 0
        out = []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            out.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        return out


class Timings:
    """Histograms of one function and operation."""

    __slots__ = ("between", "duration", "first", "overhead")

    def __init__(self) -> None:
        self.duration = Histogram(_SECONDS)
        self.first = Histogram(_SECONDS)
        self.between = Histogram(_FINE)
        self.overhead = Histogram(_FINE)

    def add(self, record: RequestRecord) -> None:
        """Written out four times: it is part of every request."""
        started = record.started
        histogram, value = self.duration, record.ended - started
        histogram.counts[bisect_left(_SECONDS, value)] += 1
        histogram.sum += value
        if record.dispatched:
            histogram, value = self.overhead, record.dispatched - started
            histogram.counts[bisect_left(_FINE, value)] += 1
            histogram.sum += value
        if record.first_body:
            histogram, value = self.first, record.first_body - started
            histogram.counts[bisect_left(_SECONDS, value)] += 1
            histogram.sum += value
            if record.chunks > 1:
                value = (record.last_body - record.first_body) / (record.chunks - 1)
                histogram = self.between
                histogram.counts[bisect_left(_FINE, value)] += 1
                histogram.sum += value


class RequestCounts:
    """Of one process, since it began."""

    def __init__(self, *, tenants: bool) -> None:
        self._tenants = tenants
        self.requests: dict[tuple[str, str, str, str, int], int] = {}
        """Function, tenant (or nothing), operation, outcome, status -> how many."""
        self.timings: dict[tuple[str, str], Timings] = {}
        """By function and operation."""
        self.retries: dict[str, int] = {}
        self.refusals: dict[str, int] = {}
        self.request_bytes = 0
        self.response_bytes = 0

    def finished(self, record: RequestRecord) -> None:
        """Counts one request."""
        key = (
            record.function,
            record.tenant if self._tenants else "",
            record.operation,
            record.outcome,
            record.status,
        )
        if key in self.requests:
            self.requests[key] += 1
        elif len(self.requests) < _MAX_SERIES:
            self.requests[key] = 1
        self.request_bytes += record.request_bytes
        self.response_bytes += record.response_bytes
        if record.code:
            self.refusals[record.code] = self.refusals.get(record.code, 0) + 1
        if not record.function:
            return
        if record.attempts > 1:
            self.retries[record.function] = (
                self.retries.get(record.function, 0) + record.attempts - 1
            )
        which = (record.function, record.operation)
        timings = self.timings.get(which)
        if timings is None:
            timings = self.timings[which] = Timings()
        timings.add(record)
