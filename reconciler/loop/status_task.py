"""Writes status to Git soon after it changed, never more often than the debounce, never unchanged.

Runs beside the passes, so that a slow Git remote delays no route. Not here: what status says (core).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from reconciler.again import backoff_s
from reconciler.core.digest import canonical_digest
from reconciler.core.status import Document, World, documents
from reconciler.errors import Fenced, ReconcileError
from reconciler.loop.ports import Leadership, StatusSink
from reconciler.publish.status_yaml import parse_document, render_document

log = logging.getLogger("detoserve.reconciler")

LAST_WRITE_S = 10.0
NO_LEASE_PAUSE_S = 0.25


def rfc3339_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class StatusTask:
    """Takes the newest World; what lies between two writes is never seen in Git."""

    def __init__(
        self,
        sink: Callable[[], StatusSink],
        leadership: Leadership,
        *,
        debounce_s: Callable[[], float],
        on_fenced: Callable[[], None],
        now: Callable[[], str] = rfc3339_now,
    ) -> None:
        self._sink = sink
        self._leadership = leadership
        self._debounce_s = debounce_s
        self._on_fenced = on_fenced
        self._now = now
        self._world: World | None = None
        self._dirty = asyncio.Event()
        self._written_to: tuple[StatusSink, int] | None = None
        """The branch and the lease generation under which the last write was made."""
        self._documents: dict[str, Document] = {}
        self._rendered: dict[str, bytes] = {}

    def offer(self, world: World) -> None:
        """The world as of now; cheap when it equals the last one."""
        if world != self._world:
            self._world = world
            self._dirty.set()

    async def run(self, stop: asyncio.Event) -> None:
        """Writes until `stop`, and once more then, so that the last word is in Git."""
        failures = 0
        stopping = asyncio.create_task(stop.wait())
        while not stop.is_set():
            dirty = asyncio.create_task(self._dirty.wait())
            await asyncio.wait({dirty, stopping}, return_when=asyncio.FIRST_COMPLETED)
            dirty.cancel()
            if self._leadership.held is None:
                # What nobody may write now is written when this reconciler leads again.
                await asyncio.wait({stopping}, timeout=NO_LEASE_PAUSE_S)
                continue
            self._dirty.clear()
            try:
                await self.write()
                failures = 0
                pause_s = self._debounce_s()
            except ReconcileError as error:
                failures += 1
                pause_s = backoff_s(
                    failures,
                    base_s=1.0,
                    cap_s=60.0,
                )
                log.warning("status not written, next try in %.0f s: %s", pause_s, error)
                self._dirty.set()
                if isinstance(error, Fenced):
                    # Held in Redis, yet Git has seen a newer one: Redis was emptied since.
                    self._on_fenced()
            except Exception:
                log.exception("writing status failed")
                pause_s = 5.0
            await asyncio.wait({stopping}, timeout=pause_s)
        try:
            async with asyncio.timeout(LAST_WRITE_S):
                await self.write()
        except (ReconcileError, TimeoutError) as error:
            log.warning("the last status was not written: %s", str(error) or "no answer in time")

    async def write(self) -> str | None:
        """One write of the newest world; the commit, or None where nothing differs."""
        world, lease = self._world, self._leadership.held
        if world is None or lease is None:
            return None
        sink, generation = self._sink(), lease.require().generation
        if self._written_to != (sink, generation):
            # Another may have written since.
            await self._take_up(sink)
            self._written_to = (sink, generation)
        # Of thousands of objects this takes seconds, in which passes and the lease go on.
        made, rendered = await asyncio.to_thread(
            _render, world, self._documents, self._rendered, self._now()
        )
        if made == self._documents:
            return None
        commit = await sink.write(
            rendered,
            revision=world.effective.revision,
            plan_digest=_plan_digest(world),
            lease=lease,
        )
        self._documents, self._rendered = made, rendered
        return commit

    async def _take_up(self, sink: StatusSink) -> None:
        """Starts from what the branch says, so that a restart moves no generation and no time."""
        stored: Mapping[str, bytes] = await sink.read()
        documents = await asyncio.to_thread(_parse, stored)
        self._documents, self._rendered = documents, dict(stored)


def _render(
    world: World, before: Mapping[str, Document], known: Mapping[str, bytes], now: str
) -> tuple[dict[str, Document], dict[str, bytes]]:
    """Every document and its bytes; those that did not change are the very same bytes."""
    made = documents(world, before, now)
    rendered = {
        path: known[path]
        if path in known and before.get(path) == document
        else render_document(document)
        for path, document in made.items()
    }
    return made, rendered


def _parse(stored: Mapping[str, bytes]) -> dict[str, Document]:
    parsed = {path: parse_document(data) for path, data in stored.items()}
    return {path: document for path, document in parsed.items() if isinstance(document, dict)}


def _plan_digest(world: World) -> str:
    effects = [[type(a).__name__, a.name, a.reason] for a in world.plan.effects]
    return canonical_digest(effects)[:12]
