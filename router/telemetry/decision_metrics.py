"""What sessions, shadows and recorded decisions say of themselves to Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from router.decisions import DecisionLog
from router.session_store import SessionStore
from router.shadow import Shadows


class DecisionMetrics(Collector):
    """Read when it is scraped."""

    def __init__(self, sessions: SessionStore, shadows: Shadows, decisions: DecisionLog) -> None:
        self._sessions = sessions
        self._shadows = shadows
        self._decisions = decisions

    def collect(self) -> Iterator[Metric]:
        sessions, shadows, decisions = self._sessions, self._shadows, self._decisions
        yield GaugeMetricFamily(
            "detoserve_router_sessions", "Sessions whose replica is known.", len(sessions.pins)
        )
        changes = CounterMetricFamily(
            "detoserve_router_session_changes",
            "Sessions that moved to another replica, were evicted for room, or that other routers were "
            "not told of.",
            labels=["what"],
        )
        changes.add_metric(["moved"], sessions.pins.moved)
        changes.add_metric(["evicted"], sessions.pins.evicted)
        changes.add_metric(["untold"], sessions.lost)
        yield changes
        recorded = CounterMetricFamily(
            "detoserve_router_decisions",
            "Decisions by what became of their records: recorded, or lost on the way to Redis.",
            labels=["what"],
        )
        recorded.add_metric(["recorded"], decisions.recorded)
        recorded.add_metric(["lost"], decisions.lost)
        yield recorded
        copies = CounterMetricFamily(
            "detoserve_router_shadow_requests",
            "Copies for shadow deployments, by what became of them.",
            labels=["function", "deployment", "outcome"],
        )
        for labels, count in shadows.counts.items():
            copies.add_metric(labels, count)
        yield copies
        first = SummaryMetricFamily(
            "detoserve_router_shadow_time_to_first_token_seconds",
            "Of copies, to the first bytes of the answer's body.",
            labels=["function", "deployment"],
        )
        for of, (count, seconds) in shadows.first_token_s.items():
            first.add_metric(of, count_value=count, sum_value=seconds)
        yield first
