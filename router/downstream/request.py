"""A request as it was read from a client's connection.

Not here: what it means (server, exchange), or how it is read (connection).
"""

from __future__ import annotations


class Request:
    """Head and body. The body is complete when the request is handed on."""

    __slots__ = ("body", "headers", "keep_alive", "method", "modern", "path", "target", "too_large")

    def __init__(self) -> None:
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
