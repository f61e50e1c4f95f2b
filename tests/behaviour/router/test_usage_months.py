"""`GET /v1/usage`: a tenant reads what the ledger has counted of its month, and nobody else's."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec

from schemas import api_keys
from schemas.wire import redis_keys
from schemas.wire.events import MonthToDate
from schemas.wire.routing import Key
from tests.behaviour.publish_fixtures import running_valkey
from tests.behaviour.router.harness import (
    KEY,
    post,
    raw,
    routing_table,
    running_router,
    tenant,
)

READER, OTHER = api_keys.create(), api_keys.create()


def may_read(key: api_keys.ApiKey) -> Key:
    return Key(id=key.id, sha256=bytes.fromhex(key.sha256), scopes=("usage",))


async def asked(port: int, key: str) -> tuple[int, dict[str, Any]]:
    get = post(b"", path="/v1/usage", key=key).replace(b"POST", b"GET", 1)
    head, _, body = (await raw(port, get)).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


async def test_a_key_with_the_scope_reads_its_own_tenants_month(tmp_path: Path) -> None:
    month = time.strftime("%Y-%m", time.gmtime())
    tenants = (
        tenant("team", keys=(may_read(READER), *tenant().keys)),
        tenant("guest", keys=(may_read(OTHER),)),
    )
    used = MonthToDate(
        requests=3, input_tokens=70, cached_tokens=20, output_tokens=9, cost_nano_usd=1_500_000
    )
    async with (
        running_valkey(tmp_path) as (_, redis),
        running_router(routing_table(tenants=tenants), tmp_path) as running,
    ):
        unknown = await asked(running.port, READER.text)
        assert (unknown[0], unknown[1]["error"]["code"]) == (503, "usage_unknown")
        await redis.hset(redis_keys.usage_month(month), "team", msgspec.msgpack.encode(used))
        await redis.hset(redis_keys.usage_month(month), "odd", b"\xff")
        await running.router.proxy.usage_months.read(redis)
        assert await asked(running.port, READER.text) == (
            200,
            {
                "object": "usage",
                "tenant": "team",
                "month": month,
                "requests": 3,
                "input_tokens": 70,
                "cached_tokens": 20,
                "output_tokens": 9,
                "cost_usd": 0.0015,
            },
        )
        status, guests = await asked(running.port, OTHER.text)
        assert (status, guests["tenant"], guests["requests"]) == (200, "guest", 0)
        status, refused = await asked(running.port, KEY.text)
        assert (status, refused["error"]["code"]) == (403, "insufficient_scope")
        assert (await asked(running.port, "wrong"))[0] == 401
        running.assert_idle()
