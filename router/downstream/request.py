"""A request as it was read from a client's connection.

Not here: what it means (server, exchange), or how it is read (connection).
"""

from __future__ import annotations

from asyncio import BaseTransport


class Request:
    """Head and body. The body is complete when the request is handed on."""

    __slots__ = (
        "body",
        "headers",
        "keep_alive",
        "method",
        "modern",
        "path",
        "target",
        "too_large",
        "transport",
    )

    def __init__(self) -> None:
        self.transport: BaseTransport | None = None
        """It came by this connection."""
        self.method = ""
        self.target = ""
        """As the client wrote it: path and query."""
        self.path = ""
        """Without the query."""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.too_large = False
        """More than may be read was sent, and thrown away."""
        self.keep_alive = False
        """The client may send another request on this connection."""
        self.modern = False
        """HTTP/1.1: the answer may come in chunks."""

    @property
    def address(self) -> str:
        """Of whoever the connection is from; empty where it has none."""
        peer = self.transport.get_extra_info("peername") if self.transport is not None else None
        return str(peer[0]) if isinstance(peer, tuple) else ""
