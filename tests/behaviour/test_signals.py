"""What a router counts reaches the reconciler through a real Valkey, and a waiting request at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from redis.asyncio import Redis

from reconciler.core.signals import Signals as Heard
from reconciler.publish.redis_edge import connect
from reconciler.publish.signals import SignalsWatch
from reconciler.publish.valkey import EmbeddedValkey
from router.core.shapes import Usage
from router.fleet.signals import Signals
from router.records import Outcome, RequestRecord
from router.state import RouterState
from schemas.wire import redis_keys
from schemas.wire.events import EngineReport
from schemas.wire.routing import Arm, Function, Replica, RoutingTable
from tests.support import eventually


def table(generation: int, *replicas: str) -> RoutingTable:
    found = tuple(Replica(id=r, url="http://127.0.0.1:9", spec_digest="d1") for r in replicas)
    arm = Arm(deployment="chat", cluster="here", replicas=found)
    function = Function(name="f", served_name="f", arms=(arm,))
    return RoutingTable(
        generation=generation, revision="r", published_at=1.0, functions=(function,)
    )


@asynccontextmanager
async def valkey(folder: Path) -> AsyncIterator[Redis]:
    async with EmbeddedValkey(folder / "valkey") as server:
        redis = connect(server.url)
        try:
            yield redis
        finally:
            await redis.aclose()


@asynccontextmanager
async def running(*works) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def ended(
    replica: str, outcome: Outcome = "ok", *, ttft_s: float = 0.0, usage: Usage | None = None
) -> RequestRecord:
    """What a request that was sent there leaves."""
    record = RequestRecord("/v1/chat/completions", "chat", 100.0)
    record.function, record.replica = "f", replica
    record.outcome = outcome
    record.usage = usage
    record.first_body = 100.0 + ttft_s if ttft_s else 0.0
    return record


async def test_a_routers_counts_arrive_and_a_waiting_request_is_told_at_once(tmp_path):
    state = RouterState(upstream_keepalive_s=1, upstream_silence_s=30)
    held: dict[str, int] = {}
    reports = {
        name: EngineReport(replica=name, at=1.0, waiting=2, kv_usage=use)
        for name, use in (("r-1", 0.2), ("r-2", 0.4))
    }
    counted = Signals(state, "r1", waiting=lambda: held, engine=reports.get)
    state.install(table(1, "r-1", "r-2"), 2e9)
    for outcome in ("ok", "ok", "interrupted"):
        counted.finished(ended("r-1", outcome, ttft_s=0.2, usage=Usage(100, 25, 1)))
    counted.finished(ended("unknown", "interrupted"))
    counted.abandoned("unknown")
    heard = Heard()
    urgent: list[bool] = []
    async with valkey(tmp_path) as redis:
        watch = SignalsWatch(redis, heard, urgent.append, time.monotonic)
        state.in_flight.sent("r-2")
        async with running(watch.run(), counted.run(redis, interval_s=0.05)):
            total = await eventually(
                lambda: (t := heard.totals("chat", "here", "d1")).attempts == 3 and t
            )
            assert (total.failed, total.hit_ratio) == (1, 0.25)
            load = heard.load("f", ["chat"], "here", time.monotonic(), over_s=5)
            assert load is not None
            assert (load.in_flight, load.queued, load.kv_usage) == (1, 4, 0.3)
        assert not any(urgent)
        async with running(watch.run(), counted.run(redis, interval_s=60)):
            await eventually(lambda: redis.pubsub_numsub(redis_keys.SIGNALS_CHANNEL))
            held["f"] = 2

            async def told() -> bool:
                counted.wakes("f")
                return any(urgent)

            await eventually(told)
            assert heard.waiting("f", time.monotonic()) == 2


async def test_a_message_of_another_form_is_left_alone(tmp_path):
    heard, urgent = Heard(), []
    async with valkey(tmp_path) as redis:
        watch = SignalsWatch(redis, heard, urgent.append, time.monotonic)
        state = RouterState(upstream_keepalive_s=1, upstream_silence_s=30)
        async with running(watch.run()):
            await eventually(lambda: redis.publish(redis_keys.SIGNALS_CHANNEL, b"\xc1 nonsense"))
            async with running(Signals(state, "r1").run(redis, interval_s=0.02)):
                await eventually(lambda: heard.heard(time.monotonic()))


def test_a_replica_that_leaves_is_counted_until_what_it_carries_has_ended():
    state = RouterState(upstream_keepalive_s=1, upstream_silence_s=30)
    counted = Signals(state, "r1")
    state.install(table(1, "r-1"), 2e9)
    state.in_flight.sent("r-1")
    state.install(table(2), 2e9)
    counted.finished(ended("r-1", ttft_s=0.1))
    (arm,) = counted.message(full=True).arms
    assert (arm.attempts, arm.in_flight) == (1, 1)
    state.in_flight.ended("r-1")
    state.install(table(3), 2e9)
    assert counted.message(full=True).arms == ()


def test_between_full_messages_only_changes_are_told():
    state = RouterState(upstream_keepalive_s=1, upstream_silence_s=30)
    counted = Signals(state, "r1")
    state.install(table(1, "r-1"), 2e9)
    assert len(counted.message(full=False).arms) == 1
    assert counted.message(full=False).arms == ()
    assert len(counted.message(full=True).arms) == 1
    counted.abandoned("r-1")
    (arm,) = counted.message(full=False).arms
    assert (arm.attempts, arm.failed, arm.ttft) == (1, 1, {})
