"""What an engine still says when its client has left: heard for the count, and by nobody else.

The engine is told at once that nobody listens, by the end of our half of the connection; what it had
sent by then is read before the rest is closed. Not here: ending the request itself (exchange).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from router.upstream.connection import Connection, ResponseHead
from router.upstream.failures import UpstreamFailed
from router.usage.meter import Metered

LISTENS_S: Final = 0.25
"""Then the connection is cut: some engines do not notice that one half is closed."""


class LastWords:
    """Receiver of an exchange that nobody waits for. `over` is called once."""

    def __init__(self, connection: Connection, metered: Metered, over: Callable[[], None]) -> None:
        self._connection = connection
        self._metered = metered
        self._over = over
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._listened = metered.listens

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Until the engine closes, at most for LISTENS_S."""
        transport = self._connection.transport
        if (
            transport is None
            or not transport.can_write_eof()
            or not self._connection.hand_over(self)
        ):
            self.end()
        else:
            self._timer = loop.call_later(LISTENS_S, self.end)
            transport.resume_reading()  # it may be held back for a client that read slowly
            transport.write_eof()

    def received(self, head: ResponseHead | None, data: bytes, complete: bool) -> None:
        if head is not None:
            self._listened = self._metered.answered(head.status, head.content_type)
        if self._listened:
            self._metered.feed(data, complete)
        if complete:
            self.end()

    def failed(self, error: UpstreamFailed) -> None:  # noqa: ARG002 - as Receiver
        self.end()

    def end(self) -> None:
        """Closes the connection, whatever is still to come."""
        if self._ended:
            return
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        self._connection.close()
        self._over()
