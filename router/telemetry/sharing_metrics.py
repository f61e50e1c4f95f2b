"""What sharing with other routers says of itself to Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from router.fleet.sharing import Sharing


class SharingMetrics(Collector):
    """Read when it is scraped."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing

    def collect(self) -> Iterator[Metric]:
        sharing = self._sharing
        yield GaugeMetricFamily(
            "detoserve_router_peers", "Other routers that share load with this.", len(sharing.peers)
        )
        messages = CounterMetricFamily(
            "detoserve_router_shared_messages",
            "Messages about load: sent, received, missed (of others, never came), refused (unreadable).",
            labels=["what"],
        )
        messages.add_metric(["sent"], sharing.sent)
        messages.add_metric(["received"], sharing.received)
        messages.add_metric(["missed"], sharing.peers.gaps)
        messages.add_metric(["refused"], sharing.refused)
        yield messages
        lost = CounterMetricFamily(
            "detoserve_router_shared_messages_lost",
            "Messages about load that did not leave this router, by channel.",
            labels=["channel"],
        )
        for channel, count in sharing.lost.items():
            lost.add_metric([channel], count)
        yield lost
