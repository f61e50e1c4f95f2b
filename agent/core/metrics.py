"""What an engine's /metrics page says of its load: vLLM's names, SGLang's, and TensorRT-LLM's in Triton.

Only the lines that are wanted are parsed: a page has a thousand. Several processes behind one page
(data-parallel ranks) add up. Not here: asking for the page (scrape).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Final

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_STARTED: Final = "process_start_time_seconds"
_VLLM: Final = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_VLLM_USAGE: Final = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_VLLM_CONFIG: Final = "vllm:cache_config_info"
_SGLANG: Final = ("sglang:num_running_reqs", "sglang:num_queue_reqs")
_SGLANG_USAGE: Final = "sglang:token_usage"
_SGLANG_TOKENS: Final = "sglang:max_total_num_tokens"
_TRT_REQUESTS: Final = "nv_trt_llm_request_metrics"
_TRT_BLOCKS: Final = "nv_trt_llm_kv_cache_block_metrics"
_TRITON_PENDING: Final = "nv_inference_pending_request_count"
_WANTED: Final = (
    _STARTED, *_VLLM, *_VLLM_USAGE, _VLLM_CONFIG, *_SGLANG, _SGLANG_USAGE, _SGLANG_TOKENS,
    _TRT_REQUESTS, _TRT_BLOCKS, _TRITON_PENDING,
)  # fmt: skip


class PageInvalid(ValueError):
    """No metrics page of an engine known here; says what it lacks."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at an engine. 0 stands for what it does not say."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """0 to 1."""
    capacity_blocks: int = 0
    block_tokens: int = 0
    started_at: float = 0.0
    """Unix seconds at which the process started."""


def read_metrics(page: str) -> Reading:
    """The load in a page of Prometheus text.

    Raises:
        PageInvalid: it is no such page, or has none of the engines' names.
    """
    lines = "\n".join(line for line in page.splitlines() if line.startswith(_WANTED))
    samples: dict[str, list[Sample]] = {}
    try:
        for family in text_string_to_metric_families(lines + "\n"):
            for sample in family.samples:
                if isfinite(sample.value):
                    samples.setdefault(sample.name, []).append(sample)
    except (ValueError, IndexError, KeyError) as error:
        raise PageInvalid(f"its /metrics cannot be read: {type(error).__name__}") from None
    started = max((s.value for s in samples.get(_STARTED, ())), default=0.0)
    if any(name in samples for name in _VLLM):
        return _vllm(samples, started)
    if any(name in samples for name in _SGLANG):
        return _sglang(samples, started)
    if _TRT_REQUESTS in samples or _TRITON_PENDING in samples:
        return _triton(samples, started)
    raise PageInvalid("its /metrics has none of the names of vLLM, SGLang or Triton")


def _total(samples: Iterable[Sample]) -> int:
    return max(0, int(sum(s.value for s in samples)))


def _share(samples: Iterable[Sample]) -> float:
    values = [s.value for s in samples]
    return min(1.0, max(0.0, sum(values) / len(values))) if values else 0.0


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _vllm(samples: dict[str, list[Sample]], started: float) -> Reading:
    running, waiting = (_total(samples.get(name, ())) for name in _VLLM)
    usage = next((samples[name] for name in _VLLM_USAGE if name in samples), [])
    configs = [s.labels for s in samples.get(_VLLM_CONFIG, ())]
    blocks = sum(_number(c.get("num_gpu_blocks")) for c in configs)
    size = max((_number(c.get("block_size")) for c in configs), default=0)
    if not blocks and size:
        blocks = sum(_number(c.get("kv_cache_size_tokens")) for c in configs) // size
    return Reading(
        running=running,
        waiting=waiting,
        kv_usage=_share(usage),
        capacity_blocks=blocks,
        block_tokens=size,
        started_at=started,
    )


def _sglang(samples: dict[str, list[Sample]], started: float) -> Reading:
    running, waiting = (_total(samples.get(name, ())) for name in _SGLANG)
    tokens = _total(samples.get(_SGLANG_TOKENS, ()))
    return Reading(
        running=running,
        waiting=waiting,
        kv_usage=_share(samples.get(_SGLANG_USAGE, ())),
        capacity_blocks=tokens,
        block_tokens=1 if tokens else 0,
        started_at=started,
    )


def _triton(samples: dict[str, list[Sample]], started: float) -> Reading:
    requests = _by_label(samples.get(_TRT_REQUESTS, ()), "request_type")
    blocks = _by_label(samples.get(_TRT_BLOCKS, ()), "kv_cache_block_type")
    if requests:
        running = requests.get("scheduled", 0)
        waiting = requests.get("waiting", max(0, requests.get("active", 0) - running))
    else:
        running, waiting = 0, _total(samples.get(_TRITON_PENDING, ()))
    most = blocks.get("max", 0)
    return Reading(
        running=running,
        waiting=waiting,
        kv_usage=min(1.0, blocks.get("used", 0) / most) if most else 0.0,
        capacity_blocks=most,
        block_tokens=blocks.get("tokens_per", 0),
        started_at=started,
    )


def _by_label(samples: Iterable[Sample], label: str) -> dict[str, int]:
    totals: dict[str, int] = {}
    for sample in samples:
        which = sample.labels.get(label, "")
        totals[which] = totals.get(which, 0) + max(0, int(sample.value))
    return totals
