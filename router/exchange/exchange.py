"""A request's beginning and its end: the answer's delivery, what it used, what it gives back.

However a request ends, `_end` gives back all that it held.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from router.core.errors import Refusal, Refused
from router.downstream.answer import STATUS_LINES, refuse
from router.downstream.connection import where
from router.exchange.attempts import Attempts
from router.relay import Framing, Relay
from router.upstream.connection import ResponseHead
from router.upstream.failures import UpstreamFailed, UpstreamTimeout
from router.usage.meter import Metered

_log: Final = logging.getLogger(__name__)
_EVENTS: Final = b"text/event-stream"


class Exchange(Attempts):
    """A request and its answer. `begin` starts it; the client's connection is told of its end."""

    # The client's side.

    def begin(self) -> None:
        """Answers, or sends it on; what follows comes as calls."""
        self._state.in_flight.total += 1
        self._client.ongoing = self
        try:
            self._read()
        except Refused as refused:
            self._refuse(refused.refusal)

    def client_left(self) -> None:
        """Nobody is there to write to: ends the exchange before the engine's next bytes are read."""
        self.record.outcome = "client_gone"
        self._listen_on()
        self._end(keep=False)

    def pause(self) -> None:
        if self._relay is not None:
            self._relay.pause()

    def resume(self) -> None:
        if self._relay is not None:
            self._relay.resume()

    def _deliver(self, relay: Relay, head: ResponseHead) -> None:
        """Passes the answer on."""
        record, client = self.record, self._client
        status = head.status
        if self._sent is not None and not relay.complete:  # else it ends in a moment
            self._sent.first_token(streamed=head.content_type.startswith(_EVENTS))
        framing: Framing
        if status in (204, 304):
            framing, frame = "none", b""
        elif head.length is not None:
            framing, frame = "length", b"Content-Length: %d\r\n" % head.length
        elif self._request.modern:
            framing, frame = "chunked", b"Transfer-Encoding: chunked\r\n"
        else:
            framing, frame = "close", b""
        keep = self._request.keep_alive and self._request.modern and not self._state.draining
        self._keep = keep and framing != "close"
        record.status = status
        if status >= 400:
            record.outcome = "upstream_error" if status >= 500 else "client_error"
            if status in (429, 503) and head.retry_after is None:
                frame = b"Retry-After: 1\r\n" + frame
        lines = b"%b%b%b%b%b\r\nx-request-id: %b\r\n%b%b" % (
            STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status,
            head.headers,
            b"" if self._admission is None else self._admission.headers(),
            self._candidate.route_header,
            record.decision.encode(),
            record.id.encode(),
            frame,
            b"\r\n" if keep else b"Connection: close\r\n\r\n",
        )
        transport = client.transport
        assert transport is not None  # else client_left had been called
        self._delivering = True
        metered = self._metered = self._meter()
        if metered is not None and metered.answered(
            status, head.content_type, fixed=framing == "length"
        ):
            relay.feed = metered.feed
        if client.write_paused:
            relay.pause()
        relay.deliver(transport, lines, framing)

    def _broke_off(self, error: Exception) -> None:
        """After some of the answer was sent: it cannot be made good."""
        record, relay = self.record, self._relay
        assert relay is not None
        if not isinstance(error, UpstreamFailed):
            self.client_left()
            return
        told = relay.tell_of_failure()
        self._blame(error)
        record.outcome = "timeout" if isinstance(error, UpstreamTimeout) else "interrupted"
        # A stream that ended with an error event is complete; to close its connection would
        # break the request that the client may be sending on it already.
        self._end(keep=told and self._keep)

    # What it used.

    def _meter(self) -> Metered | None:
        """None where nothing is used, or nothing was sent."""
        record = self.record
        if self._endpoint.stored or not record.attempts:
            return None
        return Metered(
            self._proxy.meter,
            record,
            self._function,
            self._snapshot.revision,
            self._endpoint.task,
            self._metering,
        )

    def _listen_on(self) -> None:
        """The client has left: what the engine has sent by now is counted all the same."""
        connection, relay, proxy = self._connection, self._relay, self._proxy
        if connection is None or relay is None or relay.complete or not proxy.meter.wanted:
            return
        metered = self._metered
        if metered is None:
            metered = self._meter()
            head = relay.head
            # The head may have come alone, before any of the body.
            if metered is not None and head is not None:
                metered.answered(head.status, head.content_type)
        if metered is not None:
            self._connection = None
            self._settled = True
            proxy.listen_on(connection, metered, self._used)

    def _settle(self) -> None:
        """What it used is known, or nothing was sent: noted once, and given back what it did not need."""
        if self._settled:
            return
        self._settled = True
        metered = self._metered or self._meter()
        if metered is not None:
            self._used(metered)
        elif self._admission is not None:
            self._admission.release()

    def _used(self, metered: Metered) -> None:
        """For the ledger, and for what it stood under."""
        record, admission = self.record, self._admission
        usage = record.usage = metered.finish()
        # Only a whole answer says what was cached: before its end an engine leaves that out.
        if self._judged is not None and record.outcome == "ok" and not usage.estimated:
            self._judged.used(usage.input_tokens, usage.cached_tokens)
        tokens = usage.input_tokens, usage.output_tokens
        if not metered.known and record.outcome == "ok":
            tokens = self._estimated()
        if admission is not None:
            admission.settle(*tokens, metered.nano_usd if metered.known else None)
        if self._place is not None:
            self._place.needed(sum(tokens))

    # Ends.

    def _refuse(self, refusal: Refusal) -> None:
        """Another function answers instead, or the router itself does."""
        self._end_attempt()
        if self._fallbacks and refusal.elsewhere:
            admission, self._admission = self._admission, None
            if admission is not None:
                admission.undo()
            if refusal.code == "upstream_failed":
                self._proxy.abandoned(self._candidate.id)
            try:
                self._ask_function(self._fallbacks)
            except Refused as refused:
                self._refuse(refused.refusal)
            return
        record, request = self.record, self._request
        self._proxy.refused(refusal, record)
        keep = request.keep_alive and not self._state.draining
        transport = self._client.transport
        if transport is not None:
            transport.write(refuse(refusal, record.id, close=not keep))
        self._end(keep=keep)

    def _fail(self, error: BaseException) -> None:
        """A defect of the router's own ends this request and no other."""
        delivering = self._delivering
        self._end(keep=None)
        if delivering:
            _log.error("a request failed in the router: %s", where(error))
            self._client.abort()  # an answer that is cut is no answer; a second one would be a lie
        else:
            self._client.failed(error)

    def _end(self, *, keep: bool | None) -> None:
        """However it ended: gives back everything, once. `keep` None: the client hears it elsewhere."""
        if self._over:
            return
        self._over = True
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task(self._proxy.loop):
            task.cancel()
        self._end_attempt()
        if self._place is not None:
            self._place.leave()
        self._state.in_flight.total -= 1
        self._settle()
        self._proxy.over(self.record)
        if keep is not None:
            self._client.done(keep=keep)
