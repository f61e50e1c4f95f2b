"""The edge to Redis or Valkey: how to connect, and what its failures mean to the reconciler.

Not here: any key or message (lease, routes, routers).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisError,
)

from reconciler.errors import Stalled, Transient


def connect(url: str) -> Redis:
    """A client of `redis://`, `rediss://` or `unix://`; connects at first use, answers in bytes.

    It tries once more on a connection that turns out dead; `answered` bounds the whole.

    Raises:
        Stalled: the URL is of no such form.
    """
    try:
        return Redis.from_url(
            url,
            retry=Retry(NoBackoff(), 1),
            health_check_interval=30,
            # With a timeout of its own it sends inside asyncio.wait_for, which before Python 3.12
            # swallows a cancellation that comes as the sending ends.
            socket_timeout=None,
        )
    except ValueError:
        scheme = urlsplit(url).scheme
        raise Stalled(
            f"the Redis URL (it begins with {scheme or 'no scheme'!r}) cannot be used; "
            "write redis://host:port, rediss://host:port or unix:///path/to.sock"
        ) from None


@asynccontextmanager
async def answered(what: str, timeout_s: float) -> AsyncIterator[None]:
    """Bounds a conversation with Redis and translates its failures.

    Raises:
        Transient: no answer in time, connection lost, still loading, out of memory.
        Stalled: the password or the rights are wrong.
    """
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise Transient(f"{what}: Redis did not answer within {timeout_s:g} s") from None
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        raise Stalled(f"{what}: Redis refuses: {error}") from None
    except (RedisError, OSError) as error:
        raise Transient(f"{what}: {error}") from None
