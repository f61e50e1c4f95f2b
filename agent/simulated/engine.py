"""Drives the scheduler in real time: waits as long as each step takes, publishes its events.

Not here: HTTP, and which sequences a step serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from agent.simulated.kv_publisher import KVEventPublisher
from agent.simulated.metrics import Gauges
from agent.simulated.scheduler import Scheduler, Sequence
from agent.simulated.settings import EngineSettings

# A timer that fires late is made up for by the steps after it, but no more than this: an engine
# that was stopped or starved does not race through what it missed.
_MAX_CATCH_UP_S = 0.05
_LOG = logging.getLogger(__name__)

_now_s = time.perf_counter  # uvloop's own clock counts whole milliseconds


class Engine:
    """One engine: scheduler, clock, and publisher of KV events if there is an endpoint."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.scheduler = Scheduler(settings)
        self.publisher: KVEventPublisher | None = None
        self.failed = False
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to serve.

        Raises:
            OSError: when a KV event endpoint cannot be used.
        """
        if self.settings.kv_events is not None:
            self.publisher = KVEventPublisher(self.settings.kv_events)
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stops at once; whatever is unfinished is aborted."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._abort_all()
        if self.publisher is not None:
            await self.publisher.close()

    def submit(self, sequences: list[Sequence]) -> None:
        """Queues the sequences of one request.

        Raises:
            EngineBusyError: when there are too many in flight.
        """
        self.scheduler.submit(sequences, _now_s())
        self._work.set()

    def abort(self, sequences: list[Sequence]) -> None:
        """Ends those of the sequences that have not ended."""
        for sequence in sequences:
            self.scheduler.abort(sequence, _now_s())

    @property
    def gauges(self) -> Gauges:
        scheduler = self.scheduler
        usage = scheduler.cache.pinned_blocks / scheduler.cache.capacity_blocks
        return Gauges(len(scheduler.running), len(scheduler.waiting), usage)

    async def _run(self) -> None:
        try:
            await self._serve()
        except Exception:  # noqa: BLE001 - whatever it was, requests must not hang
            # As when vLLM's worker dies: /health 503, requests 500, and the server stays.
            _LOG.exception("the engine loop died")
            self.failed = True
            self._abort_all()

    async def _serve(self) -> None:
        ends_s = _now_s()
        while True:
            step = self.scheduler.schedule(_now_s())
            if step is None:
                self._work.clear()
                await self._work.wait()
                ends_s = _now_s()
                continue
            ends_s = max(ends_s, _now_s() - _MAX_CATCH_UP_S) + step.duration_s
            await asyncio.sleep(max(0.0, ends_s - _now_s()))
            events = self.scheduler.complete(step, _now_s())
            if events and self.publisher is not None:
                self.publisher.publish(events)

    def _abort_all(self) -> None:
        scheduler = self.scheduler
        self.abort([*scheduler.waiting.values(), *scheduler.running.values()])
