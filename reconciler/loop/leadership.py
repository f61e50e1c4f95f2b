"""Holds the lease whenever it can be had, and says so. Not here: the lease itself (publish.lease)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from reconciler.errors import Stalled, Transient
from reconciler.publish.lease import Held, LeaseHeld, LeaseHolder, LeaseLost, Leaser

log = logging.getLogger("detoserve.reconciler")

ASK_AGAIN_S = 1.0
LOOK_S = 0.25
"""Between looks whether the lease ran out, or came back with Redis, without anybody taking it."""


class LeaseLeadership:
    """`held` is None while another holds the lease or nobody can tell; then nothing is written."""

    def __init__(
        self, leaser: Leaser, *, floor: Callable[[], int], on_change: Callable[[], None]
    ) -> None:
        self._leaser = leaser
        self._floor = floor
        self._on_change = on_change
        self._holder: LeaseHolder | None = None
        self._again = asyncio.Event()
        self.waiting_for = ""
        """Who holds it, or why it cannot be asked for; for people."""

    @property
    def held(self) -> Held | None:
        holder = self._holder
        if holder is None:
            return None
        try:
            holder.require()
        except LeaseLost:
            return None
        return holder

    def step_up(self) -> None:
        """Acquires anew, above the floor: a writer has met a generation newer than ours."""
        self._again.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Acquires, keeps, and acquires again, until `stop`; then lets another take it at once."""
        stopping = asyncio.create_task(stop.wait())
        again = self._again
        try:
            while not stop.is_set():
                again.clear()
                try:
                    self._holder = await LeaseHolder.acquired(
                        self._leaser, self._floor(), on_lost=lambda _: again.set()
                    )
                except (LeaseHeld, Transient, Stalled) as error:
                    if str(error) != self.waiting_for:
                        log.info("not writing: %s", error)
                    self.waiting_for = str(error)
                    pause_s = error.retry_after_s if isinstance(error, LeaseHeld) else ASK_AGAIN_S
                    await asyncio.wait({stopping}, timeout=min(max(pause_s, 0.05), ASK_AGAIN_S))
                    continue
                self.waiting_for = ""
                log.info("holding the lease, generation %d", self._holder.require().generation)
                self._on_change()
                await self._keep(stopping)
                if again.is_set():
                    log.warning(
                        "acquiring the lease anew: %s", self._holder.lost or "outrun in Git"
                    )
                    holder, self._holder = self._holder, None
                    await holder.close()
                    self._on_change()
        finally:
            stopping.cancel()
            if self._holder is not None:
                holder, self._holder = self._holder, None
                await holder.close()

    async def _keep(self, stopping: asyncio.Task[Any]) -> None:
        """Until it is lost to another, or `stopping`."""
        losing = asyncio.create_task(self._again.wait())
        before = True
        while True:
            done, _ = await asyncio.wait(
                {stopping, losing}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED
            )
            if done:
                losing.cancel()
                return
            now = self.held is not None
            if now != before:
                log.info("the lease %s", "is back" if now else "may have run out: not writing")
                self._on_change()
            before = now
