"""One attempt after another, until an answer begins or there is nowhere left to send it.

Not here: the answer's way to the client (exchange, relay).
"""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Final

from router.core import errors
from router.core.errors import Refusal, Refused
from router.core.health import Failure
from router.core.retries import is_retryable
from router.core.snapshot import Candidate
from router.exchange.chosen import Chosen
from router.fleet.brain import Sent
from router.relay import Relay
from router.upstream.connection import Connection, ResponseHead
from router.upstream.failures import ConnectFailed, UpstreamFailed, UpstreamTimeout
from router.upstream.pool import Pool

_log: Final = logging.getLogger(__name__)
_LOOKED_AT_BYTES: Final = 4096
"""Of a 500's body, to tell an engine that drains from one that fails."""
_REST_S: Final = 0.25
"""How long a replica is spared that is full and does not say for how long."""


class Attempts(Chosen):
    """On its way to an engine. The relay calls `answered` and `ended`."""

    def _start(self) -> None:
        function = self._function
        counts = self._counts = self._state.function(function.name)
        counts.turn += 1
        counts.budget.request(perf_counter())
        self._left = 1 if self._headers.replica else 1 + function.policy.retry_attempts
        if self._tried:
            self._tried = ()
        queues = self._proxy.queues
        overtakes = self._headers.replica is None and (
            queues.waiting and queues.must_wait(function.name)
        )
        chosen = None if overtakes else self._choose()
        if chosen is None:
            self._wait()
        else:
            self._attempt(*chosen)

    def _attempt(self, candidate: Candidate, sent: Sent | None) -> None:
        """Counts it, and sends the request to one replica."""
        state, record = self._state, self.record
        replica = candidate.id
        self._candidate = candidate
        self._left -= 1
        self._tried = (*self._tried, replica)
        record.attempts += 1
        record.replica = replica
        state.in_flight.sent(replica)
        if state.breakers:
            breaker = state.breakers.get(replica)
            if breaker is not None and breaker.state(perf_counter()) == "half-open":
                breaker.trying = True
                self._breaker = breaker
        if self._seen is not None:
            self._proxy.decisions.noted(self._seen)
            self._seen = None
        if sent is not None:
            self._sent = self._judged = sent
            sent.begin()
        if record.trace is not None:
            record.trace.attempt(candidate, record)
        self._pool = state.pool(candidate)
        self._send()
        if self._conversation is not None:
            self._conversation.served(replica)
            if self._function.name in self._snapshot.shadowed and record.attempts == 1:
                self._copy_to_shadows(self._conversation)

    def _send(self) -> None:
        assert self._pool is not None
        connection = self._pool.take()
        if connection is None:
            self._later(self._connect, self._pool)
        else:
            self._use(connection)

    async def _connect(self, pool: Pool) -> None:
        began = perf_counter()
        try:
            connection = await pool.connect(self._function.policy.connect_timeout_s)
        except UpstreamFailed as error:
            self._attempt_failed(error)
            return
        self._proxy.brain.connected(self._candidate, perf_counter() - began)
        self._use(connection)

    def _use(self, connection: Connection) -> None:
        proxy, policy = self._proxy, self._function.policy
        self._connection = connection
        now = perf_counter()
        relay = self._relay = Relay(
            self,
            connection,
            policy.between_chunks_timeout_s,
            proxy.settings.client_stall_timeout_s,
            policy.first_byte_timeout_s,
            now,
        )
        proxy.deadlines.watch(relay)
        if not self.record.dispatched:
            self.record.dispatched = now
        lines = self._headers.passed
        if self.record.trace is not None:
            lines = self.record.trace.passed_on(lines)
        head = self._head(self._candidate, lines, self.record.id)
        connection.send(head, self._sent_body, relay)

    # What becomes of the attempt: called by the relay.

    def answered(self) -> None:
        """Some of the body is there: it is delivered, or thrown away for another's."""
        try:
            self._judge()
        except Refused as refused:
            self._refuse(refused.refusal)
        except Exception as error:  # noqa: BLE001 - the engine's connection must not take the blame
            self._fail(error)

    def ended(self, error: Exception | None) -> None:
        """The answer is complete, or will never be."""
        try:
            if error is None:
                self._end(keep=self._keep)
            elif self._client.transport is not None and not self._delivering:
                assert isinstance(error, UpstreamFailed)
                self._attempt_failed(error)
            else:
                self._broke_off(error)
        except Exception as bug:  # noqa: BLE001 - as above
            self._fail(bug)

    def _judge(self) -> None:
        relay = self._relay
        assert relay is not None
        assert relay.head is not None
        head = relay.head
        if head.status < 400:
            if self._state.breakers:
                self._state.recovered(self._candidate.id)
            self._deliver(relay, head)
            return
        start = b""
        if head.status == 500:
            start = relay.start()
            if not relay.complete and len(start) < _LOOKED_AT_BYTES:
                return  # more is to come, and decides
        if is_retryable(head.status, start):
            self._rest(head)
            alternative = self._choose_again()
            if alternative is not None:
                if head.status != 429:
                    self._proxy.abandoned(self._candidate.id)
                self._end_attempt()
                self._attempt(*alternative)
                return
            if self._fallbacks:
                raise Refused(errors.at_capacity(self._function.name))
        elif head.status < 500:
            self._state.recovered(self._candidate.id)
        self._deliver(relay, head)

    def _attempt_failed(self, error: UpstreamFailed) -> None:
        """Nothing of an answer came: again elsewhere, if that may help."""
        if error.stale:
            # The engine closed it while it was idle: that says nothing about the engine.
            self._drop_connection()
            self._send()
            return
        self._blame(error)
        if self.record.trace is not None:
            self.record.trace.failed(error)
        too_late = isinstance(error, UpstreamTimeout) and error.phase != "connect"
        alternative = None if too_late else self._choose_again()
        if alternative is None:
            self._refuse(self._why(error))
            return
        self._proxy.abandoned(self._candidate.id)
        self._end_attempt()
        self._attempt(*alternative)

    def _why(self, error: UpstreamFailed) -> Refusal:
        if isinstance(error, UpstreamTimeout) and error.phase == "first-byte":
            return errors.upstream_timeout(self._function.name, error.waited_s)
        return errors.upstream_failed(self._function.name)

    def _blame(self, error: UpstreamFailed) -> None:
        """A failure that is the replica's fault."""
        kind: Failure = "failed"
        if isinstance(error, ConnectFailed):
            kind = "refused"
        elif isinstance(error, UpstreamTimeout):
            kind = "timeout"
        replica = self._candidate.id
        breaker, now = self._state.breaker(replica), perf_counter()
        before = breaker.state(now)
        breaker.failed(now, kind)
        if before == "closed" and breaker.state(now) == "open":
            _log.warning("replica %s is kept out: %s", replica, error)

    def _rest(self, head: ResponseHead) -> None:
        """It answered that it takes no more: for how long, it says itself or is guessed."""
        breaker, now = self._state.breaker(self._candidate.id), perf_counter()
        if head.status == 500:
            breaker.failed(now, "refused")  # it shuts down
            return
        text = head.retry_after or b""
        breaker.asked_for_rest(now, float(text) if text.isdigit() else _REST_S)

    def _drop_connection(self) -> None:
        relay, connection = self._relay, self._connection
        if relay is not None:
            self._relay = None
            self._proxy.deadlines.forget(relay)
            record = self.record
            record.response_bytes = relay.sent_bytes
            record.first_body = relay.first_body_at
            record.last_body = relay.since
            record.chunks = relay.chunks
        if connection is not None:
            self._connection = None
            assert self._pool is not None
            self._pool.give_back(connection)

    def _end_attempt(self) -> None:
        """Gives back what the running attempt holds, if there is one."""
        if self._pool is None:
            return
        trace = self.record.trace
        if trace is not None:
            trace.attempt_ended(self._relay)
        self._drop_connection()
        self._pool = None
        self._state.in_flight.ended(self._candidate.id)
        if self._proxy.queues.waiting:
            self._proxy.queues.freed()
        if self._breaker is not None:
            self._breaker.trying = False
            self._breaker = None
        if self._sent is not None:
            self._sent.finish()
            self._sent = None
