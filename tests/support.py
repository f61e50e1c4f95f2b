"""What several test modules share: waiting without sleeping blindly, free ports, real servers."""

from __future__ import annotations

import asyncio
import inspect
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


async def eventually(
    probe: Callable[[], T | Awaitable[T]], *, timeout_s: float = 10.0, what: str = ""
) -> T:
    """Returns the probe's first truthy value; an exception counts as "not yet".

    Raises:
        AssertionError: with the last value or exception, when the deadline passes.
    """
    deadline = time.monotonic() + timeout_s
    last: Any = None
    while True:
        try:
            value = probe()
            if inspect.isawaitable(value):
                value = await value
            if value:
                return value  # type: ignore[return-value]
            last = value
        except Exception as error:  # noqa: BLE001 - any failure means "not yet"
            last = error
        if time.monotonic() > deadline:
            name = what or getattr(probe, "__name__", "probe")
            raise AssertionError(f"{name} not true within {timeout_s} s; last: {last!r}")
        await asyncio.sleep(0.01)


def eventually_sync(probe: Callable[[], T], *, timeout_s: float = 10.0, what: str = "") -> T:
    """The same for tests without an event loop."""
    return asyncio.run(eventually(probe, timeout_s=timeout_s, what=what))


def free_port() -> int:
    """A port that was free a moment ago; for programs that cannot bind port 0 themselves.

    Below those that the kernel gives to connections: a program may bind it a minute later.
    """
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(ephemeral, 20_000))
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("0.0.0.0", port))
            return port
