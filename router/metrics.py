"""What Prometheus reads: counters and histograms kept as plain numbers, rendered when scraped.

A request costs a few dictionary look-ups; names and labels are made at scrape time. Labels are
bounded: functions and replicas come from the table, and names that clients invent never become one.
Names follow OpenTelemetry's `gen_ai.*` where it has one. Not here: the log (access_log).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Final

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from router.core.pick import effective_policy
from router.records import RequestRecord
from router.state import RouterState

_SECONDS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160,
)  # fmt: skip
_FINE: Final = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1,
)  # fmt: skip
_MAX_SERIES: Final = 10_000


class _Histogram:
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


class _Timings:
    """Histograms of one function and operation."""

    __slots__ = ("between", "duration", "first", "overhead")

    def __init__(self) -> None:
        self.duration = _Histogram(_SECONDS)
        self.first = _Histogram(_SECONDS)
        self.between = _Histogram(_FINE)
        self.overhead = _Histogram(_FINE)

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


class Metrics(Collector):
    """Fed with finished requests; reads the rest from the router's state when it is scraped."""

    def __init__(self, state: RouterState, *, tenants: bool) -> None:
        self._state = state
        self._tenants = tenants
        self._requests: dict[tuple[str, str, str, str, int], int] = {}
        self._timings: dict[tuple[str, str], _Timings] = {}
        self._retries: dict[str, int] = {}
        self._refusals: dict[str, int] = {}
        self._request_bytes = 0
        self._response_bytes = 0
        self.table_refusals: dict[str, int] = {}
        """Reason -> tables from Redis that were not believed."""
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def finished(self, record: RequestRecord) -> None:
        """Counts one request."""
        key = (
            record.function,
            record.tenant if self._tenants else "",
            record.operation,
            record.outcome,
            record.status,
        )
        if key in self._requests:
            self._requests[key] += 1
        elif len(self._requests) < _MAX_SERIES:
            self._requests[key] = 1
        self._request_bytes += record.request_bytes
        self._response_bytes += record.response_bytes
        if record.code:
            self._refusals[record.code] = self._refusals.get(record.code, 0) + 1
        if not record.function:
            return
        if record.attempts > 1:
            self._retries[record.function] = (
                self._retries.get(record.function, 0) + record.attempts - 1
            )
        which = (record.function, record.operation)
        timings = self._timings.get(which)
        if timings is None:
            timings = self._timings[which] = _Timings()
        timings.add(record)

    def collect(self) -> Iterator[Metric]:
        yield from self._of_requests()
        yield from self._of_timings()
        yield from self._of_state()

    def _of_requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "detoserve_router_requests",
            "Finished requests.",
            labels=["function", "tenant", "operation", "outcome", "status"],
        )
        for (function, tenant, operation, outcome, status), count in self._requests.items():
            requests.add_metric([function, tenant, operation, outcome, str(status)], count)
        yield requests
        refusals = CounterMetricFamily(
            "detoserve_router_refusals", "Answers of the router itself, by code.", labels=["code"]
        )
        for code, count in self._refusals.items():
            refusals.add_metric([code], count)
        yield refusals
        retries = CounterMetricFamily(
            "detoserve_router_retries", "Attempts after the first.", labels=["function"]
        )
        for function, count in self._retries.items():
            retries.add_metric([function], count)
        yield retries
        yield CounterMetricFamily(
            "detoserve_router_request_bytes", "Bytes of request bodies.", self._request_bytes
        )
        yield CounterMetricFamily(
            "detoserve_router_response_bytes", "Bytes of answers' bodies.", self._response_bytes
        )
        tables = CounterMetricFamily(
            "detoserve_router_tables_refused", "Tables not believed.", labels=["reason"]
        )
        for reason, count in self.table_refusals.items():
            tables.add_metric([reason], count)
        yield tables

    def _of_timings(self) -> Iterator[Metric]:
        labels = ["gen_ai_request_model", "gen_ai_operation_name"]
        duration = HistogramMetricFamily(
            "gen_ai_server_request_duration_seconds", "Whole requests.", labels=labels
        )
        first = HistogramMetricFamily(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request read to the first bytes of the answer's body.",
            labels=labels,
        )
        between = HistogramMetricFamily(
            "detoserve_router_time_between_chunks_seconds",
            "Mean of each answer; a chunk may carry several tokens.",
            labels=labels,
        )
        overhead = HistogramMetricFamily(
            "detoserve_router_overhead_seconds",
            "From the request's head read to its dispatch, the client's sending of a body included.",
            labels=labels,
        )
        for (function, operation), timings in self._timings.items():
            for family, histogram in (
                (duration, timings.duration),
                (first, timings.first),
                (between, timings.between),
                (overhead, timings.overhead),
            ):
                family.add_metric([function, operation], histogram.cumulative(), histogram.sum)
        yield from (duration, first, between, overhead)

    def _of_state(self) -> Iterator[Metric]:
        state = self._state
        flights = GaugeMetricFamily(
            "detoserve_router_in_flight", "Requests on each replica.", labels=["replica"]
        )
        for replica, count in state.in_flight.by_replica.items():
            flights.add_metric([replica], count)
        yield flights
        yield GaugeMetricFamily(
            "detoserve_router_requests_in_flight",
            "Requests in this process.",
            state.in_flight.total,
        )
        yield GaugeMetricFamily(
            "detoserve_router_draining", "1 after SIGTERM.", int(state.draining)
        )
        table = state.snapshot
        yield GaugeMetricFamily(
            "detoserve_router_table_generation",
            "Generation served; 0: none yet.",
            table.generation if table else 0,
        )
        if table is None:
            return
        yield GaugeMetricFamily(
            "detoserve_router_table_age_seconds",
            "Since the table was last known to be current. Keys are refused past its limit.",
            max(0.0, time.time() - state.fresh_at),
        )
        replicas = GaugeMetricFamily(
            "detoserve_router_replicas",
            "Replicas in the table.",
            labels=["function", "state"],
        )
        counts: dict[tuple[str, str], int] = {}
        for candidate in table.replicas.values():
            which = candidate.function, "draining" if candidate.draining else "ready"
            counts[which] = counts.get(which, 0) + 1
        for (function, replica_state), count in counts.items():
            replicas.add_metric([function, replica_state], count)
        yield replicas
        breakers = GaugeMetricFamily(
            "detoserve_router_breaker_open",
            "1 for replicas that are kept out, 0.5 for those on trial.",
            labels=["replica"],
        )
        now = perf_counter()
        for replica, breaker in state.breakers.items():
            value = {"closed": 0.0, "half-open": 0.5, "open": 1.0}[breaker.state(now)]
            breakers.add_metric([replica], value)
        yield breakers
        policies = GaugeMetricFamily(
            "detoserve_router_policy",
            "1 for what each function's policy is, and acts as.",
            labels=["function", "policy", "effective"],
        )
        for item in table.table.functions:
            name = item.policy.name
            policies.add_metric([item.name, name, effective_policy(name)], 1)
        yield policies
