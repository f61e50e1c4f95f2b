"""What a client sends ahead is read in its order, whenever the answer before it ends."""

from __future__ import annotations

import asyncio

import pytest

from router.core.errors import Refusal
from router.downstream.connection import ClientConnection, ClientServer
from router.downstream.request import Request
from tests.silent_transport import SilentTransport


class Slow:
    """A handler that answers when it is told to."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    def look_at_head(self, request: Request) -> Refusal | bool:
        return False

    def serve(self, request: Request, client: ClientConnection) -> None:
        self.bodies.append(request.body)
        client.ongoing = self

    def client_left(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


def request(body: bytes) -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


@pytest.mark.parametrize("cut", range(1, 70, 4))
def test_bytes_that_come_just_as_an_answer_ends_wait_for_those_before_them(cut):
    async def run() -> list[bytes]:
        handler = Slow()
        server = ClientServer(handler, max_body_bytes=99, body_timeout_s=9, keepalive_s=9)
        connection = server()
        connection.connection_made(SilentTransport())
        connection.data_received(request(b"first"))
        ahead = request(b"second") + request(b"third")
        connection.data_received(ahead[:cut])
        connection.done(keep=True)
        connection.data_received(ahead[cut:])  # before the loop has come to what was ahead
        for _ in range(3):
            await asyncio.sleep(0)
            if connection.ongoing is not None:
                connection.done(keep=True)
        await asyncio.sleep(0)
        connection.connection_lost(None)
        return handler.bodies

    assert asyncio.run(run()) == [b"first", b"second", b"third"]
