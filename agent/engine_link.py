"""Follows one engine: looks at its metrics every so often, and hears its KV events at once.

Not here: which engines there are (finding), or where the words go (outbox).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import aiohttp
import zmq
import zmq.asyncio

from agent.core.cache import Cache
from agent.core.engine import EngineState
from agent.core.kv_events import Event
from agent.core.metrics import PageInvalid
from agent.finding import Address
from agent.kv_source import KvSource, Publisher
from agent.outbox import Outbox
from agent.scrape import Unreachable, publishers, read

_log: Final = logging.getLogger(__name__)

_AWAY_S: Final = 5.0
"""Longest pause between looks at an engine that does not answer."""
_STRANGER_S: Final = 60.0
"""The same where something answers that has no metrics known here."""
_ASK_S: Final = 10.0
"""Between questions where it publishes KV events."""


class EngineLink:
    """One engine, until `run` is cancelled."""

    def __init__(
        self,
        replica: str,
        address: Address,
        outbox: Outbox,
        *,
        session: aiohttp.ClientSession,
        context: zmq.asyncio.Context,
        agent_id: str,
        poll_interval_s: float,
        hash_key: bytes | None,
    ) -> None:
        self.address = address
        self.state = EngineState(replica, time.time(), agent=agent_id)
        self._outbox = outbox
        self._session = session
        self._context = context
        self._poll_interval_s = poll_interval_s
        self._hash_key = hash_key
        self._sources: dict[Publisher, tuple[KvSource, asyncio.Task[None]]] = {}
        self._look_now = asyncio.Event()
        self._gone = False
        self._pause_s = poll_interval_s
        self._loop = asyncio.get_running_loop()
        self._ask_at = 0.0
        """When it is asked again where it publishes, if nothing has changed."""
        self._problems: dict[str, str] = {}

    async def run(self) -> None:
        try:
            while True:
                # Cleared first: what happens during a look asks for another.
                self._look_now.clear()
                pause_s = await self._look()
                try:
                    async with asyncio.timeout(pause_s):
                        await self._look_now.wait()
                except TimeoutError:
                    pass
        finally:
            await self._leave()

    async def _look(self) -> float:
        """Reads its metrics; how long to wait until the next time."""
        try:
            reading = await read(self._session, self.address.url)
        except Unreachable as error:
            self._say("metrics", str(error))
            if error.refused and not self._gone:
                # Its process has ended, and its cache with it; whoever comes next starts empty.
                self._gone = True
                self._outbox.batch(self.state.replica, self.state.lost())
                self._report()
            return self._longer(_AWAY_S)
        except PageInvalid as error:
            self._say("metrics", str(error))
            return self._longer(_STRANGER_S)
        self._pause_s = self._poll_interval_s
        self._say("metrics", "")
        another = self.state.read(reading)
        if another:
            _log.info("%s: another process than before", self.state.replica)
        if another or self._gone or self._loop.time() >= self._ask_at:
            await self._follow()
        self._gone = False
        self._report()
        return self._pause_s

    def _longer(self, at_most_s: float) -> float:
        """Twice as long as the last pause: who does not answer is not asked every second."""
        self._pause_s = max(self._poll_interval_s, min(2 * self._pause_s, at_most_s))
        return self._pause_s

    async def _follow(self) -> None:
        """Subscribes to whatever it publishes, once it is known."""
        wanted: Sequence[Publisher] = self.address.publishers
        if not wanted:
            try:
                wanted = await publishers(self._session, self.address.url)
            except Unreachable:
                return
        self._ask_at = self._loop.time() + (_ASK_S if wanted else _STRANGER_S)
        ended = any(task.done() for _, task in self._sources.values())
        if self._sources.keys() == set(wanted) and not ended:
            return
        await self._leave()
        for publisher in wanted:
            cache = Cache(self._hash_key)
            self.state.add_cache(publisher.endpoint, cache)
            listener = _Listener(self, cache)
            said = partial(self._say, publisher.endpoint)
            source = KvSource(self._context, publisher, listener, said=said)
            task = asyncio.create_task(self._source(source, said))
            self._sources[publisher] = source, task

    def _report(self) -> None:
        running = [source for source, task in self._sources.values() if not task.done()]
        heard = [source.connected for source in running]
        self.state.hears_events = bool(heard) and all(heard) and len(heard) == len(self._sources)
        self._outbox.report(self.state.report(time.time()))

    async def _source(self, source: KvSource, said: Callable[[str], None]) -> None:
        try:
            await source.run()
        except zmq.ZMQError as error:
            said(f"its KV events cannot be subscribed to: {error.strerror}")

    async def _leave(self) -> None:
        tasks = [task for _, task in self._sources.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for publisher in self._sources:
            self._problems.pop(publisher.endpoint, None)
        self._sources.clear()
        self.state.remove_caches()

    @property
    def problem(self) -> str:
        """What is wrong with it, for people; empty: nothing."""
        return "; ".join(self._problems.values())

    def _say(self, about: str, text: str) -> None:
        """Once, until something else is to be said about it."""
        if text != self._problems.get(about, ""):
            self._problems.pop(about, None)
            if text:
                self._problems[about] = text
                _log.warning("%s (%s): %s", self.state.replica, self.address.url, text)
            else:
                _log.info("%s answers as it should", self.state.replica)

    # What its publishers tell

    def events(self, cache: Cache, events: list[Event]) -> None:
        change = cache.apply(events)
        batch = self.state.changed(change)
        if batch is not None:
            self._outbox.batch(self.state.replica, batch)
        if change.cleared:
            self._report()

    def lost(self) -> None:
        _log.warning("%s: KV events were lost; what it holds is forgotten", self.state.replica)
        self._outbox.batch(self.state.replica, self.state.lost())
        self._report()

    async def restarted(self) -> None:
        """Its events begin anew: when since, its metrics say if it has such a metric."""
        epoch = self.state.epoch
        with contextlib.suppress(Unreachable, PageInvalid):
            self.state.read(await read(self._session, self.address.url))
        if self.state.epoch == epoch:
            self.state.restarted(time.time())
        _log.info("%s: another process than before", self.state.replica)
        self._report()

    def look_now(self) -> None:
        self._look_now.set()


class _Listener:
    """One publisher of the engine."""

    def __init__(self, link: EngineLink, cache: Cache) -> None:
        self._link = link
        self._cache = cache

    def events(self, events: list[Event]) -> None:
        self._link.events(self._cache, events)

    async def restarted(self) -> None:
        await self._link.restarted()

    def lost(self) -> None:
        self._link.lost()

    def disconnected(self) -> None:
        self._link.look_now()
