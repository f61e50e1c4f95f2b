"""What the engine counts, and its rendering as Prometheus text under vLLM's names.

Gauges are read from the scheduler when rendered. Not here: when things are counted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
FINISH_REASONS = ("stop", "length", "abort", "error")


class Histogram:
    """Counts of observations at or below each bound, as Prometheus has them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def render(self, name: str, labels: str, help_text: str) -> list[str]:
        lines = [f"# HELP {name} {help_text}", f"# TYPE {name} histogram"]
        running = 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            running += count
            edge = "+Inf" if bound is None else repr(float(bound))
            lines.append(f'{name}_bucket{{{labels},le="{edge}"}} {float(running)}')
        lines.append(f"{name}_count{{{labels}}} {float(running)}")
        lines.append(f"{name}_sum{{{labels}}} {self.total}")
        return lines


@dataclass(slots=True)
class EngineMetrics:
    """Counters since the start. Prefix cache queries and hits are in tokens, as vLLM's are."""

    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))
    first_token: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN_BUCKETS_S))
    inter_token: Histogram = field(default_factory=lambda: Histogram(_INTER_TOKEN_BUCKETS_S))
    queue_time: Histogram = field(default_factory=lambda: Histogram(_REQUEST_BUCKETS_S))
    e2e_latency: Histogram = field(default_factory=lambda: Histogram(_REQUEST_BUCKETS_S))


@dataclass(frozen=True, slots=True)
class Gauges:
    """The state of the moment. `kv_cache_usage` is the pinned share of all blocks, 0 to 1."""

    running: int
    waiting: int
    kv_cache_usage: float


def render(
    metrics: EngineMetrics,
    gauges: Gauges,
    *,
    model_name: str,
    cache_config: Mapping[str, int],
    started_at: float,
) -> str:
    """The whole /metrics page. `cache_config` becomes the labels of vllm:cache_config_info.

    `started_at`: Unix seconds.
    """
    labels = f'engine="0",model_name="{_escape(model_name)}"'
    lines: list[str] = []

    def add(name: str, kind: str, help_text: str, samples: Mapping[str, float]) -> None:
        """`samples`: labels beyond the common ones, with a leading comma -> value."""
        lines.extend((f"# HELP vllm:{name} {help_text}", f"# TYPE vllm:{name} {kind}"))
        lines.extend(f"vllm:{name}{{{labels}{more}}} {float(v)}" for more, v in samples.items())

    for name, help_text, value in (
        ("num_requests_running", "Requests in execution.", gauges.running),
        ("num_requests_waiting", "Requests waiting.", gauges.waiting),
        ("kv_cache_usage_perc", "KV cache in use; 1 is all of it.", gauges.kv_cache_usage),
    ):
        add(name, "gauge", help_text, {"": value})
    for name, help_text, value in (
        ("prefix_cache_queries_total", "Tokens looked up.", metrics.prefix_cache_queries),
        ("prefix_cache_hits_total", "Tokens found.", metrics.prefix_cache_hits),
        ("prompt_tokens_total", "Prompt tokens.", metrics.prompt_tokens),
        ("prompt_tokens_cached_total", "Prompt tokens cached.", metrics.prompt_tokens_cached),
        ("generation_tokens_total", "Generated tokens.", metrics.generation_tokens),
        ("num_preemptions_total", "Preemptions; the simulated engine has none.", 0),
    ):
        add(name, "counter", help_text, {"": value})
    finished = {f',finished_reason="{key}"': value for key, value in metrics.finished.items()}
    add("request_success_total", "counter", "Finished requests.", finished)
    info = "".join(f',{key}="{value}"' for key, value in cache_config.items())
    add("cache_config_info", "gauge", "Configuration of the cache.", {info: 1})
    for name, help_text, histogram in (
        ("time_to_first_token", "Time to first token.", metrics.first_token),
        ("inter_token_latency", "Time between tokens.", metrics.inter_token),
        ("request_queue_time", "Time in the waiting phase.", metrics.queue_time),
        ("e2e_request_latency", "Time from arrival to the end.", metrics.e2e_latency),
    ):
        lines.extend(histogram.render(f"vllm:{name}_seconds", labels, help_text))
    started = "process_start_time_seconds"
    lines.append(f"# HELP {started} Start time of the process since unix epoch in seconds.")
    lines.extend((f"# TYPE {started} gauge", f"{started} {started_at}"))
    return "\n".join(lines) + "\n"


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
