"""How many requests begin in one pass of the event loop, so that a burst of them holds up nobody.

Without it, a thousand requests that come at once are all routed and sent before the first answer is
passed on, and every running stream waits as long. Not here: how many may run (core.admission).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

PER_PASS: Final = 64


class Turns:
    """Owned by one event loop. First come, first served."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._left = PER_PASS
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take(self) -> asyncio.Future[None] | None:
        """None: begin now, as nearly always. Else begin when the future is done."""
        if self._left:
            self._left -= 1
            if not self._left:
                self._loop.call_soon(self._next_pass)
            return None
        turn = self._loop.create_future()
        self._waiting.append(turn)
        return turn

    def _next_pass(self) -> None:
        left = PER_PASS
        while self._waiting and left:
            turn = self._waiting.popleft()
            if not turn.done():  # else its client has left
                turn.set_result(None)
                left -= 1
        self._left = left
        if not left:
            self._loop.call_soon(self._next_pass)
