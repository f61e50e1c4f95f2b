"""What the HTTP side counts and obeys: requests, faults, draining.

Not here: sequences and blocks, which the scheduler counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.simulated.answers import Usage
from agent.simulated.faults import Fault, FaultPlan

_HANDED_MAX = 100_000


@dataclass(slots=True)
class ServerState:
    """Counts are of inference requests since the start.

    `end_process` ends the process with a code; None where the engine shares its process.
    """

    faults: FaultPlan
    end_process: Callable[[int], None] | None = None
    started_s: float = field(default_factory=time.time)  # Unix time
    draining: bool = False
    requests: int = 0
    succeeded: int = 0
    failed: int = 0
    aborted: int = 0
    in_flight: int = 0
    struck: dict[str, int] = field(default_factory=lambda: {fault.value: 0 for fault in Fault})
    handed: dict[str, Usage] = field(default_factory=dict)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def handed_out(self, request_id: str, usage: Usage) -> None:
        """What a request's answer has told of so far; of the last 100,000 that have an id."""
        if request_id:
            if len(self.handed) >= _HANDED_MAX and request_id not in self.handed:
                del self.handed[next(iter(self.handed))]
            self.handed[request_id] = usage

    def strike(self) -> Fault | None:
        """What is to go wrong with the request that has just arrived."""
        fault, self.faults = self.faults.strike()
        if fault is not None:
            self.struck[fault.value] += 1
        return fault

    def enter(self) -> None:
        """A request begins."""
        self.requests += 1
        self.in_flight += 1
        self.idle.clear()

    def leave(self) -> None:
        """A request has ended, however it did."""
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()
