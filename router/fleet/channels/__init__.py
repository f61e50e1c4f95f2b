"""How routers' messages reach one another, behind one narrow seam.

A channel loses messages rather than hold anybody up, and says how many. Not here: what a message
says (core.sharing), or when one is sent (sharing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Receive = Callable[[bytes], None]


class Channel(Protocol):
    """Carries messages between routers, of this one's own possibly too."""

    name: str
    """For metrics."""
    lost: int
    """Messages of this router that did not leave it."""

    def send(self, data: bytes) -> None:
        """Takes a message, and returns at once. Never fails."""
        ...

    async def run(self, receive: Receive) -> None:
        """Hands on what comes, through everything that can happen to the way, until cancelled."""
        ...
