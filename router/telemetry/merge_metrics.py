"""The metrics of several workers as those of one router.

Counters and histograms add up. So do gauges that count; of the others the worst is shown: the oldest
table, the lowest generation. Pure text in, text out. Not here: asking the workers (workers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_ADDED: Final = frozenset(
    {
        "detoserve_router_in_flight",
        "detoserve_router_requests_in_flight",
        "detoserve_router_queue_requests",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_open_fds",
    }
)
_LOWEST: Final = frozenset({"detoserve_router_table_generation", "process_start_time_seconds"})


def _how(family: Metric) -> Callable[[float, float], float]:
    if family.type in ("counter", "histogram") or family.name in _ADDED:
        return lambda one, other: one + other
    return min if family.name in _LOWEST else max


class _Merged(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def merge(texts: Sequence[str]) -> bytes:
    """Prometheus' text format of all of them together."""
    families: dict[str, Metric] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            combine = _how(family)
            known = values.setdefault(family.name, {})
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                key = sample.name, tuple(sorted(sample.labels.items()))
                known[key] = combine(known[key], sample.value) if key in known else sample.value
    for name, family in families.items():
        for (sample_name, labels), value in values[name].items():
            family.add_sample(sample_name, dict(labels), value)
    registry = CollectorRegistry()
    registry.register(_Merged(families.values()))
    return generate_latest(registry)
