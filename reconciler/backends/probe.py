"""Asks an engine whether it may receive requests, and follows its answer over time.

Not here: what to do about it (the backends), or who may be routed to (router).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import aiohttp

from schemas.function import Readiness

FASTEST_S: Final = 0.02
_GROWTH: Final = 0.05


def pause_s(unready_for_s: float, interval_s: float) -> float:
    """Until the next probe of an engine that is not ready: a twentieth of the time it has not been.

    So a start of milliseconds is seen within milliseconds, and one of minutes is at most 5 % late.
    """
    return min(interval_s, max(FASTEST_S, _GROWTH * unready_for_s))


class Prober:
    """HTTP for probes alone: no redirects, no proxy, a connection for each question."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, url: str, timeout_s: float) -> str | None:
        """None when the answer is 2xx; else why not, for people."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(force_close=True, limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        try:
            async with self._session.get(
                url, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as answer:
                if 200 <= answer.status < 300:
                    return None
                return f"{url} answers {answer.status}"
        except TimeoutError:
            return f"{url} does not answer within {timeout_s:g} s"
        except aiohttp.ClientConnectorError as error:
            return f"{url}: {error.strerror or 'no connection'}"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return f"{url}: {type(error).__name__}"

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


async def follow(
    ask: Callable[[], Awaitable[str | None]],
    readiness: Readiness,
    *,
    ready: bool,
    report: Callable[[bool, str], None],
) -> None:
    """Probes for ever. `report(ready, why)` at every change, and after every failure until ready.

    A ready engine counts as not ready only after `failure_threshold` failures in a row.
    """
    loop = asyncio.get_running_loop()
    failures, unready_since = 0, loop.time()
    while True:
        why = await ask()
        if why is None:
            failures = 0
            if not ready:
                ready = True
                report(True, "")
        else:
            failures += 1
            if ready and failures >= readiness.failure_threshold:
                ready, unready_since = False, loop.time()
            if not ready:
                report(False, why)
        await asyncio.sleep(
            readiness.interval
            if ready
            else pause_s(loop.time() - unready_since, readiness.interval)
        )
