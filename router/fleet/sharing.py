"""This router's share of the load, told to the others and heard of them, all the time.

What happens is told at once, or, where something was told less than `FLUSH_S` ago, together with
what happens until then. Everything is told every `FULL_S`, which is also how the others know that this one lives. One that has just started is told what is cached where. No request waits for it. Alone,
nothing is gathered. Not here: what follows from a message (core.sharing), or how it travels (channels).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from router.core.route import States
from router.core.sharing import Journal, Learn, Peers
from router.ending import end
from router.fleet.channels import Channel
from schemas.wire.events import Event, LoadBatch

_log: Final = logging.getLogger(__name__)

FLUSH_S: Final = 0.01
"""Between two messages: leaves as much again for the way, of the 20 ms in which others should know."""
FULL_S: Final = 0.5
_BRIEFING_S: Final = 0.02
"""Between two messages to a newcomer, which has requests to serve besides."""
_GREETING_S: Final = 0.2
"""Two that meet when both have just started have nothing to tell: let them find all others first."""


class _Head(Event, frozen=True, kw_only=True):
    """What tells whether the rest of a message is worth reading."""

    router: str
    seq: int
    to: str = ""


class Sharing:
    """Owned by one event loop. The first three methods are called for every request: they are cheap.

    `names` and `slots` are the replicas' by slot and back, read whenever a message comes or goes; `now` is
    the clock that loads are counted by.
    """

    def __init__(
        self,
        router_id: str,
        states: States,
        *,
        names: Mapping[int, str],
        slots: Mapping[str, int],
        learn: Learn,
        now: Callable[[], float],
    ) -> None:
        # A process that starts again is another: nothing of its former life is taken for new.
        name = f"{router_id}/{os.urandom(6).hex()}"
        self._loop = asyncio.get_running_loop()
        self._name = name
        self._index = states.index
        self._briefings: set[asyncio.Task[None]] = set()
        self._journal = Journal(name, states.load)
        self.peers = Peers(name, states.load, states.index)
        self._names = names
        self._slots = slots
        self._learn = learn
        self._now = now
        self._channels: list[Channel] = []
        self._timer: asyncio.TimerHandle | None = None
        self._told_at = 0.0
        self._read_head = msgspec.msgpack.Decoder(_Head).decode
        self._read = msgspec.msgpack.Decoder(LoadBatch).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self.alone = True
        self.sent = 0
        self.received = 0
        self.refused = 0
        """Messages that could not be read."""

    @property
    def lost(self) -> dict[str, int]:
        """Messages that did not leave, by channel."""
        return {channel.name: channel.lost for channel in self._channels}

    # For every request

    def dispatched(self, slot: int, blocks: Sequence[int]) -> None:
        """A request was counted on a replica, whose cache is credited with these blocks."""
        if not self.alone:
            self._journal.dispatched(slot, blocks)
            if self._timer is None:
                self._due()

    def changed(self, slot: int) -> None:
        """A request came to its first token there, or to its end."""
        if not self.alone:
            self._journal.changed(slot)
            if self._timer is None:
                self._due()

    def sampled(self, slot: int, cached: float, tokens: float, prefill_s: float) -> None:
        """A prefill was timed there."""
        if not self.alone:
            self._journal.sampled(slot, cached, tokens, prefill_s)

    # Messages

    def _due(self) -> None:
        if self._timer is None and not self.alone:
            self._timer = self._loop.call_at(self._told_at + FLUSH_S, self.flush)

    def flush(self, *, full: bool = False) -> None:
        """Tells what there is to tell, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._told_at = self._loop.time()
        for batch in self._journal.batches(self._names, self._now(), full=full):
            self._send(batch)

    def _send(self, batch: LoadBatch) -> None:
        data = self._encode(batch)
        self.sent += 1
        for channel in self._channels:
            channel.send(data)

    def receive(self, data: bytes) -> None:
        """A message as it came; of this router itself, twice, or spoilt, as it may be."""
        try:
            head = self._read_head(data)
            if not self.peers.is_news(head.router, head.seq):
                return
            if head.to and head.to != self._name:
                self.peers.passed(head.router, head.seq, self._now())
                return
            batch = self._read(data)
        except msgspec.DecodeError:
            if not self.refused:
                _log.warning("a message of another router cannot be read")
            self.refused += 1
            return
        self.received += 1
        is_new = self.peers.receive(batch, self._slots, self._learn, self._now())
        if is_new:
            self.alone = False
            self.flush(full=True)
            task = self._loop.create_task(self._brief(batch.router))
            self._briefings.add(task)
            task.add_done_callback(self._briefings.discard)

    async def _brief(self, newcomer: str) -> None:
        """Tells a router that has just appeared what is cached where, if nobody else is to."""
        await asyncio.sleep(_GREETING_S)
        if not self.peers.is_first(newcomer):
            return
        for batch in self._journal.briefing(self._names, self._index, newcomer):
            self._send(batch)
            await asyncio.sleep(_BRIEFING_S)

    async def run(self, channels: Sequence[Channel]) -> None:
        """Shares by these until cancelled, and then tells what is left: nothing, as a rule."""
        self._channels = list(channels)
        running = [asyncio.create_task(channel.run(self.receive)) for channel in channels]
        try:
            while True:
                if self.peers.expire(self._now()) and not len(self.peers):
                    self.alone = True
                    self._journal.forget()
                self.flush(full=True)
                await asyncio.sleep(FULL_S)
        finally:
            self.flush(full=True)
            self.alone = True
            if self._timer is not None:
                self._timer.cancel()
            await end((*running, *self._briefings))
