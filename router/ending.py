"""Ends tasks that may forget that they were told to.

redis-py sends by asyncio.wait_for, which up to Python 3.11 forgets a cancellation that meets the end of
what it waits for; and a TaskGroup that is cancelled tells its tasks just once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

_AGAIN_S: Final = 0.2


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels them, again and again, until all have ended; also while it is cancelled itself."""
    left = set(tasks)
    cancelled: asyncio.CancelledError | None = None
    while left:
        for task in left:
            task.cancel()
        try:
            await asyncio.wait(left, timeout=_AGAIN_S)
        except asyncio.CancelledError as error:
            cancelled = error
        left = {task for task in left if not task.done()}
    if cancelled is not None:
        raise cancelled


async def together(*parts: asyncio.Task[Any]) -> None:
    """Returns when all have ended. When one fails, or this is cancelled, none is left running.

    Raises:
        What the first that failed has raised.
    """
    try:
        done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_EXCEPTION)
        for part in done:
            part.result()
    finally:
        await end(parts)
