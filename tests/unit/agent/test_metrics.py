from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from agent.simulated.metrics import EngineMetrics, Gauges, render


def samples(page: str) -> dict[tuple[str, str], float]:
    """(name, the labels besides model and engine) -> value, as a Prometheus server reads it."""
    result = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("vllm:"):  # the process has none
                assert labels.pop("model_name") == 'my "model"\\'
                assert labels.pop("engine") == "0"
            more = ",".join(f"{key}={value}" for key, value in labels.items())
            result[sample.name, more] = sample.value
    return result


def test_a_prometheus_server_reads_what_was_counted() -> None:
    metrics = EngineMetrics(prompt_tokens=7, prefix_cache_hits=3)
    metrics.finished["stop"] = 2
    for seconds in (0.03, 0.04, 0.3, 9999.0):
        metrics.first_token.observe(seconds)
    metrics.inter_token.observe(0.02, times=5)
    page = render(
        metrics,
        Gauges(running=4, waiting=5, kv_cache_usage=0.25),
        model_name='my "model"\\',
        cache_config={"block_size": 16, "num_gpu_blocks": 10, "kv_cache_size_tokens": 160},
        started_at=1.5,
    )
    read = samples(page)
    assert read["vllm:num_requests_running", ""] == 4
    assert read["vllm:num_requests_waiting", ""] == 5
    assert read["vllm:kv_cache_usage_perc", ""] == 0.25
    assert read["vllm:prompt_tokens_total", ""] == 7
    assert read["vllm:prefix_cache_hits_total", ""] == 3
    assert read["vllm:num_preemptions_total", ""] == 0
    assert read["vllm:request_success_total", "finished_reason=stop"] == 2
    assert (
        read["vllm:cache_config_info", "block_size=16,num_gpu_blocks=10,kv_cache_size_tokens=160"]
        == 1
    )
    first = "vllm:time_to_first_token_seconds"
    assert read[f"{first}_bucket", "le=0.02"] == 0
    assert read[f"{first}_bucket", "le=0.04"] == 2  # a bound is part of its bucket
    assert read[f"{first}_bucket", "le=0.5"] == 3
    assert read[f"{first}_bucket", "le=+Inf"] == read[f"{first}_count", ""] == 4
    assert read["vllm:inter_token_latency_seconds_count", ""] == 5
    assert round(read["vllm:inter_token_latency_seconds_sum", ""], 6) == 0.1
