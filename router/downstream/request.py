"""A request as it was read from a client's connection.

Not here: what it means (server, exchange), or how it is read (connection).
"""

from __future__ import annotations

from asyncio import BaseTransport

from router.core.headers import ClientHeaders


class Request:
    """Head and body. The body is complete when the request is handed on."""

    transport: BaseTransport | None = None
    """It came by this connection."""
    method: str = ""
    target: str = ""
    """As the client wrote it: path and query."""
    path: str = ""
    """Without the query."""
    body: bytes = b""
    too_large: bool = False
    """More than may be read was sent, and thrown away."""
    keep_alive: bool = False
    """The client may send another request on this connection."""
    modern: bool = False
    """HTTP/1.1: the answer may come in chunks."""
    read: ClientHeaders | None = None
    """What its headers say, once somebody has read them."""

    def __init__(self, headers: list[tuple[bytes, bytes]]) -> None:
        self.headers = headers

    def again(self, body: bytes) -> Request:
        """Another with this head."""
        other = Request(self.headers)
        other.method = self.method
        other.target = self.target
        other.path = self.path
        other.body = body
        other.keep_alive = self.keep_alive
        other.modern = self.modern
        other.read = self.read
        return other

    @property
    def address(self) -> str:
        """Of whoever the connection is from; empty where it has none."""
        peer = self.transport.get_extra_info("peername") if self.transport is not None else None
        return str(peer[0]) if isinstance(peer, tuple) else ""
