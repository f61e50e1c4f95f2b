"""What Prometheus reads of usage: tokens by function, and records on their way to the ledger.

No tenant's name: who used how much is the ledger's to say. Not here: counting (meter).
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.core.shapes import Usage
from router.usage.stream import UsageStream


class UsageMetrics(Collector):
    """Fed with every request's usage; reads the rest when it is scraped."""

    def __init__(self, stream: UsageStream | None) -> None:
        self._stream = stream
        self._used: dict[str, list[int]] = {}
        """Function -> tokens of input, of that cached, of output."""

    def used(self, function: str, usage: Usage) -> None:
        known = self._used.get(function)
        if known is None:
            known = self._used[function] = [0, 0, 0]
        known[0] += usage.input_tokens
        known[1] += usage.cached_tokens
        known[2] += usage.output_tokens

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "detoserve_router_tokens",
            "Tokens that engines counted; the cached are among the input.",
            labels=["function", "type"],
        )
        for function, used in self._used.items():
            for kind, count in zip(("input", "cached", "output"), used, strict=True):
                tokens.add_metric([function, kind], count)
        yield tokens
        if self._stream is not None:
            yield GaugeMetricFamily(
                "detoserve_router_usage_kept",
                "Records of usage that are not known to be in the ledger.",
                self._stream.kept,
            )
            yield CounterMetricFamily(
                "detoserve_router_usage_lost",
                "Requests whose usage found no room in the journal.",
                self._stream.lost,
            )
