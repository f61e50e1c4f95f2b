"""A client's connection, and the two kinds of answer it gets.

aiohttp reads requests and keeps connections alive; the bytes of an engine's answer are written to
the transport by the relay, and aiohttp is only told that they were. Not here: what is answered.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawRequestMessage

from router.core.errors import Refusal, bad_request
from router.relay import Relay

_log: Final = logging.getLogger(__name__)

_BAD_HTTP: Final = bad_request("The request is not valid HTTP/1.1.", code="invalid_http")
_BUG: Final = Refusal(500, "The router failed.", "server_error", "internal_error")


class _Sent(web.StreamResponse):
    """An answer whose bytes the transport has already."""

    def __init__(self, *, keep: bool) -> None:
        super().__init__()
        self._keep = keep

    async def prepare(
        self,
        request: web.BaseRequest,  # noqa: ARG002 - aiohttp calls it so
    ) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:  # noqa: ARG002 - aiohttp calls it so
        return None

    @property
    def keep_alive(self) -> bool:
        return self._keep


def refuse(refusal: Refusal, request_id: str, *, close: bool = False) -> web.Response:
    """The router's own answer to a request it does not pass on."""
    response = web.Response(
        status=refusal.status,
        body=refusal.body(),
        headers={
            "Content-Type": "application/json",
            "Server": "detoserve",
            "x-request-id": request_id,
            **refusal.headers(),
        },
    )
    if close:
        response.force_close()
    return response


class ClientConnection(web.RequestHandler):
    """aiohttp's protocol, which tells the running relay when the client reads too slowly or leaves."""

    __slots__ = ("relay",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.relay: Relay | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if self.relay is not None:
            self.relay.client_left()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.relay is not None:
            self.relay.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.relay is not None:
            self.relay.resume()

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002 - aiohttp calls it so
        status: int = 500,  # noqa: ARG002
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002
    ) -> web.StreamResponse:
        """Refuses what aiohttp cannot read, and what the router got wrong, without any detail.

        A parser's message quotes the request, and with it keys and prompts.
        """
        if isinstance(exc, HttpProcessingError):
            return refuse(_BAD_HTTP, "req_unread", close=True)
        _log.error("a request failed in the router: %s", _where(exc))
        return refuse(_BUG, "req_failed", close=True)


def _where(error: BaseException | None) -> str:
    """Kind and place of an error, without its text."""
    if error is None:
        return "no error given"
    trace = error.__traceback__
    place = ""
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}"


class ClientRequest(web.BaseRequest):
    """A request in chunks is the last of its connection.

    aiohttp's parser takes the last trailer of one request for the first header of the next, and so
    whoever shares a connection, as clients of a proxy do, could send a header in another's name.
    """

    @property
    def keep_alive(self) -> bool:
        return not (self._message.should_close or self._message.chunked)


class ClientServer(web.Server):
    """Makes a ClientConnection for every connection."""

    def _make_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        return ClientRequest(message, payload, protocol, writer, task, self._loop)

    def __call__(self) -> ClientConnection:
        return ClientConnection(self, loop=self._loop, **self._kwargs)


SENT: Final = _Sent(keep=True)
SENT_AND_CLOSE: Final = _Sent(keep=False)
