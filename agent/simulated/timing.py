"""How long an engine step takes: a model of time, not a clock.

    prefill of tokens h..n    ((n - h) + (n^2 - h^2) / 2a) / v          v tokens/s, a: `attention_tokens`
    decode of a batch of b    itl * (1 + b / c)                         c: `itl_batch_size`

A step that does both takes the sum. The quadratic term is attention: at a context of `a` tokens one
more token costs twice what it costs at the start. Chunks of a prefill add up to the whole exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TimeModel:
    """`speed` divides all times; 0 stands for no waiting at all."""

    prefill_tokens_per_s: float = 12_500.0
    attention_tokens: float = 32_768.0
    itl_s: float = 0.02
    itl_batch_size: float = 32.0
    speed: float = 1.0

    def __post_init__(self) -> None:
        for name in ("prefill_tokens_per_s", "attention_tokens", "itl_batch_size"):
            if not getattr(self, name) > 0 or math.isinf(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a number above 0")
        for name in ("itl_s", "speed"):
            if not getattr(self, name) >= 0 or math.isinf(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")

    @property
    def instant(self) -> bool:
        return self.speed == 0

    def prefill_s(self, start: int, end: int) -> float:
        """Seconds, at speed 1, to compute tokens `start` to `end` (exclusive) of a prompt."""
        quadratic = (end * end - start * start) / (2 * self.attention_tokens)
        return ((end - start) + quadratic) / self.prefill_tokens_per_s

    def decode_s(self, batch: int) -> float:
        """Seconds, at speed 1, to give each of `batch` sequences its next token."""
        return self.itl_s * (1 + batch / self.itl_batch_size) if batch else 0.0

    def step_s(self, prefills: Iterable[tuple[int, int]], decode_batch: int) -> float:
        """Seconds one step takes: `prefills` are the (start, end) of its prompt chunks."""
        if self.instant:
            return 0.0
        whole = sum(self.prefill_s(start, end) for start, end in prefills)
        return (whole + self.decode_s(decode_batch)) / self.speed
