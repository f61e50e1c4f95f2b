"""How much engines hold, learned from what they say they had of prompts (`cached_tokens`).

For engines that nobody reports the size of. A prompt that a replica no longer has although the index
thought so has been pushed out: the index holds more than the engine does, by at least that much.
One that it still has although the index had given it up says the opposite. Replicas of a function are
mostly alike, so each is taken to be as the fleet is until enough has been seen of itself. Not here:
replicas that have lost everything (trust), or what engines and agents report (engine_reports).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

SLACK_BLOCKS: Final = 2
"""Of one prediction: engines cut blocks of their own."""
LESS: Final = 0.5
MORE: Final = 2.0
"""How much of what was missed, and of what was found, the estimate moves by. Requests go where something
is predicted, so too small an estimate shows seldom and counts more."""
LEAST_BLOCKS: Final = 64.0
OWN_ERRORS: Final = 12
"""After so many errors of its own a replica is known by itself."""


@dataclass(slots=True)
class _Estimate:
    blocks: float | None = None
    """None: more than has been needed so far."""
    errors: int = 0
    steady: float | None = None
    """Before the misses at the end of which it may turn out that the engine was another."""

    def learn(self, predicted: int, cached: int, held: int) -> None:
        if predicted - cached > SLACK_BLOCKS:
            self.errors += 1
            most = float(held) if self.blocks is None else min(self.blocks, held)
            self.blocks = max(LEAST_BLOCKS, most - LESS * (predicted - cached))
        elif self.blocks is not None and cached - predicted > SLACK_BLOCKS:
            self.errors += 1
            self.blocks += MORE * (cached - predicted)
        if cached:
            self.steady = self.blocks


@dataclass(slots=True)
class Room:
    """Replicas of one function, by slot; all counts are in blocks of prompts."""

    _fleet: _Estimate = field(default_factory=_Estimate)
    _own: dict[int, _Estimate] = field(default_factory=dict)
    tells: bool = False
    """Whether these engines say what they had: some never do, and theirs is no miss."""

    def remove(self, slot: int) -> None:
        self._own.pop(slot, None)

    def learn(self, slot: int, predicted: int, cached: int, held: int) -> None:
        """A replica had `cached` blocks of a prompt, where `predicted` were expected.

        `held`: that the index thinks it holds of all prompts.
        """
        if cached:
            self.tells = True
        elif not self.tells:
            return
        self._fleet.learn(predicted, cached, held)
        self._own.setdefault(slot, _Estimate()).learn(predicted, cached, held)

    def restarted(self, slot: int) -> None:
        """The misses just learned were not for want of room."""
        for estimate in (self._fleet, self._own.get(slot)):
            if estimate is not None:
                estimate.blocks = estimate.steady

    def capacity(self, slot: int) -> int:
        """That a replica holds; 0: not known."""
        own = self._own.get(slot)
        found = own if own is not None and own.errors >= OWN_ERRORS else self._fleet
        return int(found.blocks) if found.blocks is not None else 0
