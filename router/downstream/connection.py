"""One keep-alive HTTP/1.1 connection of a client, answering one request at a time.

llhttp (httptools) reads heads and framing. A complete request is handed to the server's handler in
the same call that read its last byte: no task, no queue. Requests that a client sends ahead wait
their turn. Not here: what is answered (server, exchange).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from math import inf
from time import perf_counter
from typing import Any, Final, Protocol, cast

import httptools

from router.core.errors import BODY_TIMEOUT, Refusal, bad_request, too_large
from router.deadlines import Deadlines
from router.downstream.answer import refuse
from router.downstream.request import Request
from router.downstream.same_head import KnownHeads, SameHead

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_HEADERS: Final = 200
MAX_AHEAD_BYTES: Final = 64 * 1024
"""Of further requests, read while one is answered; beyond it the client is read no more."""
MIN_BODY_BYTES_PER_S: Final = 4096
"""A body may take its pause, and as long as it takes at this pace: one that trickles ends."""
_UNLIKE_HEADS: Final = 3
"""After so many heads that differ, those of a connection are not compared any more."""
_LINGER_S: Final = 2.0
"""How long the rest of a refused body is read, so that the client sees the refusal."""
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_BAD_HTTP: Final = bad_request("The request is not valid HTTP/1.1.", code="invalid_http")
_BUG: Final = Refusal(500, "The router failed.", "server_error", "internal_error")
_log: Final = logging.getLogger(__name__)


class Ongoing(Protocol):
    """A request that is being answered."""

    def client_left(self) -> None:
        """Nobody is there to answer any more."""

    def pause(self) -> None:
        """The client reads too slowly."""

    def resume(self) -> None:
        """It has caught up."""


class Handler(Protocol):
    """What answers requests."""

    def look_at_head(self, request: Request) -> Refusal | bool:
        """Of a request whose body is still to come: a refusal, or whether the client waits for 100."""

    def serve(self, request: Request, client: ClientConnection) -> None:
        """Answers by `client.transport`, then calls `client.done`: now, or later as `client.ongoing`."""


class ClientServer:
    """Makes a ClientConnection for every connection, and knows them all."""

    def __init__(
        self, handler: Handler, *, max_body_bytes: int, body_timeout_s: float, keepalive_s: float
    ) -> None:
        self.handler = handler
        self.max_body_bytes = max_body_bytes
        self.body_timeout_s = body_timeout_s
        self.keepalive_s = keepalive_s
        self.connections: set[ClientConnection] = set()
        self.heads = KnownHeads()
        self.deadlines = Deadlines(tick_s=0.1)
        self.loop = asyncio.get_running_loop()

    def __call__(self) -> ClientConnection:
        return ClientConnection(self)

    def close(self) -> None:
        """Cuts every connection; what was being answered hears that its client left."""
        for connection in list(self.connections):
            connection.abort()


class ClientConnection(asyncio.Protocol):
    """The protocol; the handler's side is `transport`, `ongoing`, `write_paused`, `done`, `failed`."""

    __slots__ = (
        "_ahead",
        "_ahead_bytes",
        "_body",
        "_body_bytes",
        "_complete",
        "_deaf",
        "_head_bytes",
        "_head_read",
        "_headers",
        "_looked_at",
        "_parser",
        "_reading_paused",
        "_request",
        "_same_head",
        "_server",
        "_target",
        "_unlike",
        "ongoing",
        "patience_s",
        "since",
        "transport",
        "write_paused",
    )

    def __init__(self, server: ClientServer) -> None:
        self._server = server
        self.transport: asyncio.Transport | None = None
        self.ongoing: Ongoing | None = None
        self.write_paused = False
        self.since = perf_counter()
        self.patience_s = server.keepalive_s
        self._parser: Any = httptools.HttpRequestParser(self)
        self._request: Request | None = None
        """Being read."""
        self._same_head: SameHead | None = None
        self._unlike = 0
        """Heads in a row that were not the one before."""
        self._complete: deque[Request] = deque()
        """Read, and not begun."""
        self._ahead: list[bytes] = []
        """Not even looked at: the client sent it while it was to wait for an answer."""
        self._headers: list[tuple[bytes, bytes]] = []
        self._ahead_bytes = 0
        self._target = b""
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._head_bytes = 0
        self._head_read = False
        self._looked_at = False
        self._deaf = False
        """What still comes is thrown away: the last answer is given."""
        self._reading_paused = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports behave as asyncio.Transport without being one.
        self.transport = cast("asyncio.Transport", transport)
        self._server.connections.add(self)
        self._server.deadlines.watch(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio calls it so
        self.transport = None
        self._deaf = True
        self._server.connections.discard(self)
        self._server.deadlines.forget(self)
        self._parser = None  # it holds this object: a cycle that only the collector would end
        self._complete.clear()
        self._ahead.clear()
        ongoing, self.ongoing = self.ongoing, None
        if ongoing is not None:
            ongoing.client_left()

    def pause_writing(self) -> None:
        self.write_paused = True
        if self.ongoing is not None:
            self.ongoing.pause()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self.ongoing is not None:
            self.ongoing.resume()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        if self.ongoing is None and not self._complete and not self._ahead:
            request = self._known(data) if self._request is None else None
            if request is None:
                self._read(data)
            else:
                self._unlike = 0
                request.transport = self.transport
                self._serve(request)
            return
        self._ahead.append(data)
        self._ahead_bytes += len(data)
        if not self._reading_paused and self._ahead_bytes > MAX_AHEAD_BYTES:
            assert self.transport is not None
            self._reading_paused = True
            self.transport.pause_reading()

    def _known(self, data: bytes) -> Request | None:
        """The request, if its head came before: by this connection, or else by any."""
        server, head = self._server, self._same_head
        request = head.again(data, server.max_body_bytes) if head is not None else None
        if request is None and self._unlike < _UNLIKE_HEADS:
            head = server.heads.find(data)
            request = head.again(data, server.max_body_bytes) if head is not None else None
            if request is not None:
                self._same_head = head
        return request

    def _read(self, data: bytes) -> None:
        fresh = self._request is None
        if not self._head_read:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._complete[-1].method != "CONNECT":
                self._decline_upgrade(data[upgrade.args[0] :])
                return
            self._complete[-1].keep_alive = False  # what follows would be the tunnel's
        except (httptools.HttpParserError, ValueError):
            # Nor is what came in the same breath answered: who knows where it ends.
            self._complete.clear()
            self._refuse(_BAD_HTTP)
            return
        if self._complete:
            request = self._complete[0]
            self._serve_next()
            if fresh and self._unlike < _UNLIKE_HEADS:
                self._unlike += 1
                self._same_head = head = SameHead.of(data, request)
                if head is not None:
                    self._server.heads.add(head)
        elif self._head_read:
            self._await_body()
        elif self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_BAD_HTTP)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Nothing is upgraded here: the request is read again as if it had not been offered.

        llhttp ends a request at such an offer, and takes its body for the other protocol's.
        """
        request = self._complete.pop()
        head = [f"{request.method} {request.target} HTTP/1.1\r\n".encode("latin-1")]
        head += [b"%b: %b\r\n" % h for h in request.headers if h[0].lower() != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        self._read(b"".join((*head, b"\r\n", rest)))

    def _await_body(self) -> None:
        """Some of the body is still to come; who may not send it is told before it does."""
        server, request = self._server, self._request
        assert request is not None
        if not self._looked_at:
            self._looked_at = True
            self.since = perf_counter()
            answer = server.handler.look_at_head(request)
            if isinstance(answer, Refusal):
                self._refuse(answer)
                return
            if answer and not self._body_bytes and self.transport is not None:
                self.transport.write(_CONTINUE)
        if self._body_bytes > server.max_body_bytes:
            self._refuse(too_large(server.max_body_bytes))
            return
        self.patience_s = server.body_timeout_s + self._body_bytes / MIN_BODY_BYTES_PER_S

    # What llhttp calls.

    def on_message_begin(self) -> None:
        self._headers = []
        self._request = Request(self._headers)
        self._request.transport = self.transport
        self._head_read = self._looked_at = False
        self._target = b""
        self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._target += url  # in pieces where it came so

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_read:  # a trailer says nothing that anyone here would believe
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        request, parser = self._request, self._parser
        assert request is not None
        headers = self._headers
        if self._head_bytes > MAX_HEAD_BYTES and (
            len(self._target) + sum([len(name) + len(value) + 4 for name, value in headers])
            > MAX_HEAD_BYTES
        ):
            raise ValueError("the head is too large")
        if len(headers) > MAX_HEADERS:
            raise ValueError("too many headers")
        request.method = parser.get_method().decode("latin-1")
        target = request.target = self._target.decode("latin-1")
        request.path = target.partition("?")[0] if "?" in target else target
        request.modern = parser.get_http_version() == "1.1"
        request.keep_alive = parser.should_keep_alive()
        self._head_read = True

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes <= self._server.max_body_bytes:
            self._body.append(body)

    def on_message_complete(self) -> None:
        request, body = self._request, self._body
        assert request is not None
        request.too_large = self._body_bytes > self._server.max_body_bytes
        request.body = body[0] if len(body) == 1 else b"".join(body)
        self._body = []
        self._request = None
        self._head_read = False
        self._head_bytes = 0
        self._complete.append(request)

    # What the handler calls.

    def done(self, *, keep: bool) -> None:
        """The answer is written. `keep`: its end can be told, and another may follow it."""
        self.ongoing = None
        if self.transport is None:
            return
        if not keep:
            self._deaf = True
            self.transport.close()
            return
        self.since = perf_counter()
        self.patience_s = self._server.keepalive_s
        if self._complete or self._ahead:
            self._server.loop.call_soon(self._go_on)

    def abort(self) -> None:
        """Ends the connection at once, whatever is on the way."""
        if self.transport is not None:
            self._deaf = True
            self.transport.abort()

    # Inside.

    def _serve_next(self) -> None:
        self._serve(self._complete.popleft())

    def _serve(self, request: Request) -> None:
        self.patience_s = inf
        if request.too_large:
            self._refuse(too_large(self._server.max_body_bytes))
            return
        try:
            self._server.handler.serve(request, self)
        except Exception as error:  # noqa: BLE001 - one request must not end the others
            self.failed(error)

    def failed(self, error: BaseException) -> None:
        """The router got something wrong: said without any detail, for that may quote a prompt."""
        _log.error("a request failed in the router: %s", where(error))
        self.ongoing = None
        self._refuse(_BUG)

    def _go_on(self) -> None:
        """With what the client sent ahead."""
        if self._deaf or self.ongoing is not None:
            return
        if self._complete:
            self._serve_next()
            return
        data = b"".join(self._ahead)
        self._ahead.clear()
        self._ahead_bytes = 0
        if self._reading_paused and self.transport is not None:
            self._reading_paused = False
            self.transport.resume_reading()
        if data:
            self._read(data)

    def _refuse(self, refusal: Refusal) -> None:
        """Answers what is no request, or not to be read to its end; nothing more is read after it."""
        self._complete.clear()
        self._ahead.clear()
        self._deaf = True
        if self.transport is None:
            return
        self.transport.write(refuse(refusal, "req_unread", close=True))
        self.since = perf_counter()
        self.patience_s = _LINGER_S
        # Closing now would take back the answer where the client is still sending.
        self.transport.write_eof()

    def expired(self) -> None:
        """The client took too long to send, or to take its leave."""
        if self._request is not None and self._head_read and not self._deaf:
            self._refuse(BODY_TIMEOUT)
            self._server.deadlines.watch(self)
        elif self._request is None and not self._deaf and self.transport is not None:
            self._deaf = True
            self.transport.close()  # idle: a client that comes back sees an end, not a fault
        else:
            self.abort()


def where(error: BaseException) -> str:
    """Kind and place of an error, without its text."""
    trace = error.__traceback__
    place = ""
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}"
