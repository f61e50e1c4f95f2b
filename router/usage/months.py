"""What each tenant has used this month by the ledger in Git, for those who may ask.

A copy of a few numbers a tenant, read in the background: no request waits for Redis. It is as new as
the ledger's last commit. Not here: counting (meter), or budgets (limiter), which ask Redis themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from schemas.wire import redis_keys
from schemas.wire.events import MonthToDate

_EVERY_S: Final = 5.0
_log: Final = logging.getLogger(__name__)
_decode: Final = msgspec.msgpack.Decoder(MonthToDate).decode


class UsageMonths:
    """Owned by one event loop."""

    def __init__(self) -> None:
        self._month = ""
        self._tenants: dict[str, MonthToDate] | None = None

    async def run(self, redis: Redis) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.read(redis)
            except (RedisError, OSError, TimeoutError) as error:
                _log.debug("usage of the month is not read: %s", type(error).__name__)
            await asyncio.sleep(_EVERY_S)

    async def read(self, redis: Redis) -> None:
        """Once.

        Raises:
            RedisError, OSError, TimeoutError: Redis is away; what was known stays.
        """
        month = time.strftime("%Y-%m", time.gmtime())
        found: dict[str, MonthToDate] = {}
        kept: dict[Any, Any] = await redis.hgetall(redis_keys.usage_month(month))
        for tenant, data in kept.items():
            try:
                found[bytes(tenant).decode()] = _decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError):
                _log.warning("usage of the month holds what is no record of it")
        self._month, self._tenants = month, found

    def of(self, tenant: str) -> dict[str, Any] | None:
        """As JSON; None while nothing has been read."""
        if self._tenants is None:
            return None
        used = self._tenants.get(tenant, MonthToDate())
        return {
            "object": "usage",
            "tenant": tenant,
            "month": self._month,
            "requests": used.requests,
            "input_tokens": used.input_tokens,
            "cached_tokens": used.cached_tokens,
            "output_tokens": used.output_tokens,
            "cost_usd": used.cost_nano_usd / 1e9,
        }
