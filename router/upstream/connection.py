"""One keep-alive HTTP/1.1 connection to an engine, carrying one exchange at a time.

llhttp (httptools) reads heads and framing; body bytes are handed on as they come, unread. In the
middle of a stream nearly every read is one whole chunk: such a one is told at a glance, and spared
llhttp. Not here: which engine (core.pick), keeping connections (pool), and what becomes of the bytes
(relay).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol, cast

import httptools

from router.upstream.failures import UpstreamFailed

MAX_HEAD_BYTES: Final = 64 * 1024
_JOIN_BYTES: Final = 64 * 1024

_READ_VIEW: Final = memoryview(bytearray(64 * 1024))
"""Where every connection reads into: what was read is copied out before the loop reads again. Its size
bounds what a client that does not read can make the router hold."""

_SIZE_DIGITS: Final = 8
"""Of a chunk, in hexadecimal, that is told at a glance."""
_ZERO: Final = 0x30
_FEW_BYTES: Final = 4096
_SIZES: Final = [b"%x" % size for size in range(_FEW_BYTES)]
"""Of chunks, as they are written."""

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        # The router's own are added to the answer; an engine cannot speak for it.
        b"content-length",
        b"x-request-id",
        b"x-detoserve-route",
    }
)


def _nobody() -> None:
    """Nobody asks when a connection is lost."""


class ResponseHead:
    """An answer's head, with what the router must not pass on already left out.

    `headers`: `name: value` lines, each with its line end. `length`: of the body; None when it is
    chunked or ends with the connection.
    """

    def __init__(
        self,
        status: int,
        headers: bytes,
        content_type: bytes,
        retry_after: bytes | None,
        length: int | None,
    ) -> None:
        self.status = status
        self.headers = headers
        self.content_type = content_type
        self.retry_after = retry_after
        self.length = length


class Receiver(Protocol):
    """Who an exchange's answer goes to."""

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        """Once per read: the head if it was in it, body bytes, and whether they are the last."""

    def failed(self, error: UpstreamFailed) -> None:
        """Nothing more will come."""


class Connection(asyncio.BufferedProtocol):
    """The protocol. `send` starts an exchange; the receiver hears of it until its end."""

    __slots__ = (
        "_body",
        "_chunked",
        "_complete",
        "_content_type",
        "_head",
        "_head_bytes",
        "_headers",
        "_length",
        "_parser",
        "_receiver",
        "_retry_after",
        "_within",
        "closed",
        "idle_since",
        "kept",
        "on_body",
        "on_chunk",
        "on_chunk_complete",
        "on_chunk_header",
        "on_lost",
        "reusable",
        "transport",
    )

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.reusable = False
        self.kept = False
        """It was idle before: the engine may be closing it while a request is sent."""
        self.idle_since = 0.0
        self.on_lost: Callable[[], None] = _nobody
        self._receiver: Receiver | None = None
        self._body: list[bytes] = []
        self.on_body = self._body.append
        """What llhttp calls with body bytes; without a Python frame for each."""
        self._within: list[str] = []
        """Empty while llhttp is between two chunks; else what it is within."""
        self.on_chunk_header = partial(self._within.append, "a chunk")
        self.on_chunk_complete = self._within.clear
        self.on_chunk: Callable[[bytes, bytes], None] | None = None
        """Set it to get each whole chunk that comes alone: its bytes, and the same with their framing.

        Its receiver gets all others. Goes with the exchange."""
        self._parser: Any = httptools.HttpResponseParser(self)
        self._begin()

    def _begin(self) -> None:
        self._head: ResponseHead | None = None
        self._head_bytes = 0
        self._headers: list[bytes] = []
        self._content_type = b""
        self._retry_after: bytes | None = None
        self._length: int | None = None
        self._chunked = False
        self._complete = False
        self.reusable = False
        self.on_chunk = None
        self._within[:] = ("a head, or a body without chunks",)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports behave as asyncio.Transport without being one.
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio calls it so
        return _READ_VIEW

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(_READ_VIEW[:nbytes])
        on_chunk = self.on_chunk
        if on_chunk is not None and not self._within:
            size_end = data.find(b"\r\n", 1, 2 + _SIZE_DIGITS)
            size = nbytes - size_end - 4
            if size_end > 0 and size > 0 and data[0] != _ZERO:
                chunk = data[size_end + 2 : -2]
                # As the size would be written of just these bytes: so it is theirs, and nothing else.
                told = _SIZES[size] if size < _FEW_BYTES else b"%x" % size
                if data.startswith(told) and len(told) == size_end and data.endswith(b"\r\n"):
                    on_chunk(chunk, data)
                    return
        receiver = self._receiver
        if receiver is None:
            # Nothing was asked: whatever this is, it must not become the next answer.
            self.close()
            return
        had_head = self._head
        if had_head is None:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError) as error:
            self._fail(f"the answer is not HTTP/1.1: {type(error).__name__}")
            return
        if not self._within and not data.endswith(b"\r\n"):
            self._within.append("the size of a chunk")
        head = self._head
        if head is None:
            if self._head_bytes > MAX_HEAD_BYTES:
                self._fail(f"the answer's head is over {MAX_HEAD_BYTES} bytes")
            return
        body = self._body
        out = body.pop() if body else b""
        if body:
            out = b"".join((*body, out))
            body.clear()
        if self._complete:
            self._receiver = self.on_chunk = None
            self.reusable = self.reusable and not self.closed
        if out or had_head is None or self._complete:
            receiver.received(None if had_head else head, out, self._complete)

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.reusable = False
        self._parser = None  # it holds this object: a cycle that only the collector would end
        self.on_lost()
        self.on_lost = _nobody
        receiver = self._receiver
        if receiver is None:
            return
        self._receiver = self.on_chunk = None
        if self._head is not None and self._length is None and exc is None and not self._chunked:
            # Neither a length nor chunks: the end of the connection is the end of the body.
            receiver.received(None, b"", True)
            return
        began = self._head_bytes > 0
        receiver.failed(
            UpstreamFailed(
                "the connection was lost" if exc is None else type(exc).__name__,
                began=began,
                # Closed while it was idle; silence is another thing, and tells of the machine.
                stale=not began and self.kept and not isinstance(exc, TimeoutError),
            )
        )

    def pause_writing(self) -> None:
        """The request is in memory already; there is nobody to hold back."""

    def resume_writing(self) -> None:
        """See pause_writing."""

    # What llhttp calls.

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("bytes after the end of the answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower not in _HOP_BY_HOP:
            self._headers.append(b"%b: %b\r\n" % (name, value))
            if lower == b"content-type":
                self._content_type = value
            elif lower == b"retry-after":
                self._retry_after = value
        elif lower == b"content-length":
            self._length = int(value)
        elif lower == b"transfer-encoding":
            self._chunked = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return
        self._head = ResponseHead(
            status, b"".join(self._headers), self._content_type, self._retry_after, self._length
        )

    def on_message_complete(self) -> None:
        if self._head is None:
            self._begin()  # 1xx: the answer itself is still to come
            return
        self._complete = True
        self.reusable = self._parser.should_keep_alive()

    # What the router calls.

    def send(self, head: bytes, body: bytes, receiver: Receiver) -> None:
        """Starts an exchange. The connection must be idle and open."""
        assert self.transport is not None
        assert self._receiver is None
        self._begin()
        self._receiver = receiver
        if len(body) <= _JOIN_BYTES:
            self.transport.write(head + body)  # a copy costs less than a second system call
        else:
            self.transport.write(head)
            self.transport.write(body)

    def hand_over(self, receiver: Receiver) -> bool:
        """Another hears the rest of the running exchange; False where none is running."""
        if self._receiver is None or self.closed:
            return False
        self._receiver = receiver
        self.on_chunk = None
        return True

    def close(self) -> None:
        """Ends the connection at once; a running exchange's receiver hears no more."""
        self._receiver = self.on_chunk = None
        self.closed = True
        self.reusable = False
        if self.transport is not None:
            self.transport.abort()

    def _fail(self, message: str) -> None:
        receiver = self._receiver
        began = self._head_bytes > 0
        self.close()
        if receiver is not None:
            receiver.failed(UpstreamFailed(message, began=began))
