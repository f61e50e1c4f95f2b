"""What limits cost a request, from admission to settlement with headers: `python tests/bench/bench_limits.py`.

CPU of this process, a real Valkey beside it. "paced" sends so many requests a second of as many
tenants, as they would come; the others go as fast as they can.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import uvloop
from redis.asyncio import Redis

from reconciler.publish.valkey import EmbeddedValkey
from router.core.errors import Refusal
from router.core.snapshot import Principal, snapshot
from router.limits.limiter import Admission, Limiter
from schemas.wire.routing import Budget, Function, Key, Limits, Price, RoutingTable, Tenant

SECONDS = 4.0
TWO_RATES = Limits(requests_per_minute=10**8, tokens_per_minute=10**11)
ALL_THREE = Limits(requests_per_minute=10**8, tokens_per_minute=10**11, concurrent=10**6)
NOTHING = Limits()
NO_BUDGET = Budget()


@dataclass
class Case:
    name: str
    tenant: Limits = NOTHING
    key: Limits = NOTHING
    function: Limits = NOTHING
    budget: Budget = NO_BUDGET
    tenants: int = 1
    per_second: int = 0
    """0: as fast as it goes."""
    shared: bool = True


CASES = [
    Case("nothing limited"),
    Case("a tenant's two rates", TWO_RATES),
    Case("tenant, key and function, all limits, two budgets",
         ALL_THREE, ALL_THREE, ALL_THREE, Budget(monthly_usd=10**6, monthly_tokens=10**14)),
    Case("a tenant's two rates, without Redis", TWO_RATES, shared=False),
    Case("nothing limited, 2,000/s paced", per_second=2000),
    Case("10 tenants, 2,000/s paced", TWO_RATES, tenants=10, per_second=2000),
    Case("1,000 tenants, 2,000/s paced", TWO_RATES, tenants=1000, per_second=2000),
]  # fmt: skip


async def run(case: Case, url: str) -> str:
    tenants = tuple(
        Tenant(
            name=f"{case.name}-{n}",
            keys=(Key(id="k", sha256=bytes(32), limits=case.key),),
            models=("*",),
            limits=case.tenant,
            budget=case.budget,
        )
        for n in range(case.tenants)
    )
    what = Function(
        name=f"f-{case.name}", served_name="f", limits=case.function, price=Price(input=1, output=2)
    )
    table = RoutingTable(
        generation=1, revision="r", published_at=0.0, functions=(what,), tenants=tenants
    )
    redis = Redis.from_url(url)
    limiter = Limiter(redis if case.shared else None, name="bench", wait_s=1.0)
    limiter.installed(snapshot(table))
    task = asyncio.create_task(limiter.run())
    who = [Principal(tenant, tenant.keys[0]) for tenant in tenants]

    later: set[asyncio.Task[None]] = set()

    def admitted(answer: Admission | Refusal) -> None:
        assert isinstance(answer, Admission)
        answer.headers()
        answer.settle(480, 100, 1_000_000)

    async def wait(one: Principal) -> None:
        admitted(await limiter.admit(one, what, 500, 256))

    async def request(n: int) -> None:
        one = who[n % len(who)]
        answer = limiter.admit_now(one, what, 500, 256)
        if answer is not None:
            admitted(answer)
        elif case.per_second:
            task = asyncio.create_task(wait(one))
            later.add(task)
            task.add_done_callback(later.discard)
        else:
            await wait(one)

    await _spend(request, case, 0.5)
    asked = limiter.round_trips
    began = time.process_time()
    count = await _spend(request, case, SECONDS)
    cpu_us = (time.process_time() - began) / count * 1e6
    asked = limiter.round_trips - asked
    task.cancel()
    await asyncio.wait([task])
    await limiter.close()
    await redis.aclose()
    return f"| {case.name} | {count:,} | {cpu_us:.1f} | {asked / count:.4f} |"


async def _spend(request: Callable[[int], Awaitable[None]], case: Case, seconds: float) -> int:
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        until = int(spent * case.per_second) if case.per_second else count + 100
        while count < until:
            await request(count)
            count += 1
        await asyncio.sleep(0.005 if case.per_second else 0)
    return count


async def main() -> None:
    print("| limits | requests | CPU us a request | questions a request |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        async with EmbeddedValkey(Path(folder)) as valkey:
            for case in CASES:
                print(await run(case, valkey.url), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
