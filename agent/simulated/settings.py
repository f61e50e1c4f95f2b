"""Every setting of a simulated engine, with defaults, checked when made.

Not here: flags and environment variables, which `command` documents and turns into this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from agent.simulated.faults import FaultPlan
from agent.simulated.timing import TimeModel

EventFormat = Literal["map", "array"]

_TIME = TimeModel()
_NO_FAULTS = FaultPlan()


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventSettings:
    """Where KV events go. vLLM's rule: an endpoint with "*" or "::" is bound, any other is dialled."""

    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""
    buffer_steps: int = 10_000
    format: EventFormat = "map"

    def __post_init__(self) -> None:
        if self.buffer_steps < 1:
            raise ValueError(f"kv-events-buffer-steps is {self.buffer_steps}; at least 1 is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Port 0 stands for any free port. Times in seconds, lengths in tokens, sizes in blocks.

    `served_model_names`: the first is the one answers carry. `max_num_queued_reqs`: waiting and
    running together, as vLLM counts them; None is no bound. `output_tokens`: how long answers are
    on average where the request sets no limit.
    """

    host: str = "127.0.0.1"
    port: int = 0
    served_model_names: tuple[str, ...] = ("simulated",)
    lora_modules: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)

    max_model_len: int = 32_768
    block_size: int = 16
    num_blocks: int = 8_192
    enable_prefix_caching: bool = True
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4_096
    max_num_queued_reqs: int | None = None
    stream_interval: int = 1

    time: TimeModel = _TIME
    output_tokens: int = 64
    ignore_eos: bool = False
    seed: int = 0
    embedding_dimensions: int = 64

    kv_events: KVEventSettings | None = None
    faults: FaultPlan = _NO_FAULTS
    start_delay_s: float = 0.0
    shutdown_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.model_names):
            raise ValueError("at least one served model name is needed, and none may be empty")
        if len(set(self.model_names)) != len(self.model_names):
            raise ValueError(f"a model is named twice: {', '.join(self.model_names)}")
        for name in (
            "max_model_len",
            "block_size",
            "num_blocks",
            "max_num_seqs",
            "max_num_batched_tokens",
            "stream_interval",
            "output_tokens",
            "embedding_dimensions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_num_queued_reqs is not None and self.max_num_queued_reqs < 1:
            raise ValueError(
                f"max_num_queued_reqs is {self.max_num_queued_reqs}; leave it out for no bound"
            )
        if self.kv_cache_tokens < self.max_model_len:
            raise ValueError(
                f"{self.num_blocks} blocks of {self.block_size} tokens hold {self.kv_cache_tokens}"
                f" tokens, but max_model_len is {self.max_model_len}: one request must fit into the"
                f" cache; raise the blocks to {-(-self.max_model_len // self.block_size)} or lower"
                " max_model_len"
            )
        if self.start_delay_s < 0 or self.shutdown_timeout_s < 0:
            raise ValueError("start_delay_s and shutdown_timeout_s cannot be negative")

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name a request may ask for."""
        return self.served_model_names + self.lora_modules

    @property
    def kv_cache_tokens(self) -> int:
        return self.num_blocks * self.block_size
