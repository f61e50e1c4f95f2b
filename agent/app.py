"""The agent: finds engines, follows each, and publishes what they say until it is cancelled.

Not here: flags (command), one engine (engine_link), or ways out (publishing).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final, Protocol

import aiohttp
import zmq.asyncio

from agent.ending import together
from agent.engine_link import EngineLink
from agent.finding import Address, Finder, FindingFailed, joined
from agent.outbox import Outbox
from agent.publishing import SendFailed, Sink
from schemas.wire.events import AgentHeartbeat, KvBatch

_log: Final = logging.getLogger(__name__)

_MAX_WAIT_S: Final = 5.0
_FIND_AGAIN_S: Final = 0.5


class Directory(Protocol):
    """Names the replicas that are routed to; each is a Finder too."""

    async def replicas(self) -> dict[str, str]:
        """Id -> base URL. Raises: FindingFailed."""


class Agent:
    """`finder` None: every replica of the directory."""

    def __init__(
        self,
        *,
        agent_id: str,
        cluster: str,
        directory: Directory,
        sink: Sink,
        finder: Finder | None = None,
        hash_key: bytes | None = None,
        poll_interval_s: float = 1.0,
        find_interval_s: float = 2.0,
        flush_interval_s: float = 0.02,
        heartbeat_interval_s: float = 5.0,
        snapshot_interval_s: float = 30.0,
        version: str = "",
    ) -> None:
        self._id = agent_id
        self._cluster = cluster
        self._directory = directory
        self._sink = sink
        self._finder = finder
        self._hash_key = hash_key
        self._poll_interval_s = poll_interval_s
        self._find_interval_s = find_interval_s
        self._flush_interval_s = flush_interval_s
        self._heartbeat_interval_s = heartbeat_interval_s
        self._snapshot_interval_s = snapshot_interval_s
        self._version = version
        self._outbox = Outbox()
        self._links: dict[str, tuple[EngineLink, asyncio.Task[None]]] = {}
        self._said: dict[str, str] = {}
        self.on_followed: Callable[[tuple[str, ...]], None] = lambda _: None
        """Told the replicas followed whenever they change."""

    async def run(self) -> None:
        # No connection is kept: engines close theirs when they like, and one look a second is little.
        connector = aiohttp.TCPConnector(force_close=True)
        context = zmq.asyncio.Context()
        try:
            async with aiohttp.ClientSession(connector=connector) as session:
                try:
                    await together(
                        asyncio.create_task(self._find(session, context)),
                        asyncio.create_task(self._publish()),
                    )
                finally:
                    await self._leave(list(self._links))
        finally:
            context.destroy(linger=0)

    def heartbeat(self) -> AgentHeartbeat:
        problems = {name: link.problem for name, (link, _) in self._links.items() if link.problem}
        return AgentHeartbeat(
            id=self._id,
            at=time.time(),
            cluster=self._cluster,
            replicas=tuple(sorted(self._links)),
            problems=problems,
            version_text=self._version,
        )

    async def _find(self, session: aiohttp.ClientSession, context: zmq.asyncio.Context) -> None:
        while True:
            try:
                table = await self._directory.replicas()
                if self._finder is None:
                    wanted = {name: Address(url.rstrip("/"), name) for name, url in table.items()}
                else:
                    wanted = joined(await self._finder.engines(), table)
                self._say("finding", "")
                wait_s = self._find_interval_s
                await self._follow(wanted, session, context)
            except FindingFailed as error:
                self._say("finding", f"{error}; following the engines known so far")
                wait_s = min(self._find_interval_s, _FIND_AGAIN_S)
            await asyncio.sleep(wait_s)

    async def _follow(
        self,
        wanted: dict[str, Address],
        session: aiohttp.ClientSession,
        context: zmq.asyncio.Context,
    ) -> None:
        gone = [name for name, (link, _) in self._links.items() if wanted.get(name) != link.address]
        new = [name for name in wanted if name in gone or name not in self._links]
        await self._leave(gone)
        for name in new:
            link = EngineLink(
                name,
                wanted[name],
                self._outbox,
                session=session,
                context=context,
                agent_id=self._id,
                poll_interval_s=self._poll_interval_s,
                hash_key=self._hash_key,
            )
            self._links[name] = link, asyncio.create_task(link.run())
        if gone or new:
            _log.info("following %d engines", len(self._links))
            self.on_followed(tuple(sorted(self._links)))

    async def _leave(self, names: list[str]) -> None:
        tasks = [self._links.pop(name)[1] for name in names]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _publish(self) -> None:
        loop = asyncio.get_running_loop()
        beat_at = snapshot_at = loop.time()
        changed: set[str] = set()
        wait_s = 0.1
        while True:
            try:
                async with asyncio.timeout_at(beat_at):
                    await self._outbox.filled()
                await asyncio.sleep(self._flush_interval_s)
            except TimeoutError:
                pass
            parcel = self._outbox.take()
            changed |= {name for name, _ in parcel.batches}
            now = loop.time()
            snapshots: list[tuple[str, KvBatch]] = []
            if now >= snapshot_at:
                snapshots = [
                    (n, self._links[n][0].state.snapshot()) for n in changed & self._links.keys()
                ]
            try:
                await self._sink.send(self.heartbeat(), parcel, snapshots)
            except SendFailed as error:
                self._say("publishing", str(error))
                self._outbox.give_back(parcel)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _MAX_WAIT_S)
                continue
            self._say("publishing", "")
            wait_s = 0.1
            beat_at = now + self._heartbeat_interval_s
            if now >= snapshot_at:
                changed.clear()
                snapshot_at = now + self._snapshot_interval_s

    def _say(self, about: str, text: str) -> None:
        """Once, until something else is to be said about it."""
        if text != self._said.get(about, ""):
            self._said[about] = text
            if text:
                _log.warning("%s: %s", about, text)
            else:
                _log.info("%s works again", about)
