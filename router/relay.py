"""One answer on its way from an engine's connection to a client's transport.

Bytes are written as they come: no queue, no task, no look at them. Deadlines, back-pressure and the
end of a broken stream are here. Not here: what follows from an answer or a failure (exchange).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Final, Literal, Protocol

from router.core.errors import died_mid_stream
from router.upstream.connection import Connection, ResponseHead
from router.upstream.failures import ClientGone, UpstreamFailed, UpstreamTimeout

Framing = Literal["length", "chunked", "close", "none"]

_ERROR_EVENT: Final = b"data: " + died_mid_stream().body() + b"\n\n"
_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


class Owner(Protocol):
    """Who the answer is for."""

    def answered(self) -> None:
        """Some of the body is there and not delivered yet, or there is none. May come again."""

    def ended(self, error: Exception | None) -> None:
        """Nothing more will come. Before `deliver`: nothing has been sent to the client."""


class Relay:
    """Receiver of one exchange. Watch it from when it is made.

    `patience_s`: seconds to the first byte; later what else is waited for. `since`: `perf_counter`
    seconds when the engine was last heard of, or the client last read.
    """

    head: ResponseHead | None = None
    complete: bool = False
    error: Exception | None = None
    chunks: int = 0
    sent_bytes: int = 0
    first_body_at: float = 0.0
    """`perf_counter` seconds; 0 while there was none."""
    _transport: asyncio.Transport | None = None
    _framing: Framing = "length"
    feed: Callable[[bytes, bool], bytes] | None = None
    """Sees the body that is delivered, and says what the client gets of it."""
    _last: bytes = b""
    _paused: bool = False

    def __init__(
        self,
        owner: Owner,
        connection: Connection,
        between_s: float,
        stall_s: float,
        patience_s: float,
        since: float,
    ) -> None:
        self._owner = owner
        self._connection = connection
        self._between_s = between_s
        self._stall_s = stall_s
        self.patience_s = patience_s
        self.since = since
        self._buffered: list[bytes] = []

    # Receiver: called by the upstream connection.

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        self.since = now = perf_counter()
        if data:
            self.chunks += 1
            if not self.first_body_at:
                self.first_body_at = now
                self.patience_s = self._between_s
        if head is not None:
            self.head = head
        if complete:
            self.complete = True
        if self._transport is None:
            if data:
                self._buffered.append(data)
            # A head alone is no answer yet: until there is some body, another replica may be asked.
            if data or complete:
                self._owner.answered()
            return
        self._write(data if self.feed is None else self.feed(data, complete))
        if complete:
            self._owner.ended(None)

    def _on_chunk(self, data: bytes, framed: bytes) -> None:
        """Nearly all of a stream: a chunk alone, passed on with the framing that it came in."""
        self.since = perf_counter()
        self.chunks += 1
        if self.feed is not None:
            kept = self.feed(data, False)
            if kept is not data:
                if not kept:
                    return
                data, framed = kept, b"%x\r\n%b\r\n" % (len(kept), kept)
        self._last = data[-4:]  # all of it would be kept for a client that does not read
        self.sent_bytes += len(data)
        assert self._transport is not None
        self._transport.write(framed)

    def failed(self, error: UpstreamFailed) -> None:
        self._end(error)

    # The exchange's side.

    def start(self) -> bytes:
        """What the body begins with, before anything is delivered."""
        return b"".join(self._buffered)

    def deliver(self, transport: asyncio.Transport, head_lines: bytes, framing: Framing) -> None:
        """Sends the head and what there is of the body; the rest follows as it comes."""
        self._framing = framing
        buffered = self._buffered
        data = buffered[0] if len(buffered) == 1 else b"".join(buffered)
        buffered.clear()
        self._transport = transport
        if self.feed is not None:
            data = self.feed(data, self.complete)
        self._write(data, head_lines)
        if self.complete:
            self._owner.ended(None)
        elif framing == "chunked":
            self._connection.on_chunk = self._on_chunk

    def pause(self) -> None:
        """The client reads too slowly: read no more from the engine."""
        upstream = self._connection.transport
        if not self._paused and upstream is not None and not self.complete:
            self._paused = True
            upstream.pause_reading()
            self.since = perf_counter()
            self.patience_s = self._stall_s

    def resume(self) -> None:
        """The client has caught up."""
        upstream = self._connection.transport
        if self._paused and upstream is not None and not self._connection.closed:
            self._paused = False
            self.since = perf_counter()
            self.patience_s = self._between_s
            upstream.resume_reading()

    def tell_of_failure(self) -> bool:
        """In a stream of events: one that says so. Else the framing stays visibly incomplete.

        Returns whether the answer has an end now, so that another may follow on its connection.
        """
        assert self.head is not None
        if not (
            self.head.content_type.startswith(b"text/event-stream")
            and self._framing in ("chunked", "close")
        ):
            return False
        event = _ERROR_EVENT
        if self._last and not self._last.endswith(_EVENT_ENDS):
            event = b"\n\n" + event
        self.complete = True
        self._write(event)
        return True

    # Inside.

    def _write(self, data: bytes, head_lines: bytes = b"") -> None:
        assert self._transport is not None
        if data:
            self._last = data[-4:]
            self.sent_bytes += len(data)
        if self._framing == "chunked":
            if data:
                end = b"\r\n0\r\n\r\n" if self.complete else b"\r\n"
                out = b"%b%x\r\n%b%b" % (head_lines, len(data), data, end)
            else:
                out = head_lines + b"0\r\n\r\n" if self.complete else head_lines
        elif self._framing == "none":
            out = head_lines
        else:
            out = head_lines + data if head_lines else data
        if out:
            self._transport.write(out)

    def _end(self, error: Exception) -> None:
        if self.complete or self.error is not None:
            return
        self.error = error
        self._owner.ended(error)

    def expired(self) -> None:
        """The engine said nothing, or the client read nothing, for too long."""
        if self._paused:
            self._end(ClientGone(f"the client read nothing for {self._stall_s:g} s"))
        elif self.first_body_at:
            self._end(UpstreamTimeout("between-chunks", self._between_s))
        else:
            self._end(UpstreamTimeout("first-byte", self.patience_s))
