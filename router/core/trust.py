"""How far a replica's cache is what this router thinks it is: predicted against what engines report.

An engine says of every request how many of its prompt's tokens it had (`cached_tokens`). Where that is
less than predicted, what a cached prefix is worth there is discounted by the share that came true,
fading with time, so that a replica that is known better again is trusted again. Having more than
predicted is no error here: it only costs what might have been saved. Not here: reading usage (usage).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Final

PRIOR_TOKENS: Final = 20_000.0
"""A replica is trusted as if so many predicted tokens had come true."""
MEMORY_TOKENS: Final = 500_000.0
"""Older predictions fade: what was wrong is forgiven after about so many that were right."""
SLACK_TOKENS: Final = 96.0
"""Of one prediction: engines cut blocks of their own, and bytes are no tokens."""
WHOLE: Final = 0.98
"""From here on the discount is not worth making."""
SURE_TOKENS: Final = 512.0
"""A miss of so many predicted tokens, all of them, is no matter of blocks."""
MISSES: Final = 3
"""So many such in a row: the engine holds nothing of what it was thought to. Two may both have been
pushed out, where nobody tells how much it holds."""


@dataclass(slots=True)
class _Replica:
    predicted: float = 0.0
    came_true: float = 0.0
    misses: int = 0


@dataclass(slots=True)
class Trust:
    """Replicas of one router, by slot. `factors` is what scoring reads."""

    factors: dict[int, float] = field(default_factory=dict)
    """What a predicted token is worth, 0 to 1; slots that are trusted wholly are left out."""
    _replicas: dict[int, _Replica] = field(default_factory=dict)

    def remove(self, slot: int) -> None:
        """Another replica will have this slot, or another process is behind it."""
        self._replicas.pop(slot, None)
        self.factors.pop(slot, None)

    def learn(self, slot: int, predicted_tokens: float, cached_tokens: float) -> bool:
        """One answer came, with what its engine had of the prompt; both in the engine's tokens.

        True when this replica should be taken to hold nothing any more.
        """
        if not predicted_tokens > 0:
            return False
        replica = self._replicas.setdefault(slot, _Replica())
        missed = predicted_tokens - max(0.0, cached_tokens)
        came_true = predicted_tokens if missed <= SLACK_TOKENS else predicted_tokens - missed
        keep = exp(-predicted_tokens / MEMORY_TOKENS)
        replica.predicted = replica.predicted * keep + predicted_tokens
        replica.came_true = replica.came_true * keep + came_true
        factor = (replica.came_true + PRIOR_TOKENS) / (replica.predicted + PRIOR_TOKENS)
        if factor < WHOLE:
            self.factors[slot] = factor
        else:
            self.factors.pop(slot, None)
        replica.misses = (
            replica.misses + 1 if cached_tokens <= 0 and predicted_tokens >= SURE_TOKENS else 0
        )
        if replica.misses < MISSES:
            return False
        # The next process is not to blame for what the last one lost.
        self.remove(slot)
        return True

    def share_come_true(self, slot: int) -> float | None:
        """Of late, of what was predicted there; None before the first prediction."""
        replica = self._replicas.get(slot)
        return replica.came_true / replica.predicted if replica else None


def in_engine_tokens(predicted: float, estimated: float, prompt_tokens: int) -> float:
    """A prediction in this router's estimated tokens as the engine counts them.

    `estimated` and `prompt_tokens`: the whole prompt, by this router and by the engine.
    """
    return predicted * prompt_tokens / estimated if estimated > 0 else 0.0


def discounted(
    held: Sequence[tuple[float, tuple[int, ...]]],
    factors: Mapping[int, float],
) -> list[tuple[float, tuple[int, ...]]]:
    """What is held, where each prediction counts as much as it comes true; deepest first.

    `held` and `factors` are by position among the candidates. Without factors nothing changes.
    """
    out: list[tuple[float, tuple[int, ...]]] = []
    for tokens, positions in held:
        trusted = tuple(p for p in positions if p not in factors)
        if trusted:
            out.append((tokens, trusted))
        out += [(tokens * factors[p], (p,)) for p in positions if p in factors]
    out.sort(key=lambda entry: -entry[0])
    return out
