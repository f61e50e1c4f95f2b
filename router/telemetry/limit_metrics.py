"""What Prometheus reads of limits and queues.

Not here: how many requests were refused, and why (metrics, by code).
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.limits.limiter import Limiter
from router.limits.queue import Queues


class LimitMetrics(Collector):
    """Reads them when it is scraped."""

    def __init__(self, limiter: Limiter, queues: Queues) -> None:
        self._limiter = limiter
        self._queues = queues

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "detoserve_router_limit_questions",
            "Questions asked of Redis for limits and budgets.",
            self._limiter.round_trips,
        )
        yield GaugeMetricFamily(
            "detoserve_router_limits_apart",
            "1 while this process goes by its own part of every limit, for want of Redis.",
            int(self._limiter.enabled and not self._limiter.is_shared),
        )
        waiting = GaugeMetricFamily(
            "detoserve_router_queue_requests",
            "Requests that wait for a replica with room.",
            labels=["function"],
        )
        for function, count in self._queues.by_function().items():
            waiting.add_metric([function], count)
        yield waiting
