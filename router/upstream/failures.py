"""How an exchange with an engine, or its way to the client, can fail.

    ConnectionError
    +- UpstreamFailed       the exchange ended before the answer did
    |  +- ConnectFailed     no connection could be opened
    |  |  +- EndpointForbidden   its address is not one that the cluster allows
    |  +- UpstreamTimeout   a deadline passed
    +- ClientGone           nobody takes the answer

Not here: what follows from it (exchange), or what a client is told (core.errors).
"""

from __future__ import annotations

from typing import Literal


class UpstreamFailed(ConnectionError):
    """The exchange ended before the answer did. `began`: some of the answer had arrived."""

    def __init__(self, message: str, *, began: bool, stale: bool = False) -> None:
        super().__init__(message)
        self.began = began
        self.stale = stale
        """A reused connection closed without a byte: the engine's keep-alive had run out."""


class ConnectFailed(UpstreamFailed):
    """No connection could be opened: nothing was sent."""

    def __init__(self, message: str) -> None:
        super().__init__(message, began=False)


class UpstreamTimeout(UpstreamFailed):
    """A deadline passed. `phase`: connect, first-byte or between-chunks."""

    def __init__(
        self, phase: Literal["connect", "first-byte", "between-chunks"], waited_s: float
    ) -> None:
        super().__init__(
            f"{phase} deadline of {waited_s:g} s passed", began=phase == "between-chunks"
        )
        self.phase = phase
        self.waited_s = waited_s


class EndpointForbidden(ConnectFailed):
    """The endpoint's name resolves to an address that its cluster does not allow."""


class ClientGone(ConnectionError):
    """The client reads nothing, or is not there any more."""
