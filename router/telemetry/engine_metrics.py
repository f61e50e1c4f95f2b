"""What this router knows of engines' caches, for Prometheus: how far predictions came true, and by whose word.

Not here: requests (metrics).
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.fleet.brain import Brain
from router.fleet.engine_watch import ReportReader


class EngineMetrics(Collector):
    def __init__(self, brain: Brain, reader: ReportReader) -> None:
        self._brain = brain
        self._reader = reader

    def describe(self) -> list[Metric]:
        """Nothing is collected while this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        brain = self._brain
        gauges = {
            name: GaugeMetricFamily(f"detoserve_router_{name}", text, labels=["replica"])
            for name, text in (
                (
                    "cache_true_ratio",
                    "Share of predicted cached tokens that the engine had, of late.",
                ),
                ("cache_trust", "What a predicted cached token counts when requests are routed."),
                ("index_blocks", "Blocks of prompts that the replica is thought to hold."),
                ("engine_running", "Requests that run there, as the engine says."),
                ("engine_waiting", "Requests that wait there, as the engine says."),
                ("engine_kv_usage", "Share of its cache that running requests hold."),
                ("engine_capacity_tokens", "Tokens that its cache holds."),
                ("engine_events", "1 where an agent hears all of its KV events."),
            )
        }
        for replica, slot in brain.slots.items():
            label = [replica]
            share = brain.states.trust.share_come_true(slot)
            if share is not None:
                gauges["cache_true_ratio"].add_metric(label, share)
            gauges["cache_trust"].add_metric(label, brain.states.trust.factors.get(slot, 1.0))
            gauges["index_blocks"].add_metric(label, brain.states.index.held(slot))
            report = brain.reports.last(slot)
            if report is not None:
                gauges["engine_running"].add_metric(label, report.running)
                gauges["engine_waiting"].add_metric(label, report.waiting)
                gauges["engine_kv_usage"].add_metric(label, report.kv_usage)
                size = report.capacity_blocks * report.block_tokens
                gauges["engine_capacity_tokens"].add_metric(label, size)
                gauges["engine_events"].add_metric(label, int(report.events))
        yield from gauges.values()
        reports = CounterMetricFamily(
            "detoserve_router_engine_reports",
            "Reports of engines; counted as believed, or as why not.",
            labels=["outcome"],
        )
        for said, count in self._reader.counts.items():
            reports.add_metric([said or "believed"], count)
        yield reports
        yield CounterMetricFamily(
            "detoserve_router_caches_forgotten",
            "How often a replica was taken to hold nothing any more, on an engine's word.",
            brain.reports.cleared,
        )
