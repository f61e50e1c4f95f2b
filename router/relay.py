"""One answer on its way from an engine's connection to a client's transport.

Bytes are written as they come: no queue, no task, no look at them. Deadlines, back-pressure and the
end of a broken stream are here. Not here: choosing a replica or trying another (proxy).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from time import perf_counter
from typing import Final, Literal

from router.core.errors import died_mid_stream
from router.upstream.connection import Connection, ResponseHead, UpstreamFailed, UpstreamTimeout

Framing = Literal["length", "chunked", "close", "none"]

STATUS_LINES: Final[dict[int, bytes]] = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_ERROR_EVENT: Final = b"data: " + died_mid_stream().body() + b"\n\n"
_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")


class ClientGone(ConnectionError):
    """The client reads nothing, or is not there any more."""


class Relay:
    """Receiver of one exchange."""

    __slots__ = (
        "_between_s",
        "_buffered",
        "_connection",
        "_done",
        "_framing",
        "_head_waiter",
        "_last",
        "_last_at",
        "_loop",
        "_paused_at",
        "_stall_s",
        "_streaming",
        "_timer",
        "_transport",
        "_waits_for_first_s",
        "chunks",
        "complete",
        "error",
        "first_body_at",
        "head",
        "sent_bytes",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Connection,
        *,
        first_byte_timeout_s: float,
        between_chunks_timeout_s: float,
        client_stall_timeout_s: float,
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._waits_for_first_s = first_byte_timeout_s
        self._between_s = between_chunks_timeout_s
        self._stall_s = client_stall_timeout_s
        self._transport: asyncio.Transport | None = None
        self._framing: Framing = "length"
        self._streaming: Callable[[bytes], None] | None = None
        self._buffered: list[bytes] = []
        self._last = b""
        self._last_at = 0.0
        self._paused_at = 0.0
        self._head_waiter: asyncio.Future[None] | None = None
        self._done: asyncio.Future[None] | None = None
        self.head: ResponseHead | None = None
        self.complete = False
        self.error: Exception | None = None
        self.chunks = 0
        self.sent_bytes = 0
        self.first_body_at = 0.0
        """`perf_counter` seconds; 0 while there was none."""
        self._timer = loop.call_later(first_byte_timeout_s, self._no_first_byte)

    # Receiver: called by the upstream connection.

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        self._last_at = now = perf_counter()
        begins = False
        if data:
            self.chunks += 1
            if self._streaming and not complete:
                # Nearly every call is this one: an event in the middle of a stream.
                self._last = data[-4:]  # all of it would be kept for a client that does not read
                self.sent_bytes += len(data)
                self._streaming(b"%x\r\n%b\r\n" % (len(data), data))
                return
            if not self.first_body_at:
                self.first_body_at = now
                begins = True
        if head is not None:
            self.head = head
        if complete:
            self.complete = True
            self._timer.cancel()
        elif begins:
            self._timer.cancel()
            self._timer = self._loop.call_later(self._between_s, self._check_between)
        if self._transport is not None:
            self._write(data)
            waiter = self._done if complete else None
        else:
            if data:
                self._buffered.append(data)
            # A head alone is no answer yet: until there is some body, another replica may be asked.
            waiter = self._head_waiter if data or complete else None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def failed(self, error: UpstreamFailed) -> None:
        self._end(error)

    @property
    def last_at(self) -> float:
        """When the engine was last heard of, in `perf_counter` seconds."""
        return self._last_at

    # The proxy's side.

    async def answered(self) -> ResponseHead:
        """The answer's head, as soon as there is some of its body, or it has none.

        Raises:
            UpstreamFailed: when the connection ends, or the first-byte deadline passes, before.
        """
        if not self._buffered and not self.complete and self.error is None:
            self._head_waiter = self._loop.create_future()
            await self._head_waiter
        if self.head is None or not (self._buffered or self.complete):
            assert self.error is not None
            raise self.error
        return self.head

    async def body_start(self, limit_bytes: int) -> bytes:
        """What the body begins with, before anything is delivered: up to its end or the limit."""
        while (
            not self.complete and self.error is None and sum(map(len, self._buffered)) < limit_bytes
        ):
            self._head_waiter = self._loop.create_future()
            await self._head_waiter
        return b"".join(self._buffered)[:limit_bytes]

    async def deliver(
        self, transport: asyncio.Transport, head_lines: bytes, framing: Framing
    ) -> None:
        """Sends head and body to the client, until the last byte is written.

        Raises:
            UpstreamFailed: the answer broke off; the client has been told as far as it can be.
            ClientGone: the client did not read for too long.
        """
        self._framing = framing
        data = self._buffered[0] if len(self._buffered) == 1 else b"".join(self._buffered)
        self._buffered.clear()
        self._transport = transport
        self._write(data, head_lines)
        if framing == "chunked":
            self._streaming = transport.write
        if not self.complete and self.error is None:
            self._done = self._loop.create_future()
            await self._done
        if self.error is not None:
            if isinstance(self.error, UpstreamFailed):
                self._tell_of_failure()
            raise self.error

    def close(self) -> None:
        """Stops the deadline. Every relay is closed, however it ended."""
        self._timer.cancel()

    def pause(self) -> None:
        """The client reads too slowly: read no more from the engine."""
        upstream = self._connection.transport
        if not self._paused_at and upstream is not None and not self.complete:
            self._paused_at = self._loop.time()
            upstream.pause_reading()
            self._timer.cancel()
            self._timer = self._loop.call_later(self._stall_s, self._client_stalled)

    def resume(self) -> None:
        """The client has caught up."""
        upstream = self._connection.transport
        if self._paused_at and upstream is not None and not self._connection.closed:
            self._paused_at = 0.0
            self._last_at = perf_counter()
            self._timer.cancel()
            if not self.complete:
                self._timer = self._loop.call_later(self._between_s, self._check_between)
            upstream.resume_reading()

    def client_left(self) -> None:
        """Nobody is there to write to: ends the exchange before the engine's next bytes are read."""
        if not self.complete:
            self._connection.close()
            self._end(ClientGone("the client left"))

    # Inside.

    def _write(self, data: bytes, head_lines: bytes = b"") -> None:
        assert self._transport is not None
        if data:
            self._last = data[-4:]  # all of it would be kept for a client that does not read
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

    def _tell_of_failure(self) -> None:
        """In a stream of events: one that says so. Else the framing stays visibly incomplete."""
        assert self._transport is not None
        assert self.head is not None
        if self.head.content_type.startswith(b"text/event-stream") and self._framing in (
            "chunked",
            "close",
        ):
            event = _ERROR_EVENT
            if self._last and not self._last.endswith(_EVENT_ENDS):
                event = b"\n\n" + event
            self.complete = True
            self._write(event)

    def _end(self, error: Exception) -> None:
        if self.complete or self.error is not None:
            return
        self.error = error
        self._timer.cancel()
        waiter = self._done if self._transport is not None else self._head_waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _no_first_byte(self) -> None:
        self._end(UpstreamTimeout("first-byte", self._waits_for_first_s))

    def _check_between(self) -> None:
        left = self._last_at + self._between_s - perf_counter()
        if left > 0.001:
            self._timer = self._loop.call_later(left, self._check_between)
        else:
            self._end(UpstreamTimeout("between-chunks", self._between_s))

    def _client_stalled(self) -> None:
        self._end(ClientGone(f"the client read nothing for {self._stall_s:g} s"))
