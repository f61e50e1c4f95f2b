"""What Prometheus reads: plain numbers, rendered when scraped.

Names and labels are made at scrape time. Labels are bounded: functions and replicas come from the table,
and names that clients invent never become one. Names follow OpenTelemetry's `gen_ai.*` where it has
one. Not here: counting requests (request_counts), or the log (access_log).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from time import perf_counter

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from router.core.pick import effective_policy
from router.state import RouterState
from router.telemetry.request_counts import RequestCounts


class Metrics(Collector):
    """Reads what was counted, and the router's state, when it is scraped."""

    def __init__(self, state: RouterState, *, tenants: bool) -> None:
        self._state = state
        self.counts = RequestCounts(tenants=tenants)
        self.table_refusals: dict[str, int] = {}
        """Reason -> tables from Redis that were not believed."""
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

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
        for (function, tenant, operation, outcome, status), count in self.counts.requests.items():
            requests.add_metric([function, tenant, operation, outcome, str(status)], count)
        yield requests
        refusals = CounterMetricFamily(
            "detoserve_router_refusals", "Answers of the router itself, by code.", labels=["code"]
        )
        for code, count in self.counts.refusals.items():
            refusals.add_metric([code], count)
        yield refusals
        retries = CounterMetricFamily(
            "detoserve_router_retries", "Attempts after the first.", labels=["function"]
        )
        for function, count in self.counts.retries.items():
            retries.add_metric([function], count)
        yield retries
        yield CounterMetricFamily(
            "detoserve_router_request_bytes", "Bytes of request bodies.", self.counts.request_bytes
        )
        yield CounterMetricFamily(
            "detoserve_router_response_bytes",
            "Bytes of answers' bodies.",
            self.counts.response_bytes,
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
        for (function, operation), timings in self.counts.timings.items():
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
