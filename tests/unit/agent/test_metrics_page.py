"""What /metrics of each engine says."""

from __future__ import annotations

import pytest

from agent.core.metrics import PageInvalid, Reading, read_metrics
from agent.simulated.metrics import EngineMetrics, Gauges, render

VLLM_0_32 = """\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 11234.0
process_start_time_seconds 1.76391e+09
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 2.0
vllm:num_requests_running{engine="1",model_name="tiny"} 1.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="tiny"} 0.75
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0",num_gpu_blocks="140",kv_cache_size_tokens="4480"} 1.0
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="1",num_gpu_blocks="140",kv_cache_size_tokens="4480"} 1.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="tiny"} 0.0
"""
SGLANG = """\
sglang:num_running_reqs{model_name="llama"} 7.0
sglang:num_queue_reqs{model_name="llama"} 3.0
sglang:token_usage{model_name="llama"} 0.28
sglang:max_total_num_tokens{model_name="llama"} 409600.0
"""
TRITON = """\
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 5
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 3
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 1000
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 250
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
"""


def test_vllm_with_two_ranks() -> None:
    assert read_metrics(VLLM_0_32) == Reading(
        running=3,
        waiting=4,
        kv_usage=0.5,
        capacity_blocks=280,
        block_tokens=32,
        started_at=1.76391e9,
    )


def test_sglang() -> None:
    assert read_metrics(SGLANG) == Reading(
        running=7, waiting=3, kv_usage=0.28, capacity_blocks=409_600, block_tokens=1
    )


def test_triton() -> None:
    assert read_metrics(TRITON) == Reading(
        running=3, waiting=2, kv_usage=0.25, capacity_blocks=1000, block_tokens=64
    )
    assert read_metrics('nv_inference_pending_request_count{model="m"} 4\n') == Reading(waiting=4)


def test_the_simulated_engine_s_own_page() -> None:
    page = render(
        EngineMetrics(),
        Gauges(running=1, waiting=2, kv_cache_usage=0.5),
        model_name="a",
        cache_config={"block_size": 16, "num_gpu_blocks": 100},
        started_at=12.5,
    )
    assert read_metrics(page) == Reading(1, 2, 0.5, 100, 16, 12.5)


def test_blocks_that_are_not_given_follow_from_tokens() -> None:
    page = VLLM_0_32.replace('num_gpu_blocks="140"', 'num_gpu_blocks="None"')
    assert read_metrics(page).capacity_blocks == 280


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-3"])
def test_numbers_that_are_none_count_as_nothing(value: str) -> None:
    page = VLLM_0_32.replace("0.25", value).replace("0.75", value).replace("} 4.0", f"}} {value}")
    reading = read_metrics(page)
    assert (reading.waiting, reading.kv_usage) == (0, 0.0)


@pytest.mark.parametrize("page", ["", "<html></html>", "up 1\n", "vllm:num_requests_running{ 1\n"])
def test_another_page_is_refused(page: str) -> None:
    with pytest.raises(PageInvalid):
        read_metrics(page)
