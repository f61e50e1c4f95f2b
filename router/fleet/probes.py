"""Asks replicas whether they are well, besides what requests tell.

A yes brings back a replica that was dead; it does not clear one that fails requests, because a paused
vLLM and one that shuts down still answer 200. A no, or no connection, keeps a replica out before a
request has to find out. Any answer below 500 is a yes: endpoints elsewhere have no health check.
Not here: what follows from the answers (core.health).
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Final

from router.core.health import Failure
from router.core.snapshot import Candidate
from router.state import RouterState
from router.upstream.connection import ResponseHead
from router.upstream.failures import UpstreamFailed

_TIMEOUT_S: Final = 5.0
_AT_ONCE: Final = 32


class Probes:
    """Probes every replica in the table once an interval."""

    def __init__(self, state: RouterState, *, interval_s: float, path: str = "/health") -> None:
        self._state = state
        self._interval_s = interval_s
        self._path = path
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            # Routers that started together shall not knock together.
            await asyncio.sleep(self._interval_s * (0.75 + 0.5 * self._state.chance.random()))
            await self.round()

    async def round(self) -> None:
        """One probe of each replica that may get requests."""
        snapshot = self._state.snapshot
        if snapshot is not None:
            well = [c for c in snapshot.replicas.values() if not c.draining]
            await asyncio.gather(*(self._probe(candidate) for candidate in well))

    async def _probe(self, candidate: Candidate) -> None:
        async with self._places:
            failure = await self._ask(candidate)
        snapshot = self._state.snapshot
        if snapshot is None or candidate.id not in snapshot.replicas:
            return
        breaker = self._state.breakers.get(candidate.id)
        if failure is not None:
            now = perf_counter()
            breaker = breaker or self._state.breaker(candidate.id)
            # Slow is not dead: an engine under load may be late with its health.
            if failure != "timeout" and breaker.state(now) != "open":
                breaker.failed(now, failure)
        elif breaker is not None:
            breaker.probed()
            if breaker.is_new:
                self._state.recovered(candidate.id)

    async def _ask(self, candidate: Candidate) -> Failure | None:
        pool = self._state.pool(candidate)
        try:
            connection = pool.take() or await pool.connect(_TIMEOUT_S)
        except UpstreamFailed:
            return "refused"
        answer = _Answer()
        try:
            connection.send(
                f"GET {candidate.base_path}{self._path} HTTP/1.1\r\n"
                f"Host: {candidate.host_header}\r\n\r\n".encode("ascii"),
                b"",
                answer,
            )
            async with asyncio.timeout(_TIMEOUT_S):
                status = await answer.status
        except TimeoutError:
            return "timeout"
        except UpstreamFailed as error:
            return None if error.stale else "timeout"
        else:
            return "probe" if status >= 500 else None
        finally:
            pool.give_back(connection)


class _Answer:
    """Receiver of a health check: of all that comes only the status counts."""

    def __init__(self) -> None:
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._status = 0

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:  # noqa: ARG002 - a Receiver is called so
        if head is not None:
            self._status = head.status
        if complete and not self.status.done():
            self.status.set_result(self._status)

    def failed(self, error: UpstreamFailed) -> None:
        if not self.status.done():
            self.status.set_exception(error)
