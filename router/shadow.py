"""Copies of live requests for shadow deployments: sent after the request itself, answers thrown away.

They are nobody's: no limit, no bill and no metric of a function knows of them. A client never
waits for one, and a shadow that is slow or dead loses copies, not requests: only so many run at
once. Not here: who gets copies (core.arms, core.snapshot).
"""

from __future__ import annotations

import asyncio
from time import perf_counter

from router.core.snapshot import Candidate, Snapshot
from router.deadlines import Deadlines
from router.state import RouterState
from router.upstream.connection import Connection, ResponseHead
from router.upstream.failures import UpstreamFailed, UpstreamTimeout
from router.upstream.pool import Pool
from schemas.wire.routing import Policy

Counted = tuple[str, str, str]
"""(function, deployment, what became of it)"""


class _Copy:
    """One copy: a receiver that keeps nothing."""

    __slots__ = (
        "_began",
        "_shadows",
        "candidate",
        "connection",
        "patience_s",
        "policy",
        "pool",
        "since",
        "status",
    )

    def __init__(self, shadows: Shadows, candidate: Candidate, policy: Policy) -> None:
        self._shadows = shadows
        self._began = perf_counter()
        self.candidate = candidate
        self.policy = policy
        self.connection: Connection | None = None
        self.pool: Pool | None = None
        self.status = 0
        self.since = self._began
        self.patience_s = policy.first_byte_timeout_s

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        self.since = perf_counter()
        if head is not None:
            self.status = head.status
        if data:
            if self.patience_s != self.policy.between_chunks_timeout_s:
                self._shadows.first_token(self, self.since - self._began)
            self.patience_s = self.policy.between_chunks_timeout_s
        if complete:
            self._shadows.over(self, "ok" if self.status < 400 else "error")

    def failed(self, error: UpstreamFailed) -> None:
        self._shadows.over(self, "timeout" if isinstance(error, UpstreamTimeout) else "failed")

    def expired(self) -> None:
        self._shadows.over(self, "timeout")


class Shadows:
    """Owned by one event loop. `close` ends what still runs."""

    def __init__(self, state: RouterState, *, limit: int) -> None:
        self.counts: dict[Counted, int] = {}
        """By function, deployment and outcome; `skipped` are those that were not sent."""
        self.first_token_s: dict[tuple[str, str], tuple[int, float]] = {}
        """(function, deployment) -> how many first tokens there were, and their seconds in all."""
        self._state = state
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._deadlines = Deadlines()
        self._running: dict[_Copy, asyncio.Task[None] | None] = {}

    def __len__(self) -> int:
        """Copies that run."""
        return len(self._running)

    def send(self, candidate: Candidate, policy: Policy, head: bytes, body: bytes) -> None:
        """One copy, if there is room for it. `head` and `body` as the replica is to get them."""
        copy = _Copy(self, candidate, policy)
        full = candidate.max_concurrent and (
            self._state.in_flight.by_replica.get(candidate.id, 0) >= candidate.max_concurrent
        )
        if full or len(self._running) >= self._limit or self._state.draining:
            self._count(copy, "skipped")
            return
        self._state.in_flight.sent(candidate.id)
        copy.pool = self._state.pool(candidate)
        connection = copy.pool.take()
        if connection is None:
            self._running[copy] = self._loop.create_task(self._connect(copy, head, body))
        else:
            self._running[copy] = None
            self._use(copy, connection, head, body)

    async def _connect(self, copy: _Copy, head: bytes, body: bytes) -> None:
        assert copy.pool is not None
        try:
            connection = await copy.pool.connect(copy.policy.connect_timeout_s)
        except UpstreamFailed as error:
            copy.failed(error)
            return
        if copy in self._running:
            self._running[copy] = None
            self._use(copy, connection, head, body)
        else:
            connection.close()

    def _use(self, copy: _Copy, connection: Connection, head: bytes, body: bytes) -> None:
        copy.connection = connection
        copy.since = perf_counter()
        self._deadlines.watch(copy)
        connection.send(head, body, copy)

    def first_token(self, copy: _Copy, seconds: float) -> None:
        """Some of a copy's answer came."""
        of = copy.candidate.function, copy.candidate.deployment
        count, total = self.first_token_s.get(of, (0, 0.0))
        self.first_token_s[of] = count + 1, total + seconds

    def over(self, copy: _Copy, outcome: str) -> None:
        """A copy has ended, whichever way. Gives back what it held, once."""
        if copy not in self._running:
            return
        task = self._running.pop(copy)
        if task is not None and not task.done() and task is not asyncio.current_task(self._loop):
            task.cancel()
        self._deadlines.forget(copy)
        if copy.connection is not None and copy.pool is not None:
            copy.pool.give_back(copy.connection)
        self._state.in_flight.ended(copy.candidate.id)
        self._count(copy, outcome)

    def _count(self, copy: _Copy, outcome: str) -> None:
        key = copy.candidate.function, copy.candidate.deployment, outcome
        self.counts[key] = self.counts.get(key, 0) + 1

    def installed(self, snapshot: Snapshot) -> None:
        """Counters of deployments that are gone go with them."""
        known = {(c.function, c.deployment) for c in snapshot.replicas.values()}
        self.counts = {key: n for key, n in self.counts.items() if key[:2] in known}
        self.first_token_s = {of: n for of, n in self.first_token_s.items() if of in known}

    def close(self) -> None:
        """Ends every copy that runs."""
        for copy in list(self._running):
            if copy.connection is not None:
                copy.connection.close()
            self.over(copy, "cut")
