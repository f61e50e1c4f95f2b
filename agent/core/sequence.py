"""Whether the next batch of a publisher follows the last: its numbers, and what a break in them means.

Numbers start at 0 with each engine process, and replay overlaps with what is still under way; so a number seen
before is either the same batch again or the first words of a new process. The bytes tell: a batch
carries its time. Not here: sockets (kv_source), or the events (kv_events).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Literal

Verdict = Literal["next", "again", "gap", "restart"]

_KEPT: Final = 20_000
"""More than an engine buffers for replay (10,000 by default)."""


class Sequence:
    """Follows one publisher. `expected` is the number of the next batch."""

    def __init__(self) -> None:
        self.expected = 0
        self._seen: OrderedDict[int, int] = OrderedDict()

    def judge(self, number: int, payload: bytes) -> Verdict:
        """What a batch is; changes nothing.

        gap: batches before it are missing. restart: it is of another process than those before.
        """
        if number == self.expected:
            return "next"
        if number > self.expected:
            return "gap"
        return "again" if self._seen.get(number) == hash(payload) else "restart"

    def accept(self, number: int, payload: bytes) -> None:
        """This batch has been applied; the one after it is next."""
        self.expected = number + 1
        self._seen[number] = hash(payload)
        while len(self._seen) > _KEPT:
            self._seen.popitem(last=False)

    def restart(self) -> None:
        """Another process: from 0 on."""
        self.expected = 0
        self._seen.clear()

    @property
    def last(self) -> int | None:
        """The newest batch applied, by which a process is known again; None before the first."""
        return self.expected - 1 if self.expected else None
